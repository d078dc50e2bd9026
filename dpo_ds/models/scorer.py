"""The one way in which a model, policy or reference, scores responses. It does not know whether it is sharded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_ds.data.batch import PairBatch, packed_batch, padded_batch, part_of_rows
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.errors import UserError
from dpo_ds.logps import chunked_target_logps, sum_by_response, target_logps
from dpo_ds.models.attention import share_prompts, shares_prompts, sharing_prompts, why_not_packable
from dpo_ds.models.causal_lm import head_of
from dpo_ds.models.routing import routing_loss
from dpo_ds.models.row_parts import RowParts
from dpo_ds.models.tiles import tile_mlps, why_not_tileable

LOGIT_CHUNK_BYTES = 2**23
"""Size of the float32 logits that may exist at a time."""

GPU_LOGIT_CHUNK_BYTES = 2**26
"""The same on a GPU, where each chunk starts a dozen kernels."""

KEPT_LOGIT_BYTES = 2**27
"""Size of the logits, in the weights' dtype, that stay from forward to backward; more are computed again."""


class Scorer(nn.Module):
    """A causal language model that returns the log-probs of responses, and never its logits.

    All that touches a parameter happens inside ``forward``, where a sharded engine's hooks see it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        balances_experts: bool = False,
        measures_entropy: bool = False,
        logit_chunk_bytes: int | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: a causal language model with a linear head.
            balances_experts: whether a forward with gradients leaves its ``routing_loss``, too.
            measures_entropy: whether a forward leaves its ``entropies``, too.
            logit_chunk_bytes: size of the float32 logits that may exist at a time; None: as suits the device.

        Raises:
            UserError: the model has no linear head.
        """
        super().__init__()
        self.model = model
        self.head = head_of(model)
        self.balances_experts = balances_experts
        self.routing_loss: Tensor | None = None
        """Of the last forward."""
        self.measures_entropy = measures_entropy
        self.entropies: Tensor | None = None
        """``(2, pairs)``, of the last forward: mean entropy, in nats, of the distributions of a response's tokens."""
        self.logit_chunk_bytes = logit_chunk_bytes
        self.row_parts: RowParts | None = None
        """Who shares rows with this rank; None: nobody, it computes whole ones."""

    def forward(self, batch: PairBatch) -> Tensor:
        """Returns ``(2, pairs)``: the summed log-probs of the chosen (row 0) and of the rejected responses (row 1)."""
        if self.row_parts is not None:
            batch = part_of_rows(batch, part=self.row_parts.part, parts=self.row_parts.parts)
        # No attention mask: with padding to the right, causal attention keeps it out of every scored position, and
        # without a mask the attention kernels take their fast path.
        balances = {"output_router_logits": True} if self.balances_experts and torch.is_grad_enabled() else {}
        outputs = self.model.base_model(**self._inputs(batch), **balances)
        if balances:
            row = batch.input_ids.shape[1]
            self.routing_loss = routing_loss(self.model, outputs.router_logits, batch.lengths, row=row)
        hidden = outputs.last_hidden_state
        of_device = LOGIT_CHUNK_BYTES if hidden.device.type == "cpu" else GPU_LOGIT_CHUNK_BYTES
        logps, entropies = chunked_target_logps(
            hidden.flatten(0, 1)[batch.predicted_at],
            batch.targets,
            weight=self.head.weight,
            bias=self.head.bias,
            logits=self.head.logits,
            slope=self.head.slope,
            chunk_bytes=self.logit_chunk_bytes or of_device,
            kept_bytes=KEPT_LOGIT_BYTES,
            wants_entropies=self.measures_entropy,
        )
        if entropies is not None:
            self.entropies = self._by_response(entropies, batch) / batch.response_tokens.view(2, -1)
        if batch.token_weights is not None:
            logps = logps * batch.token_weights
        return self._by_response(logps, batch)

    def _by_response(self, values: Tensor, batch: PairBatch) -> Tensor:
        """Returns ``(2, pairs)``: the sums of scored tokens' values."""
        sums = sum_by_response(values, batch.response_of, responses=len(batch.response_tokens))
        if self.row_parts is not None:
            sums = self.row_parts.sum(sums)
        return sums.float().view(2, -1)

    def _inputs(self, batch: PairBatch) -> dict[str, Any]:
        layout: dict[str, Any] = {"position_ids": batch.position_ids} if batch.position_ids is not None else {}
        layout |= {"spans": batch.spans} if batch.spans else {}
        layout |= {"row_parts": self.row_parts} if self.row_parts is not None else {}
        return {"input_ids": batch.input_ids, "use_cache": False, **layout}

    def computes_as(self, other: "Scorer") -> None:
        """Takes over another scorer's attention, and who shares its rows."""
        if shares_prompts(other.model):
            share_prompts(self.model)
        self.row_parts = other.row_parts

    @torch.no_grad()
    def differs_from_its_model(self, batch: PairBatch) -> float:
        """Returns the largest difference, per token, between these log-probs and those of the model's own logits.

        A head with a step that ``Head`` does not know (a scale, a cap, a bias) shows here.
        """
        logits = self.model(**self._inputs(batch)).logits.flatten(0, 1)[batch.predicted_at]
        sums = sum_by_response(
            target_logps(logits, batch.targets), batch.response_of, responses=len(batch.response_tokens)
        )
        per_token = (self(batch).flatten() - sums.float()) / batch.response_tokens
        return float(per_token.abs().max())

    @torch.no_grad()
    def differs_when_packed(self, pairs: Sequence[TokenizedPair], *, device: torch.device) -> float:
        """Returns the largest difference, per token, between packed scoring and scoring each response alone.

        The latter runs on the model's own attention. A model whose tokens reach each other by another way than
        attention, whose positions are not given by ``position_ids``, or whose attention ignores the pairs' borders
        shows here.

        Args:
            pairs: at least two, of unlike lengths; the same on every rank.
            device: of the model.

        Raises:
            UserError: the attention wants something that packed pairs cannot have.
        """
        alone = padded_batch(pairs).to(device)
        expected = self(alone)
        with sharing_prompts(self.model):
            packed = self(packed_batch(pairs).to(device))
        return float(((packed - expected).flatten() / alone.response_tokens).abs().max())

    def why_not_packed(self, pairs: Sequence[TokenizedPair], *, bound: float, device: torch.device) -> str | None:
        """Returns why pairs cannot share rows in this model, None where the pairs prove that they can.

        Args:
            pairs: at least two, of unlike lengths; the same on every rank.
            bound: largest difference per token that may come from rounding.
            device: of the model.
        """
        reason = why_not_packable(self.model)
        if reason is not None:
            return reason
        try:
            difference = self.differs_when_packed(pairs, device=device)
        except UserError as error:
            return str(error)
        if difference <= bound:
            return None
        return (
            f"{type(self.model).__name__} scores packed pairs unlike single ones "
            f"(log-probs differ by {difference:.2g} a token, bound {bound:g})"
        )

    @torch.no_grad()
    def why_not_tiled(self, batch: PairBatch, *, tokens: int, bound: float) -> str | None:
        """Returns why this model's MLPs cannot take few tokens at a time, None where they do from now on.

        Args:
            batch: which proves that it makes no difference.
            tokens: that an MLP takes at a time.
            bound: largest difference per token that may come from rounding.
        """
        reason = why_not_tileable(self.model)
        if reason is not None:
            return reason
        expected = self(batch)
        tile_mlps(self.model, tokens=min(tokens, batch.input_ids.shape[-1] // 2))
        difference = float(((self(batch) - expected).flatten() / batch.response_tokens).abs().max())
        tile_mlps(self.model, tokens=tokens)
        if difference <= bound:
            return None
        return (
            f"{type(self.model).__name__} scores otherwise when its MLPs take few tokens at a time (log-probs differ "
            f"by {difference:.2g} a token, bound {bound:g})"
        )

    @torch.no_grad()
    def why_not_split(self, batch: PairBatch, row_parts: RowParts, *, bound: float) -> str | None:
        """Returns why several ranks cannot share this model's rows, None where a batch proves that they can.

        A model whose tokens reach each other by another way than attention shows here. Collective among those ranks.

        Args:
            batch: in the layout that will be trained on; the same on all of them.
            row_parts: who they are.
            bound: largest difference per token that may come from rounding.
        """
        try:
            expected = self(batch)
            self.row_parts = row_parts
            difference = (self(batch) - expected).flatten() / batch.response_tokens
        except UserError as error:
            return str(error)
        finally:
            self.row_parts = None
        worst = float(difference.abs().max())
        if worst <= bound:
            return None
        return (
            f"{type(self.model).__name__} scores rows that ranks share unlike whole ones "
            f"(log-probs differ by {worst:.2g} a token, bound {bound:g})"
        )
