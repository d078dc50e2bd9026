"""The policy: the engine that trains."""

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor

from dpo_ds.data.batch import PairBatch
from dpo_ds.engine.extensions import keeps_optimizer_on_host
from dpo_ds.engine.shards import ZeroParameter, fingerprint, register_modules
from dpo_ds.engine.world import World
from dpo_ds.models.scorer import Scorer


class PolicyEngine:
    """Scores pairs with gradients, accumulates over micro-batches, and steps. Every method is collective."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        ds_config: Mapping[str, Any],
        world: World,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Builds the engine with AdamW over all parameters, the learning rate set by every ``step``.

        Args:
            scorer: wraps a model whose weights are sharded already.
            ds_config: resolved DeepSpeed config.
            world: the ranks.
            betas: AdamW's decay rates.
            eps: AdamW's epsilon.
            weight_decay: decoupled decay of matrices; vectors (biases, norms) do not decay.
        """
        register_modules(scorer)
        parameters: list[ZeroParameter] = list(scorer.parameters())
        groups = [
            {"params": [p for p in parameters if len(p.ds_shape) > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if len(p.ds_shape) <= 1], "weight_decay": 0.0},
        ]
        optimizer = _adamw(
            [g for g in groups if g["params"]],
            on_host=keeps_optimizer_on_host(ds_config),
            device=world.device,
            betas=betas,
            eps=eps,
        )
        self.engine, self._optimizer, *_ = deepspeed.initialize(
            model=scorer, optimizer=optimizer, config=dict(ds_config)
        )
        self._world = world
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
        """Returns how many parameters multiply every token, how many the head has, and ``StepCost.attention``."""
        model = self.model.model
        head: ZeroParameter = self.model.head.weight
        parameters: list[ZeroParameter] = list(model.parameters())
        lookups = {id(model.get_input_embeddings().weight), id(head)}
        config = model.config.get_text_config()
        attention = 2 * config.num_hidden_layers * config.hidden_size
        return sum(p.ds_numel for p in parameters if id(p) not in lookups), head.ds_numel, attention

    def fingerprint(self) -> str:
        """Returns the digest of the weights as they are now."""
        return fingerprint(self.model, self._world)


def _adamw(
    groups: list[dict[str, Any]], *, on_host: bool, device: torch.device, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    if on_host:
        # Updates masters and states where they are kept, in host memory.
        optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
            groups, lr=0.0, betas=betas, eps=eps, adamw_mode=True
        )
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=device.type in ("cuda", "cpu"))
