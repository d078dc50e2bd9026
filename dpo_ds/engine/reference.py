"""The reference: a second, inference-only ZeRO-3 engine with its own weights and config, frozen and proven so.

Where an adapter trains, it may also be what the policy's engine computes without it.
"""

import gc
from collections.abc import Mapping
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from dpo_ds.data.batch import PairBatch
from dpo_ds.engine.policy import PolicyEngine
from dpo_ds.engine.shards import ZeroParameter, fingerprint, register_modules
from dpo_ds.engine.world import World
from dpo_ds.errors import RunError
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
        raise RunError(f"the reference has moved: fingerprint {start[:12]} at the start, {now[:12]} now")


class ReferenceEngine:
    """Scores pairs with weights that never move. Every method is collective."""

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
