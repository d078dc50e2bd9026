"""The policy: the engine that trains."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dpo_ds.data.batch import PairBatch
from dpo_ds.engine.extensions import keeps_optimizer_on_host
from dpo_ds.engine.optimizers import TESTED, OptimizerSettings, build_optimizer
from dpo_ds.engine.reshape import ReshapingReader
from dpo_ds.engine.shards import Shard, ZeroParameter, fingerprint, fingerprint_of, register_modules
from dpo_ds.engine.world import World
from dpo_ds.errors import first_line
from dpo_ds.models.causal_lm import products
from dpo_ds.models.scorer import Scorer


class PolicyEngine:
    """Scores pairs with gradients, accumulates over micro-batches, and steps. Every method is collective."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        ds_config: Mapping[str, Any],
        world: World,
        optimizer: OptimizerSettings,
    ) -> None:
        """Builds the engine with an optimizer of all parameters that train, its learning rate set by every ``step``.

        Args:
            scorer: wraps a model whose weights are sharded already.
            ds_config: resolved DeepSpeed config.
            world: the ranks.
            optimizer: which, with its numbers; of weights only matrices decay, no biases and norms.
        """
        register_modules(scorer)
        parameters: list[ZeroParameter] = [p for p in scorer.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if len(p.ds_shape) > 1], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in parameters if len(p.ds_shape) <= 1], "weight_decay": 0.0},
        ]
        updates = build_optimizer(
            optimizer,
            [group for group in groups if group["params"]],
            on_host=keeps_optimizer_on_host(ds_config),
            device=world.device,
        )
        self.engine, self._optimizer, *_ = deepspeed.initialize(
            model=scorer, optimizer=updates, config={**ds_config, **TESTED}
        )
        self._states = optimizer.states
        self.bytes_per_weight = optimizer.bytes_per_weight
        self._world = world
        self.is_restorable = not swaps_to_files(ds_config)
        model_dtype, accumulation_dtype = self.engine.get_data_types()
        assert not self.engine.managed_gradient_accumulation()
        assert accumulation_dtype is torch.float32
        self.dtype: torch.dtype = model_dtype

    @property
    def model(self) -> Scorer:
        """The scorer inside the engine."""
        scorer: Scorer = self.engine.module
        return scorer

    def score(self, batch: PairBatch) -> Tensor:
        """Returns ``(2, pairs)``: summed log-probs of the chosen and of the rejected responses."""
        logps: Tensor = self.engine(batch)
        return logps

    @property
    def routing_loss(self) -> Tensor | None:
        """The load-balancing loss of what was scored last, with gradients; None unless the scorer balances experts."""
        return self.model.routing_loss

    @property
    def entropies(self) -> Sequence[Tensor]:
        """The mean entropies of the chosen and of the rejected responses scored last; none unless they are measured."""
        return () if self.model.entropies is None else tuple(self.model.entropies)

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradients to the step's.

        Args:
            loss: this micro-batch's share of the step's loss: the sum over its pairs / the step's pairs on all ranks.
        """
        # DeepSpeed averages gradients over ranks where the loss wants their sum.
        self.engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, *, learning_rate: float) -> float:
        """Updates the weights from the gradients since the last step.

        Returns:
            The gradients' norm over all ranks, before clipping.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def products(self) -> tuple[int, int, int]:
        """Returns what ``StepCost`` takes: ``causal_lm.products`` of the sharded model."""
        return products(self.model.model, attrgetter("ds_numel"))

    @property
    def trained_parameters(self) -> int:
        """How many train, over all ranks."""
        return sum(parameter.ds_numel for _, parameter in self._trained())

    def _trained(self) -> list[tuple[str, ZeroParameter]]:
        return sorted((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def fingerprint(self) -> str:
        """Returns the digest of the weights as they are now, as ``shards.fingerprint`` says."""
        return fingerprint(self.model, self._world)

    def optimizer_fingerprint(self) -> str:
        """Returns the digest of masters, moments and steps: of every bit and its place, not of the number of ranks."""
        # Lion counts none.
        steps = [int(state.get("step", 0)) for state in self.engine.basic_optimizer.state.values()]
        # Before the first step there are masters alone.
        names = (None, *self._states) if steps else (None,)
        sums = [fingerprint_of(self._optimizer_shards(name), self._world) for name in names]
        return hashlib.sha256(repr((sorted(set(steps)), sums)).encode()).hexdigest()

    def _optimizer_shards(self, name: str | None) -> Iterator[Shard]:
        for _, parameter in self._trained():
            values = (
                safe_get_local_fp32_param(parameter)
                if name is None
                else safe_get_local_optimizer_state(parameter, name)
            )
            start = min(len(values) * self._world.rank, parameter.ds_numel)
            yield Shard(values[: parameter.ds_numel - start], start, parameter.ds_numel)

    def save(self, folder: Path, *, later: bool = False) -> Callable[[], str | None]:
        """Writes this rank's part of weights, masters and optimizer states into a folder; collective.

        Args:
            folder: where the files go.
            later: whether they are copied in host memory now, and written when what is returned is called.

        Returns:
            What finishes this rank's files, alone, in any thread, and tells why they could not be written, or None.
        """
        # The last forward has asked for weights of a backward that never came.
        self.engine.empty_partition_cache()
        writer = _Writer(self.engine.checkpoint_engine, later=later)
        self.engine.checkpoint_engine = writer
        # Programs to read the shards with have no place among data, and rank 0 alone would fail to write them.
        self.engine._copy_recovery_script = lambda path: None
        # What does not train is in the model's own files, and the fingerprint proves that it is the same.
        self.engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True
        )
        self.engine.checkpoint_engine = writer.engine
        return writer.finish

    def load(self, folder: Path, *, saved_ranks: int) -> str | None:
        """Reads what ``save`` wrote; code that the files may hold is not executed.

        Args:
            folder: the same.
            saved_ranks: how many wrote there.

        Returns:
            Why this rank's files cannot be loaded, or None.
        """
        self.engine.empty_partition_cache()
        optimizer = self.engine.basic_optimizer
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        try:
            with _reading_without_executing(), self._reading_shards_of(saved_ranks, folder):
                is_whole = all(parameter.requires_grad for parameter in self.model.parameters())
                path, _ = self.engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=is_whole)
        except (LookupError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
            return first_line(error)
        # The run's numbers hold, not the file's; one on the host has others than one on the device.
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        if isinstance(optimizer, deepspeed.ops.adam.DeepSpeedCPUAdam):
            for state in optimizer.state.values():
                state["step"] = int(state["step"])  # torch's is a tensor
            _count_steps_again(optimizer)
        return None if path else f"DeepSpeed finds nothing in {folder}"

    @contextmanager
    def _reading_shards_of(self, saved_ranks: int, folder: Path) -> Iterator[None]:
        if saved_ranks == self._world.size:
            yield
            return
        reader = self.engine.checkpoint_engine
        self.engine.checkpoint_engine = ReshapingReader(
            self.engine.optimizer, rank=self._world.rank, ranks=self._world.size, saved_ranks=saved_ranks
        )
        # It would look for this rank's file, of which there may be none.
        names = [str(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")]
        self.engine._get_all_ckpt_names = lambda folder, tag: names
        try:
            yield
        finally:
            self.engine.checkpoint_engine = reader
            del self.engine._get_all_ckpt_names


def _count_steps_again(optimizer: torch.optim.Optimizer) -> None:
    # DeepSpeed's optimizer in host memory keeps the powers of its betas as running products, which no checkpoint holds;
    # computed at once they round otherwise.
    steps = int(next(iter(optimizer.state.values()))["step"])
    counter = torch.nn.Parameter(torch.zeros(1))
    counter.grad = torch.zeros(1)
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[0], "params": [counter]}]
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups = groups
    del optimizer.state[counter]


class _Writer:
    """DeepSpeed's own writer, whose failures are noted: a rank that raised would leave the others in a collective."""

    def __init__(self, engine: Any, *, later: bool) -> None:
        self.engine = engine
        self._later = later
        self._copies: list[tuple[Any, str]] = []
        self._problem: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        if self._later:
            copy = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state_dict)
            self._copies.append((copy, path))
        else:
            self._write(state_dict, path)

    def finish(self) -> str | None:
        while self._copies:
            self._write(*self._copies.pop(0))
        return self._problem

    def _write(self, state_dict: Any, path: str) -> None:
        try:
            self.engine.save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self._problem = first_line(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@contextmanager
def _reading_without_executing() -> Iterator[None]:
    # DeepSpeed asks for full unpickling; torch lets the environment overrule it. Two plain classes are in its files.
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum]):
            yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def swaps_to_files(ds_config: Mapping[str, Any]) -> bool:
    """Returns whether DeepSpeed keeps weights or optimizer states in files of its own, which it does not restore."""
    sections = [ds_config["zero_optimization"].get(name) or {} for name in ("offload_optimizer", "offload_param")]
    return any(section.get("device") == "nvme" for section in sections)
