"""Checkpoints: DeepSpeed's shards of the policy and what this package adds, complete or absent; and the way back.

Written aside, every file's size and checksum listed last in ``COMPLETE``, then renamed. The order of the data is not in
here: the schedule derives it from the step.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from safetensors.torch import save as serialized

from dpo_ds.config import shown
from dpo_ds.engine.policy import PolicyEngine
from dpo_ds.engine.reference import ReferenceEngine, file_of_reference
from dpo_ds.engine.world import World
from dpo_ds.errors import RunError, UserError, first_line
from dpo_ds.files import measured, settled, sync_folder

CHECKPOINTS_FOLDER = "checkpoints"
COMPLETE = "COMPLETE"
_STATE = "state.json"
_ASIDE = ".tmp"
_FORMAT = 2
_SEEN_WITHIN_S = 10.0
"""Shared file systems show another node's new file after a few seconds."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: the last optimizer step that was taken, 0 before the first.
        tokens: trained on so far.
        train_seconds: spent in steps so far.
        metrics_bytes: length of ``metrics.jsonl``.
        wandb_run_id: wandb's name for the run, None without one.
        evaluation: means over the held-out pairs after this very step, None where there was no evaluation.
        probe: the policy's log-probs of the first pair's two responses, None where nothing was scored.
        running: the means that losses carry, each with the number of its pairs; None where there are none.
    """

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    metrics_bytes: int = 0
    wandb_run_id: str | None = None
    evaluation: dict[str, float] | None = None
    probe: list[float] | None = None
    running: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of itself.

    Attributes:
        progress: how far the run had come.
        origin: all that must be the same where the run goes on, by the run file's keys.
        weights: fingerprint of the policy's.
        optimizer: fingerprint of its masters, moments and steps.
        world_size: ranks that saved it.
        reference: fingerprint of a reference that has moved, None of one that stays what its files say.
        versions: of the packages that made it.
        format: version of the files' layout.
    """

    progress: Progress
    origin: dict[str, Any]
    weights: str
    optimizer: str
    world_size: int
    reference: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    format: int = _FORMAT


def complete_checkpoints(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns a folder's complete checkpoints, newest first, and what is wrong with the others.

    Sizes are compared, not contents: ``Checkpoints.restore`` does that, on all ranks.

    Args:
        folder: ``OUTPUT_DIR/checkpoints``, which may not exist.
    """
    found = sorted(folder.glob("step-*[0-9]"), key=step_of, reverse=True)
    problems = {path: problem_of(path) for path in found}
    return [path for path in found if problems[path] is None], [problem for problem in problems.values() if problem]


def step_of(checkpoint: Path) -> int:
    """Returns the step after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def problem_of(checkpoint: Path) -> str | None:
    """Returns why a folder is no complete checkpoint, in one line, or None if it is one."""
    try:
        files = _listed(checkpoint)
        for name, (size, _) in files.items():
            held = (checkpoint / name).stat().st_size
            if held != size:
                return f"{checkpoint / name} holds {held} bytes in place of {size}"
        if measured(checkpoint / _STATE) != files[_STATE] or read_saved(checkpoint).format != _FORMAT:
            return f"{checkpoint / _STATE} is damaged, or of another version"
    except FileNotFoundError as error:
        return f"there is no {error.filename}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{checkpoint} cannot be read: {first_line(error)}"
    return None


def read_saved(checkpoint: Path) -> Saved:
    """Returns what a complete checkpoint says of itself."""
    values = json.loads((checkpoint / _STATE).read_text())
    return Saved(**values | {"progress": Progress(**values["progress"])})


def check_origin(
    checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any], *, allowed: Collection[str]
) -> None:
    """Compares what a checkpoint was made with and what the run has now.

    Args:
        checkpoint: for the message.
        saved: the checkpoint's ``origin``.
        now: as much of the run's as is known by now.
        allowed: keys that may differ.

    Raises:
        UserError: a value differs.
    """
    for key, value in json.loads(json.dumps(dict(now))).items():
        if key not in allowed and value != saved.get(key):
            raise UserError(
                f"{key} is {shown(value)}, but {checkpoint} was made with {shown(saved.get(key))}; set it back, name "
                f"another output_dir, or go on with the new value: --allow_changed {key}"
            )


def surplus(steps: Collection[int], *, keep: int, keep_every: int | None, best: int | None) -> set[int]:
    """Returns the steps whose checkpoints may go.

    Args:
        steps: all that have one.
        keep: how many of the newest stay.
        keep_every: multiples of it stay.
        best: stays.
    """
    lasting = {step for step in steps if keep_every is not None and step % keep_every == 0} | {best}
    return set(sorted(steps)[:-keep]) - lasting


_Files = dict[str, tuple[int, str]]


class _Writing:
    """A checkpoint that this rank is writing its files of, perhaps in a thread of its own.

    Attributes:
        aside: where the files are until all are there.
        target: where they belong.
        saved: what the checkpoint says of itself.
        is_over: set when this rank has written, or failed to.
        problem: why it failed, or None.
        files: sizes and checksums of this rank's.
    """

    def __init__(self, aside: Path, target: Path, saved: Saved, write: Callable[[], _Files]) -> None:
        self.aside, self.target, self.saved = aside, target, saved
        self.is_over = Event()
        self.problem: str | None = None
        self.files: _Files = {}
        self._write = write

    def work(self) -> None:
        """Writes; what fails is noted, since the other ranks would wait for one that raised."""
        try:
            self.files = self._write()
        except OSError as error:
            self.problem = first_line(error)
        except BaseException as error:
            self.problem = repr(error)
            raise
        finally:
            self.is_over.set()


class Checkpoints:
    """A run's checkpoints. Every method is collective."""

    def __init__(
        self,
        folder: Path,
        *,
        policy: PolicyEngine,
        reference: ReferenceEngine | None = None,
        world: World,
        origin: Mapping[str, Any],
        versions: Mapping[str, str | None],
        keep: int = 2,
        keep_every: int | None = None,
        keep_best: str | None = None,
        background: bool = False,
    ) -> None:
        """Names the place; nothing is written yet.

        Args:
            folder: ``OUTPUT_DIR/checkpoints``, on a file system that all ranks share.
            policy: whose state is saved.
            reference: whose weights are saved, too, once they have moved.
            world: the ranks.
            origin: all that must be the same where the run goes on, by the run file's keys.
            versions: of the packages at work.
            keep: how many of the newest stay.
            keep_every: checkpoints of the steps that it divides stay, too.
            keep_best: name of the evaluation's mean whose best checkpoint stays, too: the lowest loss, or the highest
                of anything else.
            background: whether ``save`` copies this rank's part and lets a thread write it.
        """
        self.folder = folder
        self._policy = policy
        self._reference = reference
        self._world = world
        self._origin = origin
        self._versions = versions
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._background = background
        self._writing: _Writing | None = None

    def check_place(self, *, will_save: bool = True) -> None:
        """Tries out, before it matters, whether ranks can save there, and removes what killed saves have left.

        Args:
            will_save: whether the run saves even if nobody stops it; else too little space may turn out not to matter.

        Raises:
            UserError: the folder cannot be written, is not the same one on all nodes, or has too little space.
        """
        problem = None
        if self._world.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left_by_a_killed_save in self.folder.glob(f"*{_ASIDE}"):
                    shutil.rmtree(left_by_a_killed_save)
                problem = self._lack_of_space() if will_save else None
            except OSError as error:
                problem = self._unwritable(error)
        self._world.agree(problem)
        probe = self.folder / f".rank-{self._world.rank}"
        try:
            probe.touch()
        except FileNotFoundError:
            problem = _not_shared(f"rank {self._world.rank} does not see {self.folder}, which rank 0 has made")
        except OSError as error:
            problem = self._unwritable(error)
        self._world.agree(problem)
        if self._world.rank == 0:
            problem = self._unseen({self.folder / f".rank-{rank}": 0 for rank in range(self._world.size)})
        try:
            self._world.agree(problem)
        finally:
            with suppress(OSError):
                probe.unlink()
        self._world.barrier()
        if self._world.rank == 0:
            with suppress(OSError):  # it holds checkpoints
                self.folder.rmdir()

    def save(self, progress: Progress) -> None:
        """Saves all that a run needs to go on behind ``progress.step``; a checkpoint of that step is replaced.

        Gradients that wait for their step are not part of it. One that is still written in the background is completed
        first; this one may be in the background when the method returns.

        Raises:
            UserError: the files cannot be written, or rank 0 does not see every rank's; nothing half-written is left.
        """
        if not self._policy.is_restorable:
            raise UserError(
                f"nothing is saved in {self.folder}: the policy's ds_config offloads to nvme, from where DeepSpeed "
                "does not bring weights back; offload to cpu to be able to stop and go on"
            )
        self.finish()
        target = self.folder / f"step-{progress.step:08d}"
        aside = target.with_name(target.name + _ASIDE)
        weights, optimizer = self._policy.fingerprint(), self._policy.optimizer_fingerprint()
        problem = None
        if self._world.rank == 0:
            try:
                self._make_room_aside(aside)
                problem = self._lack_of_space()
            except OSError as error:
                problem = self._unwritable(error)
        self._agree(problem, aside)
        moved = self._moved()
        saved = Saved(
            progress,
            dict(self._origin),
            weights,
            optimizer,
            self._world.size,
            moved.fingerprint if moved else None,
            dict(self._versions),
        )
        # Not by save_file, whose files nobody else may read, whatever the user's umask.
        ours = {_random_file(self._world.rank): serialized(_random_state())}
        if moved:
            ours[file_of_reference(self._world.rank)] = moved.serialized()
        shards = self._policy.save(aside, later=self._background)
        self._writing = _Writing(aside, target, saved, partial(self._write, aside, shards, ours))
        if self._background:
            Thread(target=self._writing.work, name="checkpoint", daemon=True).start()
        else:
            self._writing.work()
            self.finish()

    def finish_if_written(self) -> None:
        """Completes a checkpoint that is written in the background, if all ranks' files are there by now.

        Raises:
            UserError: as ``save`` does.
        """
        if self._writing is not None:
            written = torch.tensor(float(self._writing.is_over.is_set()), device=self._world.device)
            if self._world.sum(written) == self._world.size:
                self.finish()

    def finish(self) -> None:
        """Completes the checkpoint that is written in the background, if there is one, and waits for it.

        Raises:
            UserError: as ``save`` does.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        writing.is_over.wait()
        aside = writing.aside
        self._agree(writing.problem and self._unwritable(writing.problem), aside)
        everything = {name: entry for part in self._world.gather(writing.files) for name, entry in part.items()}
        problem = None
        if self._world.rank == 0:
            try:
                problem = self._unseen({aside / name: size for name, (size, _) in everything.items()})
                if problem is None:
                    self._complete(aside, writing.target, writing.saved, everything)
                    self._prune()
            except OSError as error:
                problem = self._unwritable(error)
        self._agree(problem, aside)

    def _write(self, aside: Path, shards: Callable[[], str | None], ours: Mapping[str, bytes]) -> _Files:
        """Writes this rank's files and returns their sizes and checksums, once they are on the disk."""
        if problem := shards():
            raise OSError(problem)
        for name, content in ours.items():
            (aside / name).write_bytes(content)
        return {path.name: settled(path) for path in (*self._shards_in(aside), *(aside / name for name in ours))}

    def restore(self, candidates: Sequence[Path], *, allowed: Collection[str]) -> Progress:
        """Brings the policy, and every rank's random numbers, to where a checkpoint was saved.

        Args:
            candidates: complete checkpoints, in the order of preference; the first with sound contents is taken.
            allowed: keys of ``origin`` that may differ from the checkpoint's.

        Returns:
            How far the run had come. Of a checkpoint from elsewhere, without its record.

        Raises:
            UserError: all candidates are damaged, or the run has changed.
            RunError: what was loaded is not what was saved.
        """
        checkpoint = self._sound(candidates)
        saved = read_saved(checkpoint)
        check_origin(checkpoint, saved.origin, self._origin, allowed=allowed)
        problem = self._policy.load(checkpoint, saved_ranks=saved.world_size)
        moving = self._reference if saved.reference is not None else None
        if moving and problem is None:
            problem = moving.restore(checkpoint, saved_ranks=saved.world_size)
        problems = [named for named in self._world.gather(problem) if named]
        if problems:
            raise RunError(f"{checkpoint} cannot be loaded: {problems[0]}")
        if moving:
            moving.settle()
        for what, found, expected in (
            ("policy's weights", self._policy.fingerprint(), saved.weights),
            ("policy's masters, moments or steps", self._policy.optimizer_fingerprint(), saved.optimizer),
            ("reference's weights", moving and moving.fingerprint, moving and saved.reference),
        ):
            if found != expected:
                raise RunError(
                    f"{checkpoint} was loaded, but the {what} are not those that were saved: fingerprint "
                    f"{str(found)[:12]} in place of {str(expected)[:12]}; is the ds_config another one?"
                )
        # A rank beyond those that saved draws what another one does: nothing is drawn once dropout is off.
        _set_random_state(load_file(checkpoint / _random_file(self._world.rank % saved.world_size)))
        if saved.world_size != self._world.size and self._world.rank == 0:
            print(
                f"{checkpoint} was saved by {saved.world_size} ranks and is spread over {self._world.size}", flush=True
            )
        if checkpoint.parent.resolve() == self.folder.resolve():
            return saved.progress
        return replace(saved.progress, metrics_bytes=0, wandb_run_id=None)

    def _sound(self, candidates: Sequence[Path]) -> Path:
        damaged = []
        for checkpoint in candidates:
            files = sorted(_listed(checkpoint).items())
            mine = files[self._world.rank :: self._world.size]
            problem = next(_damages(checkpoint, dict(mine)), None)
            problems = [named for named in self._world.gather(problem) if named]
            if not problems:
                return checkpoint
            damaged.append(problems[0])
            if self._world.rank == 0:
                print(f"warning: {problems[0]}; this checkpoint is left out", flush=True)
        raise UserError(f"{damaged[0]}; put the file back, or name another output_dir to begin again")

    def _make_room_aside(self, aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def _moved(self) -> ReferenceEngine | None:
        return self._reference if self._reference and self._reference.has_moved else None

    def _shards_in(self, folder: Path) -> list[Path]:
        shards = [*folder.glob(f"*zero_pp_rank_{self._world.rank}_mp_rank_*.pt")]
        assert len(shards) == 2, f"DeepSpeed has written {[path.name for path in folder.iterdir()]}"
        return shards

    def _unseen(self, sizes: Mapping[Path, int]) -> str | None:
        deadline = time.monotonic() + _SEEN_WITHIN_S
        for path, size in sizes.items():
            while not (path.exists() and path.stat().st_size == size):
                if time.monotonic() > deadline:
                    return _not_shared(f"rank 0 does not see {path}, which another rank has written")
                time.sleep(0.2)
        return None

    def _complete(self, aside: Path, target: Path, saved: Saved, files: dict[str, tuple[int, str]]) -> None:
        (aside / _STATE).write_text(json.dumps(asdict(saved), indent=1) + "\n")
        files[_STATE] = settled(aside / _STATE)
        (aside / COMPLETE).write_text(json.dumps({"files": files}, indent=1) + "\n")
        settled(aside / COMPLETE)
        sync_folder(aside)
        if target.exists():
            self._remove(target)
        aside.rename(target)
        sync_folder(self.folder)

    def _prune(self) -> None:
        complete, _ = complete_checkpoints(self.folder)
        by_step = {step_of(path): path for path in complete}
        best = None
        if self._keep_best is not None:
            best = _best(by_step, self._keep_best)
        for step in surplus(by_step, keep=self._keep, keep_every=self._keep_every, best=best):
            self._remove(by_step[step])

    def _remove(self, checkpoint: Path) -> None:
        # Renamed first: one that is half removed is no checkpoint, and the next start clears it away.
        going = checkpoint.with_name(f"{checkpoint.name}.old{_ASIDE}")
        checkpoint.rename(going)
        shutil.rmtree(going)

    def _lack_of_space(self) -> str | None:
        # The weights themselves follow from the masters.
        each = self._policy.bytes_per_weight + (self._policy.dtype.itemsize if self._moved() else 0)
        needed = each * self._policy.trained_parameters + self._world.size * 2**20
        free = shutil.disk_usage(self.folder).free
        if free >= needed:
            return None
        return (
            f"a checkpoint needs about {needed / 2**30:.1f} GiB in {self.folder}, where {free / 2**30:.1f} GiB are "
            "free; make room, lower checkpoint.keep, or name another output_dir"
        )

    def _unwritable(self, error: object) -> str:
        return f"checkpoints cannot be saved in {self.folder}: {error}; make it writable, or name another output_dir"

    def _agree(self, problem: str | None, aside: Path) -> None:
        try:
            self._world.agree(problem)
        except UserError:
            if self._world.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise


def _not_shared(symptom: str) -> str:
    return f"output_dir must be on a file system that all ranks share: {symptom}"


def _listed(checkpoint: Path) -> dict[str, tuple[int, str]]:
    listed = json.loads((checkpoint / COMPLETE).read_text())["files"]
    return {name: (size, digest) for name, (size, digest) in listed.items()}


def _damages(checkpoint: Path, files: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    for name, entry in files.items():
        try:
            if measured(checkpoint / name) != entry:
                yield f"{checkpoint / name} is damaged: its checksum is not the one that it was saved with"
        except OSError as error:
            yield f"{checkpoint / name} cannot be read: {error}"


def _best(checkpoints: Mapping[int, Path], name: str) -> int | None:
    evaluations = {step: read_saved(path).progress.evaluation for step, path in checkpoints.items()}
    known = {step: means[name] for step, means in evaluations.items() if means is not None}
    sign = -1 if name == "loss" else 1
    return max(known, key=lambda step: (sign * known[step], step), default=None)


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.safetensors"


def _random_state() -> dict[str, torch.Tensor]:
    _, keys, position, *_ = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state().cpu(),
        "numpy": torch.tensor([*map(int, keys), int(position)]),
        "python": torch.tensor(random.getstate()[1]),
    }


def _set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    get_accelerator().set_rng_state(state["device"])
    *keys, position = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    random.setstate((3, tuple(state["python"].tolist()), None))
