"""The reference: a second, inference-only ZeRO-3 engine with its own weights and config, frozen and proven so.

Where an adapter trains, it may also be what the policy's engine computes without it.
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dpo_ds.data.batch import PairBatch
from dpo_ds.engine.policy import PolicyEngine
from dpo_ds.engine.shards import Shard, ZeroParameter, fingerprint, register_modules, shard_of
from dpo_ds.engine.world import World
from dpo_ds.errors import RunError, UserError, first_line
from dpo_ds.models.adapters import as_reference
from dpo_ds.models.scorer import Scorer


class Reference(Protocol):
    """What scores pairs with weights that never move. Every method is collective."""

    fingerprint: str

    @property
    def model(self) -> Scorer: ...

    def score(self, batch: PairBatch) -> Tensor: ...

    def check(self) -> None: ...

    def free(self) -> None: ...


class AdapterReference:
    """Scores pairs with what the policy's adapter began with: no second engine, no second copy of the weights."""

    def __init__(self, policy: PolicyEngine, *, world: World) -> None:
        """Takes the fingerprint.

        Args:
            policy: whose model has an adapter.
            world: the ranks.
        """
        self._policy, self._world = policy, world
        self.fingerprint = self._now()

    @property
    def model(self) -> Scorer:
        """The policy's scorer."""
        return self._policy.model

    @torch.no_grad()
    def score(self, batch: PairBatch) -> Tensor:
        """Returns ``(2, pairs)``: summed log-probs of the chosen and of the rejected responses."""
        with as_reference(self.model):
            return self._policy.score(batch)

    def check(self) -> None:
        """Proves that the reference is still what it was.

        Raises:
            RunError: a weight of the base, or of the adapter's frozen copy, has moved.
        """
        _check_fingerprint(self._now(), self.fingerprint)

    def free(self) -> None:
        """Has no memory of its own to give back."""

    def _now(self) -> str:
        with as_reference(self.model):
            return fingerprint(self.model, self._world)


def _check_fingerprint(now: str, start: str) -> None:
    if now != start:
        raise RunError(f"the reference has moved: fingerprint {start[:12]} before, {now[:12]} now")


