"""When things happen: every step, every n steps, at the end. Training and evaluation share one forward."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dpo_ds.config import RunConfig, source_names
from dpo_ds.data.batch import PairBatch
from dpo_ds.data.feed import Feed, StepPairs
from dpo_ds.data.prepared import PreparedPairs
from dpo_ds.data.schedule import Plan
from dpo_ds.engine import DataParallel, Engines, ReferenceEngine, World
from dpo_ds.engine.checkpoint import CHECKPOINTS_FOLDER, Checkpoints, Progress, complete_checkpoints
from dpo_ds.engine.reference_cache import CachedReference
from dpo_ds.engine.stopping import Agreement
from dpo_ds.errors import RunError, Stopped, UserError
from dpo_ds.gate import BATCHES as GATE_BATCHES
from dpo_ds.gate import check_cached_scores, check_equal_scores, check_first_loss, check_probe, starts_equal
from dpo_ds.learning_rate import learning_rate
from dpo_ds.losses import Objective, PairLabels, PairLogps, PreferenceLoss, Running
from dpo_ds.metrics import (
    Tally,
    add_diagnostics,
    add_groups,
    add_histogram,
    add_pairs,
    add_work,
    length_groups,
    length_names,
)
from dpo_ds.micro_batches import MicroBatches, pair_logps
from dpo_ds.throughput import Stopwatch
from dpo_ds.tracking import Tracker
from dpo_ds.watchdog import Watchdog
from dpo_ds.whole_step import judge_whole_step

_POLL_S = 0.2


@dataclass(frozen=True)
class Trained:
    """What a finished run did, over all ranks."""

    steps: int
    pairs: int
    tokens: int
    train_seconds: float


def objective_of(config: RunConfig) -> Objective:
    """Returns what a run minimises.

    Raises:
        ValueError: the keys of ``loss`` do not go together.
    """
    loss = config.loss
    return Objective(
        type=loss.type,
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        reduction=loss.reduction,
        parameters=loss.parameters,
        add=loss.add,
        divergence=loss.divergence,
        divergence_alpha=loss.divergence_alpha,
        weighting=loss.weighting,
    )


class Trainer:
    """Trains the policy on a schedule. Every method is collective: what runs next is the same on every rank."""

    def __init__(
        self,
        engines: Engines,
        config: RunConfig,
        *,
        train: Feed,
        evaluation: PreparedPairs | None,
        world: World,
        data_parallel: DataParallel,
        tracker: Tracker,
        checkpoints: Checkpoints,
        matmul_flops: float,
        packed: bool,
        agreement: Agreement,
        cached: CachedReference | None = None,
        answers: Callable[[], list[dict[str, str]]] | None = None,
        machines: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        """Composes a run.

        Args:
            engines: the policy's and, unless the loss is reference-free, the reference's.
            config: the resolved run file.
            train: pairs to train on, step by step.
            evaluation: held-out pairs, or None.
            world: the ranks.
            data_parallel: which of them score which pairs.
            tracker: where metrics go on global rank 0; one that keeps nothing elsewhere.
            checkpoints: where the run is saved.
            matmul_flops: operations a second of all ranks' matrix products together, for ``mfu``.
            packed: whether all pairs of a micro-batch share one row, and its responses their prompt.
            agreement: whether the ranks were asked to stop.
            cached: the reference's log-probs where it has no engine.
            answers: what the policy, in evaluation mode, says to a few prompts, beside them; collective.
            machines: memory and load of each machine; collective.
        """
        self._engines = engines
        self._config = config
        self._train = train
        self._evaluation = evaluation
        self._world = world
        self._data_parallel = data_parallel
        self._micro_batches = MicroBatches(
            engines,
            config,
            data_parallel=data_parallel,
            device=world.device,
            packed=packed,
            cached=cached,
            heed=self._heed,
        )
        self._tracker = tracker
        self._checkpoints = checkpoints
        self._progress = Progress()
        self._matmul_flops = matmul_flops
        self._agreement = agreement
        self._cached = cached
        self._answers = answers
        self._machines = machines
        self._objective = objective_of(config)
        self._running: dict[str, Running] = self._objective.start()
        # Log-ratios that tell of the policy: of the same tokens under both models.
        alike = config.loss.ld_reference or config.loss.ld_alpha in (None, 1)
        self._has_logratios = alike and (engines.reference is not None or cached is not None)
        self._watchdog = self._watch() if self._has_logratios else None

    @torch.no_grad()
    def pass_the_gate(self, *, same_source: bool) -> bool:
        """Scores the first pairs with both engines before the first update, if they hold equal weights.

        Args:
            same_source: both were read from one checkpoint.

        Returns:
            Whether the weights are equal, so that the gate applied.

        Raises:
            RunError: the weights should be equal and are not, or equal weights do not start at the loss's own value.
        """
        if not starts_equal(self._engines, world=self._world, same_source=same_source, cached=self._cached):
            return False
        tally = Tally(self._world.device)
        for batch, reference in self._scored_by_equal_weights():
            self._heed()
            # Both on the same terms, those of the reference.
            logps = pair_logps(batch, self._engines.policy.score(self._micro_batches.for_reference(batch)), reference)
            for name, pairs in (("loss", logps), ("expected", logps.unmoved())):
                tally.add(name, self._objective(pairs, labels=batch.labels).losses, weights=batch.weights)
        means = tally.means(self._data_parallel.sum(tally.packed()))
        check_first_loss(means["loss"], expected=means["expected"], dtype=self._engines.policy.dtype)
        return True

    def run(self, start: Progress = Progress()) -> Trained:  # noqa: B008 (immutable)
        """Trains the steps of the schedule, evaluates before, every ``eval_every`` steps, and after them, and saves.

        Args:
            start: where a checkpoint was restored from; the beginning by default.

        Raises:
            UserError: a checkpoint cannot be written.
            RunError: a loss or a gradient is not finite, or the reference has moved.
            Stopped: the ranks were asked to stop; the run is saved as it was after its last whole step.
        """
        steps, settings = self._train.steps, self._config.checkpoint
        self._progress = start
        self._running |= {name: Running(value, int(pairs)) for name, (value, pairs) in (start.running or {}).items()}
        self._world.enter("train")
        if start.probe is not None:
            check_probe(self._engines.policy, self._probe(), saved=start.probe)
        if start.step == 0:
            self._check_best(self.evaluate(after_step=0))
        elif start.evaluation is None and self._is_due(self._config.train.eval_every, start.step):
            # Stopped in the middle of it.
            self._progress = replace(start, evaluation=self.evaluate(after_step=start.step) or None)
        total, done = self._train.pairs_until(steps), self._train.pairs_until(start.step)
        with tqdm(total=total, initial=done, unit="pair", disable=self._world.rank != 0) as bar:
            for step in range(start.step + 1, steps + 1):
                metrics = self.train(step)
                bar.set_postfix_str(
                    "loss {loss:.4f} margin {rewards/margins:.3f} accuracy {rewards/accuracies:.2f}".format(**metrics)
                )
                bar.update(int(metrics["pairs"]))
                if step % self._config.tracking.log_every == 0 or step == steps:
                    machines = self._machines() if self._machines else {}
                    self._tracker.log({"step": step, "split": "train", **metrics, **machines})
                # Before the evaluation, which may be stopped: the weights are those after the step.
                self._progress = replace(
                    self._progress,
                    step=step,
                    tokens=self._progress.tokens + int(metrics["tokens"]),
                    train_seconds=self._progress.train_seconds + metrics["step_seconds"],
                    evaluation=None,
                    running={name: list(running) for name, running in self._running.items()} or None,
                )
                self._checkpoints.finish_if_written()
                self._heed_watchdog(step, metrics)
                if self._is_due(self._config.train.eval_every, step):
                    evaluation = self.evaluate(after_step=step)
                    self._progress = replace(self._progress, evaluation=evaluation or None)
                if settings.every is not None and self._is_due(settings.every, step):
                    self.save()
        # The export comes next.
        self._world.enter("save")
        self._checkpoints.finish()
        self._check_reference()
        return Trained(steps, total, self._progress.tokens, self._progress.train_seconds)

    @torch.no_grad()
    def save(self) -> None:
        """Saves the run as it was after its last whole step.

        Raises:
            UserError: the checkpoint cannot be written.
            RunError: the reference has moved.
        """
        self._world.enter("save")
        # What was trained against another reference is not worth going on from.
        self._check_reference()
        mark = self._tracker.mark()
        self._checkpoints.save(
            replace(
                self._progress,
                metrics_bytes=mark.metrics_bytes,
                wandb_run_id=mark.wandb_run_id,
                probe=self._engines.policy.score(self._probe()).flatten().tolist(),
            )
        )
        self._world.enter("train")

    def train(self, step: int) -> dict[str, float]:
        """Takes optimizer step ``step`` (from 1); returns the metrics of its batch, before its update, over all ranks.

        Raises:
            RunError: a loss or the gradient is not finite.
        """
        settings = self._config.train
        clock = Stopwatch(self._world.synchronize)
        among, indices = self._of_step(step)
        pairs = len(indices)
        plan = self._micro_batches.plan(among, indices)
        batches = list(self._micro_batches.laid_out(among, plan))
        clock.lap("seconds/batches")
        # The reference scores the whole step first: its temporaries are gone when the policy's activations appear.
        references = self._micro_batches.reference_logps_of_step(among, plan, batches)
        clock.lap("seconds/reference")
        tally = Tally(self._world.device)
        suspects = []
        self._engines.policy.model.train()
        for batch, (loss, logps, surrogate) in zip(batches, self._judged(plan, batches, references), strict=True):
            self._engines.policy.backward((surrogate + self._routing(tally, batch.weights)) / pairs)
            self._add(tally, loss, logps, batch.weights)
            self._add_entropies(tally, batch.weights)
            add_work(tally, tokens=batch.tokens, filled=batch.filled, positions=batch.input_ids.numel())
            # A loss of the whole step has no loss of a pair of its own to blame.
            suspects.append(logps.margins.detach() if self._objective.needs_whole_step else loss.losses.detach())
        clock.lap("seconds/policy")
        for name in ("seconds/reference", "seconds/policy"):
            tally.add(name, clock.laps[name])
        packed = self._data_parallel.sum(tally.packed())
        means, sums = tally.means(packed), tally.sums(packed)
        clock.lap("seconds/wait")
        if not math.isfinite(means["loss"]):
            self._stop_at_loss(step, among, plan, suspects)
        rate = learning_rate(
            step,
            steps=self._train.steps,
            peak=settings.learning_rate,
            schedule=settings.schedule,
            warmup_ratio=settings.warmup_ratio,
        )
        grad_norm = self._engines.policy.step(learning_rate=rate)
        if not math.isfinite(grad_norm):
            # DeepSpeed knows it from the norm that it clips by, and leaves the weights alone.
            self._stop_at(step, among, "the gradient's norm is not finite, with a finite loss,", indices)
        self._move_reference(step)
        self._running = self._objective.carried(
            self._running,
            chosen_reward=means["rewards/chosen"],
            rejected_reward=means["rewards/rejected"],
            pairs=pairs,
        )
        clock.lap("seconds/update")
        seconds = clock.total()
        return {name: mean for name, mean in means.items() if not name.startswith("work/")} | {
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "pairs": pairs,
            "tokens": sums["work/tokens"],
            "fill_rate": sums["work/filled"] / sums["work/positions"],
            "step_seconds": seconds,
            "tokens_per_second": sums["work/tokens"] / seconds,
            "mfu": self._micro_batches.flops(among)[indices].sum() / (seconds * self._matmul_flops),
            **{name: clock.laps[name] for name in ("seconds/batches", "seconds/wait", "seconds/update")},
        }

    @torch.no_grad()
    def evaluate(self, *, after_step: int) -> dict[str, float]:
        """Scores the held-out pairs, logs their metrics, and proves that the reference has not moved.

        The result does not depend on the number of ranks. Without held-out pairs nothing is scored.

        Raises:
            RunError: the reference has moved.
        """
        self._check_reference()
        if self._evaluation is None:
            return {}
        plan = self._micro_batches.plan_evaluation(self._evaluation)
        tally = Tally(self._world.device)
        self._engines.policy.model.eval()
        names = self._evaluated_sources(self._evaluation)
        part = torch.from_numpy(self._evaluation.part)
        lengths = self._evaluation.lengths
        length_of = length_groups(np.maximum(lengths.chosen, lengths.rejected))
        groups = (
            ("source", names, part),
            ("length", length_names(length_of), torch.from_numpy(length_of)),
        )
        mine = plan[self._data_parallel.rank]
        scored = []
        for batch, reference in self._micro_batches.scored_by_reference(self._evaluation, plan):
            scored.append((self._micro_batches.score(batch, reference), batch.labels, batch.weights))
            self._add_entropies(tally, batch.weights)
        judged = self._losses(plan, [logps for logps, _, _ in scored], [labels for _, labels, _ in scored])
        for micro_batch, (logps, _, weights), (loss, _) in zip(mine, scored, judged, strict=True):
            self._add(tally, loss, logps, weights)
            add_histogram(tally, "rewards/margins", loss.margins, weights=weights)
            for kind, named, group_of in groups:
                numbers = group_of[list(micro_batch.pairs)].to(self._world.device)
                add_groups(tally, loss, kind=kind, names=named, groups=numbers, weights=weights)
        packed = self._data_parallel.sum(tally.packed())
        metrics = tally.means(packed)
        line: dict[str, Any] = {"step": after_step, "split": "eval", **metrics, "pairs": len(self._evaluation)}
        answers = {"answers": self._answers()} if self._answers else {}
        self._tracker.log(line | tally.histograms(packed) | answers)
        return metrics

    def _evaluated_sources(self, pairs: PreparedPairs) -> dict[int, str]:
        """Returns the names of sources that have pairs, by number; none where there is one source only."""
        names = source_names(self._config.data.eval or ())
        counts = pairs.pairs_of_parts
        return {number: name for number, name in enumerate(names) if len(names) > 1 and counts[number]}

    def _is_due(self, every: int | None, step: int) -> bool:
        return step == self._train.steps or (every is not None and step % every == 0)

    def _move_reference(self, step: int) -> None:
        reference, settings = self._engines.reference, self._config.reference
        if settings.sync_every is not None and step % settings.sync_every == 0:
            assert isinstance(reference, ReferenceEngine)  # the config's rules say so
            reference.follow(self._engines.policy, weight=settings.sync_weight)

    def _check_reference(self) -> None:
        if self._engines.reference is not None:
            self._engines.reference.check()

    def _watch(self) -> Watchdog:
        bounds = self._config.watchdogs
        return Watchdog(
            not_moving_steps=bounds.not_moving_steps,
            chosen_drop=bounds.chosen_drop,
            beta=self._objective.beta,
            reduction=self._objective.own_reduction,
        )

    def _heed_watchdog(self, step: int, metrics: dict[str, float]) -> None:
        finding = self._watchdog.look(step, metrics) if self._watchdog else None
        if finding is None:
            return
        if self._config.watchdogs.action == "stop":
            raise RunError(f"{finding}; {self._last_checkpoint()}")
        if self._world.rank == 0:
            tqdm.write(f"warning: {finding}", file=sys.stderr)

    def _last_checkpoint(self) -> str:
        self._checkpoints.finish()
        found, _ = complete_checkpoints(self._checkpoints.folder)
        return f"the last checkpoint is {found[0]}" if found else "there is no checkpoint"

    def _probe(self) -> PairBatch:
        return self._micro_batches.lay_out([self._train.probe])

    def _check_best(self, evaluation: dict[str, float]) -> None:
        name = self._config.checkpoint.keep_best
        if name is not None and name not in evaluation:
            raise UserError(f"checkpoint.keep_best must be one of {', '.join(evaluation)}, got {name!r}")

    def _scored_by_equal_weights(self) -> list[tuple[PairBatch, Tensor]]:
        """Returns this rank's micro-batches of the gate and the reference's log-probs, which the policy has, too."""
        if self._cached is None:
            among, indices = self._of_step(1)
            plan = self._micro_batches.plan(among, indices)
            scored = list(islice(self._micro_batches.scored_by_reference(among, plan), GATE_BATCHES))
            check_equal_scores(self._engines, [batch for batch, _ in scored], world=self._world)
            return scored
        policy = self._engines.policy
        policy.model.train()
        seed = self._config.train.seed
        return check_cached_scores(policy.score, self._cached, seed=seed, dtype=policy.dtype, world=self._world)

    def _heed(self) -> None:
        """Saves and raises ``Stopped`` on all ranks once one was asked to; a step that was begun is taken again."""
        if reason := self._agreement.ask():
            raise Stopped(reason.name, step=self._progress.step, checkpoint=self._save_now())

    def _save_now(self) -> str | None:
        """Saves the run, if it has taken a step; returns the checkpoint's path in the output folder."""
        step = self._progress.step
        if not step:
            return None
        self.save()
        self._checkpoints.finish()
        return f"{CHECKPOINTS_FOLDER}/step-{step:08d}"

    def _of_step(self, step: int) -> StepPairs:
        """Returns what a step trains on; while it is waited for the run can be stopped."""
        if not self._train.is_at_hand(step):
            while not self._is_there(step):
                self._heed()
                time.sleep(_POLL_S)
        return self._train.of_step(step)

    def _is_there(self, step: int) -> bool:
        """Whether what a step trains on is there on all ranks; what was learnt is saved before it never comes."""
        is_there, problem = False, None
        try:
            is_there = self._train.is_there(step)
        except (UserError, RunError) as error:
            problem = error
        found = self._world.gather((is_there, problem))
        for _, problem in found:
            if problem is not None:
                self._save_now()
                raise problem
        return all(is_there for is_there, _ in found)

    def _judged(
        self, plan: Plan, batches: Sequence[PairBatch], references: Sequence[Tensor]
    ) -> Iterator[tuple[PreferenceLoss, PairLogps, Tensor]]:
        """Yields each micro-batch's losses, its log-probs, and a scalar whose gradient is that of its pairs' losses."""
        if not self._objective.needs_whole_step:
            for batch, reference in zip(batches, references, strict=True):
                logps = self._micro_batches.score(batch, reference)
                loss = self._objective(logps, labels=batch.labels, running=self._running)
                yield loss, logps, (loss.losses * batch.weights).sum()
            return
        with torch.no_grad():
            everything = [self._micro_batches.score(*scored) for scored in zip(batches, references, strict=True)]
        judged = self._losses(plan, everything, [batch.labels for batch in batches])
        for batch, reference, logps, (loss, slopes) in zip(batches, references, everything, judged, strict=True):
            again = self._micro_batches.score(batch, reference)
            yield loss, logps, (torch.stack([again.policy_chosen, again.policy_rejected]) * slopes).sum()

    def _losses(
        self, plan: Plan, logps: Sequence[PairLogps], labels: Sequence[PairLabels]
    ) -> Sequence[tuple[PreferenceLoss, Tensor]]:
        """Returns the losses of all micro-batches and, where they depend on each other, their slopes."""
        if not self._objective.needs_whole_step:
            return [
                (self._objective(pairs, labels=said, running=self._running), pairs.policy_chosen)
                for pairs, said in zip(logps, labels, strict=True)
            ]
        return judge_whole_step(
            self._objective,
            plan,
            logps,
            [said.weights for said in labels],
            rank=self._data_parallel.rank,
            running=self._running,
            sum_over_ranks=self._data_parallel.sum,
        )

    def _routing(self, tally: Tally, weights: Tensor) -> Tensor | float:
        """Returns what the routers of the micro-batch that was scored last add to the sum over its pairs."""
        loss = self._engines.policy.routing_loss
        if loss is None:
            return 0.0
        tally.add("aux_loss", loss.detach().expand(len(weights)), weights=weights)
        return self._config.loss.router_aux * loss * weights.sum()

    def _add(self, tally: Tally, loss: PreferenceLoss, logps: PairLogps, weights: Tensor) -> None:
        add_pairs(tally, loss, logps, weights=weights)
        add_diagnostics(tally, loss, logps, weights=weights, has_logratios=self._has_logratios)

    def _add_entropies(self, tally: Tally, weights: Tensor) -> None:
        """Adds what the policy left of the micro-batch that it scored last, if it measures it."""
        for side, values in zip(("chosen", "rejected"), self._engines.policy.entropies, strict=False):
            tally.add(f"entropy/{side}", values, weights=weights)

    def _stop_at_loss(self, step: int, among: PreparedPairs, plan: Plan, suspects: Sequence[Tensor]) -> NoReturn:
        mine = [
            pair
            for micro_batch, values in zip(plan[self._data_parallel.rank], suspects, strict=True)
            for pair, value in zip(micro_batch.pairs, values.tolist(), strict=True)
            if micro_batch.weight and not math.isfinite(value)
        ]
        bad = sorted(pair for pairs in self._data_parallel.gather(mine) for pair in pairs)
        self._stop_at(step, among, "the loss is not finite", bad)

    def _stop_at(
        self, step: int, among: PreparedPairs, what: str, pairs: Sequence[int] | NDArray[np.int64]
    ) -> NoReturn:
        """Ends the run before anything that is not finite reaches weights or a checkpoint."""
        named = ", ".join([*(among.where(int(pair)) for pair in pairs[:8]), *["..."] * (len(pairs) > 8)])
        raise RunError(
            f"step {step}: {what} for {len(pairs)} pair{'s' * (len(pairs) > 1)} ({named}); the weights are those "
            f"before the step, {self._last_checkpoint()}; lower train.learning_rate, or look at these pairs"
        )
