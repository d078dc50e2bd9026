"""The one way in which a model, policy or reference, scores responses. It does not know whether it is sharded."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_ds.data.batch import PairBatch
from dpo_ds.logps import chunked_target_logps, sum_by_response, target_logps
from dpo_ds.models.causal_lm import head_of

LOGIT_CHUNK_BYTES = 2**27
"""Size of the float32 logits that may exist at a time."""


class Scorer(nn.Module):
    """A causal language model that returns the log-probs of responses, and never its logits.

    All that touches a parameter happens inside ``forward``, where a sharded engine's hooks see it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Wraps a model.

        Args:
            model: a causal language model with a linear head.

        Raises:
            UserError: the model has no linear head.
        """
        super().__init__()
        self.model = model
        self.head = head_of(model)
        self._chunk_tokens = max(4, LOGIT_CHUNK_BYTES // (4 * model.config.get_text_config().vocab_size))

    def forward(self, batch: PairBatch) -> Tensor:
        """Returns ``(2, pairs)``: the summed log-probs of the chosen (row 0) and of the rejected responses (row 1)."""
        # No attention mask: with padding to the right, causal attention keeps it out of every scored position, and
        # without a mask the attention kernels take their fast path.
        hidden = self.model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        logps = chunked_target_logps(
            hidden.flatten(0, 1)[batch.predicted_at], batch.targets, head=self.head, chunk_tokens=self._chunk_tokens
        )
        return sum_by_response(logps, batch.response_of, responses=len(batch.response_tokens)).view(2, -1)

    @torch.no_grad()
    def differs_from_its_model(self, batch: PairBatch) -> float:
        """Returns the largest difference, per token, between these log-probs and those of the model's own logits.

        A head with a step that ``Head`` does not know (a scale, a cap, a bias) shows here.
        """
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.predicted_at]
        sums = sum_by_response(
            target_logps(logits, batch.targets), batch.response_of, responses=len(batch.response_tokens)
        )
        per_token = (self(batch).flatten() - sums) / batch.response_tokens
        return float(per_token.abs().max())