class ReferenceEngine:
    """Scores pairs with weights that never move by themselves. Every method is collective, unless it says so."""

    def __init__(self, scorer: Scorer, *, ds_config: Mapping[str, Any], world: World) -> None:
        """Builds the engine.

        Args:
            scorer: wraps a model whose weights are sharded already, from files: never a copy of the policy's.
            ds_config: resolved DeepSpeed config without an optimizer.
            world: the ranks.
        """
        scorer.requires_grad_(False).eval()
        register_modules(scorer)
        # Without an optimizer DeepSpeed keeps no gradients, no masters and no states: parameter sharding and its hooks.
        self.engine, *_ = deepspeed.initialize(model=scorer, config=dict(ds_config))
        self._world = world
        self.fingerprint = fingerprint(scorer, world)
        self.has_moved = False

    @property
    def model(self) -> Scorer:
        """The scorer inside the engine."""
        scorer: Scorer = self.engine.module
        return scorer

    @torch.no_grad()
    def score(self, batch: PairBatch) -> Tensor:
        """Returns ``(2, pairs)``: summed log-probs of the chosen and of the rejected responses."""
        logps: Tensor = self.engine(batch)
        return logps

    def check(self) -> None:
        """Proves that the reference is still what it was.

        Raises:
            RunError: a weight has moved, or is trainable, or the model is in training mode.
        """
        if self.model.training or any(parameter.requires_grad for parameter in self.model.parameters()):
            raise RunError("the reference is not frozen: a parameter asks for gradients or the model is in train mode")
        _check_fingerprint(fingerprint(self.model, self._world), self.fingerprint)

    def check_it_can_follow(self, policy: PolicyEngine) -> None:
        """Checks that each of its shards has its like among the policy's.

        Raises:
            UserError: it has not.
        """
        theirs: dict[str, ZeroParameter] = dict(policy.model.named_parameters())
        mine: dict[str, ZeroParameter] = dict(self.model.named_parameters())
        problem = None
        if {name: p.ds_shape for name, p in mine.items()} != {name: p.ds_shape for name, p in theirs.items()}:
            problem = "its parameters are not the policy's, by name and shape"
        for parameter in (*mine.values(), *theirs.values()):
            shard = parameter.ds_tensor
            if shard.final_location is not None or parameter.ds_secondary_tensor is not None:
                problem = "a ds_config keeps shards in files, or twice (hpZ)"
            elif shard.dtype != parameter.dtype:
                problem = "a ds_config quantizes shards"
        if problem:
            raise UserError(
                f"reference.sync_every must be null: the reference cannot follow the policy, since {problem}"
            )

    @torch.no_grad()
    def follow(self, policy: PolicyEngine, *, weight: float) -> None:
        """Moves every weight part of the way to the policy's: ``weight * policy + (1 - weight) * reference``.

        TR-DPO's soft update, with 1 its hard one: Gorbatovski et al. 2024, section 3, arXiv:2404.09656. Each rank moves
        its own shards, without communication. The sum is taken in float32 and rounded to the dtype of the weights: a
        ``weight`` up to 0.5 leaves one alone that is less than ``1 / (2 * weight)`` rounding steps away.

        Args:
            policy: of the same architecture; ``check_it_can_follow`` has agreed.
            weight: in (0, 1].

        Raises:
            RunError: the reference has moved in another way.
        """
        self.check()
        # Small parameters, too, are whole on no rank then, so that their shards are all that there is of them.
        policy.engine.empty_partition_cache()
        self.engine.empty_partition_cache()
        theirs: dict[str, ZeroParameter] = dict(policy.model.named_parameters())
        mine: dict[str, ZeroParameter] = dict(self.model.named_parameters())
        for name, parameter in mine.items():
            target = theirs[name].ds_tensor.data.to(parameter.ds_tensor.device)
            shard = parameter.ds_tensor.data
            shard.copy_(torch.lerp(shard.float(), target.float(), weight))
        self.settle()

    def serialized(self) -> bytes:
        """Returns this rank's shards, as safetensors."""
        self.engine.empty_partition_cache()
        return save({name: shard.values.clone().cpu() for name, shard in self._shards()})

    def restore(self, folder: Path, *, saved_ranks: int) -> str | None:
        """Takes this rank's shards out of what ``serialized`` returned on each of the ranks that saved; not collective.

        ``settle`` comes next, once all ranks have theirs.

        Args:
            folder: with a file of each of them, ``file_of_reference(rank)``.
            saved_ranks: how many there were.

        Returns:
            Why it does not work, or None.
        """
        self.engine.empty_partition_cache()
        files = [folder / file_of_reference(rank) for rank in range(saved_ranks)]
        try:
            for name, shard in self._shards():
                part = -(-shard.whole // saved_ranks)
                first, last = shard.start // part, -(-(shard.start + len(shard.values)) // part)
                pieces = [_tensor(files[rank], name) for rank in range(first, last)]
                if pieces:
                    start = shard.start - first * part
                    shard.values.copy_(torch.cat(pieces)[start : start + len(shard.values)])
        except (OSError, RuntimeError, SafetensorError) as error:
            return first_line(error)
        return None

    def settle(self) -> None:
        """Takes the fingerprint of weights that have moved."""
        self.fingerprint = fingerprint(self.model, self._world)
        self.has_moved = True

    def _shards(self) -> list[tuple[str, Shard]]:
        return [(name, shard_of(parameter)) for name, parameter in self.model.named_parameters()]

    def free(self) -> None:
        """Gives the weights' memory back to the machine; nothing can be scored any more."""
        self.engine.destroy()
        # DeepSpeed's own records outlive the engine, and with them every shard that is not emptied.
        parameters: list[ZeroParameter] = list(self.model.parameters())
        for parameter in parameters:
            for held in (parameter, parameter.ds_tensor, parameter.ds_secondary_tensor):
                if held is not None:
                    held.data = held.data.new_empty(0)
        gc.collect()
        get_accelerator().empty_cache()
        self._world.trim_memory()


def file_of_reference(rank: int) -> str:
    """Returns the name of the file in a checkpoint that holds a rank's shards of a reference that has moved."""
    return f"reference-{rank:05d}.safetensors"


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor
