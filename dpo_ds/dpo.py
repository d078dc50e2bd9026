"""``DPO``: one pretrained module in one process, in plain PyTorch.

No ranks, no sharding, no data format: token ids and masks come in, a loss goes out. A model partitioned by ZeRO-3
belongs to the engines.
"""

from collections.abc import Iterator
from copy import deepcopy
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_ds.dropout import disable_dropout
from dpo_ds.logps import sum_by_response, target_logps
from dpo_ds.losses import LOSSES, Objective, PairLogps, Reduction


class PreferenceMetrics(NamedTuple):
    """What a batch says of the policy before its update; every field is detached and ``(batch,)``.

    The margin is the chosen reward less the rejected one, the accuracy 1 where it is positive, 0.5 where it is 0.
    """

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    accuracies: Tensor
    margins: Tensor


class DPO(nn.Module):
    """Direct Preference Optimization of a pretrained causal language model, Rafailov et al. 2023, arXiv:2305.18290.

    The module given is trained in place as ``policy_model``; ``ref_model`` is its frozen copy, made now, which stays in
    evaluation mode. Dropout is switched off in both, so that the loss starts at its analytic value (ln 2 for sigmoid).

    ``parameters()`` and ``named_parameters()`` are the policy's alone, so that an optimizer over them leaves the
    reference as it is. ``state_dict()`` holds both models, as a resumed run needs the reference it started from: build
    the wrapper around any module of the same shape, then load it. ``policy_model.state_dict()`` is the trained model.

    Example:
        >>> dpo = DPO(model, beta=0.1, pad_id=0)
        >>> optimizer = torch.optim.AdamW(dpo.parameters(), lr=5e-7)
        >>> loss = dpo(preferred_seq, unpreferred_seq, prompt_mask=prompt_mask)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 0.1,
        pad_id: int | None = None,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        reduction: Reduction | None = None,
    ) -> None:
        """Wraps a pretrained model.

        Args:
            model: causal; maps token ids ``(batch, seq)`` to logits ``(batch, seq, vocab)`` or to an object with
                ``.logits``, such as an x-transformers ``TransformerWrapper`` or a Hugging Face causal LM.
            beta: strength of the pull towards the reference, > 0.
            pad_id: the token that fills sequences up to the right. Where no mask is given, the run of it that ends a
                row is padding; inside a row it is a real token. If it also ends real sequences (EOS as padding), that
                last token would be taken for padding too, so give the masks.
            loss_type: a key of ``dpo_ds.losses.LOSSES``.
            label_smoothing: probability that a label is wrong, in [0, 0.5).
            reduction: whether a response's log-prob is the ``"sum"`` over its tokens, as in the paper, or their
                ``"mean"``; None takes the loss's own, which is the sum for sigmoid.

        Raises:
            ValueError: an option is out of range or not one of the loss's, or the model is partitioned by ZeRO-3.
        """
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta must be > 0, got {beta}")
        if loss_type not in LOSSES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}, got {loss_type!r}")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        if LOSSES[loss_type].running:
            raise ValueError(
                f"loss_type must be a loss without a running mean, which is not kept here, got {loss_type!r}"
            )
        if reduction not in (None, "sum", "mean"):
            raise ValueError(f"reduction must be 'sum', 'mean' or None, got {reduction!r}")
        partitioned = [name for name, parameter in model.named_parameters() if hasattr(parameter, "ds_id")]
        if partitioned:
            raise ValueError(
                f"model must hold its own weights, but ZeRO-3 has partitioned {len(partitioned)} of its parameters "
                f"({partitioned[0]}, ...) and a copy of them would be empty: build the policy's and the reference's "
                "engines with dpo_ds.initialize"
            )
        self.objective = Objective(loss_type, beta, label_smoothing, reduction)
        self.pad_id = pad_id
        disable_dropout(model)
        self.policy_model = model
        self.ref_model = _copy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "DPO":
        """Sets the policy's mode; the reference stays in evaluation mode."""
        super().train(mode)
        self.ref_model.eval()
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the policy's parameters under the names of ``state_dict()``; ``parameters()`` is built on this.

        As in any module, ``recurse=False`` leaves out the parameters of submodules, here all.
        """
        if recurse:
            prefix = f"{prefix}.policy_model" if prefix else "policy_model"
            yield from self.policy_model.named_parameters(prefix, remove_duplicate=remove_duplicate)

    def forward(
        self,
        preferred_seq: Tensor,
        unpreferred_seq: Tensor,
        *,
        prompt_mask: Tensor,
        preferred_seq_mask: Tensor | None = None,
        unpreferred_seq_mask: Tensor | None = None,
        unpreferred_prompt_mask: Tensor | None = None,
        return_metrics: bool = False,
    ) -> Tensor | tuple[Tensor, PreferenceMetrics]:
        """Returns the mean loss of a batch of pairs, a scalar, Rafailov et al. 2023, eq. 7.

        A response's tokens are those of its sequence that are neither prompt nor padding. The first token of a sequence
        has nothing that predicts it and is never scored. The two prompts of a pair should be the same.

        Args:
            preferred_seq: ``(batch, seq)`` token ids, prompt and preferred response, padded to the right.
            unpreferred_seq: ``(batch, seq')`` token ids, the same prompts with the other response.
            prompt_mask: ``(batch, seq)`` bool, True on the prompt's tokens and on any other that is not to be scored.
            preferred_seq_mask: ``(batch, seq)`` bool, True on tokens, False on the padding to their right; None: made
                from ``pad_id``, or without one all True.
            unpreferred_seq_mask: the same for ``unpreferred_seq``.
            unpreferred_prompt_mask: ``(batch, seq')`` bool, where ``prompt_mask`` does not serve both sequences.
            return_metrics: whether to return ``(loss, PreferenceMetrics)``.

        Raises:
            ValueError: shapes or dtypes do not fit, a row is padded to the left, or a response has no token; the
                message names the argument and the row. Also if the model does not return logits.
        """
        if unpreferred_prompt_mask is None:
            if preferred_seq.shape != unpreferred_seq.shape:
                raise ValueError(
                    f"preferred_seq is {tuple(preferred_seq.shape)}, unpreferred_seq {tuple(unpreferred_seq.shape)}, "
                    "so that one prompt_mask cannot serve both: give unpreferred_prompt_mask"
                )
            unpreferred_prompt_mask = prompt_mask
        if len(preferred_seq) != len(unpreferred_seq):
            raise ValueError(f"preferred_seq has {len(preferred_seq)} rows, unpreferred_seq {len(unpreferred_seq)}")
        chosen_mask = self._response_mask("preferred", preferred_seq, prompt_mask, preferred_seq_mask)
        rejected_mask = self._response_mask(
            "unpreferred", unpreferred_seq, unpreferred_prompt_mask, unpreferred_seq_mask
        )

        # The reference goes first: its temporaries are gone when the policy's activations appear.
        with torch.no_grad():
            reference_chosen = _response_logps(self.ref_model, preferred_seq, chosen_mask)
            reference_rejected = _response_logps(self.ref_model, unpreferred_seq, rejected_mask)
        logps = PairLogps(
            policy_chosen=_response_logps(self.policy_model, preferred_seq, chosen_mask),
            policy_rejected=_response_logps(self.policy_model, unpreferred_seq, rejected_mask),
            reference_chosen=reference_chosen,
            reference_rejected=reference_rejected,
            chosen_tokens=chosen_mask.sum(-1),
            rejected_tokens=rejected_mask.sum(-1),
        )
        result = self.objective(logps)
        loss = result.losses.mean()
        if not return_metrics:
            return loss
        return loss, PreferenceMetrics(
            result.chosen_rewards, result.rejected_rewards, result.accuracies, result.margins
        )

    def _response_mask(self, side: str, ids: Tensor, prompt_mask: Tensor, seq_mask: Tensor | None) -> Tensor:
        """Returns ``(batch, seq)``, True on the response's tokens that can be scored; raises as ``forward`` says."""
        if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{side}_seq must hold token ids, int64 of shape (batch, seq), got {ids.dtype} of {tuple(ids.shape)}"
            )
        _check_mask(f"the prompt mask of {side}_seq", prompt_mask, ids)
        if seq_mask is not None:
            _check_mask(f"{side}_seq_mask", seq_mask, ids)
            _refuse(
                (seq_mask[:, 1:] & ~seq_mask[:, :-1]).any(-1),
                f"{side}_seq_mask is False before a True: pad to the right, and put what is not to be scored into the "
                "prompt mask",
            )
        elif self.pad_id is not None:
            # A token is real if any from it to the end of the row is not padding.
            seq_mask = (ids != self.pad_id).flip(-1).cumsum(-1).flip(-1) > 0
            _refuse(
                seq_mask.any(-1) & (ids[:, 0] == self.pad_id),
                f"{side}_seq begins with pad_id {self.pad_id}: pad to the right, or give {side}_seq_mask if it is real",
            )
        response_mask = ~prompt_mask if seq_mask is None else ~prompt_mask & seq_mask
        response_mask = response_mask & (torch.arange(ids.shape[1], device=ids.device) > 0)
        _refuse(
            ~response_mask.any(-1),
            f"the response in {side}_seq has no token to score: leave the pair out, or mend its masks or pad_id",
        )
        return response_mask


def _copy(model: nn.Module) -> nn.Module:
    """Returns a copy that shares nothing with the model, not even through what its functions hold.

    ``deepcopy`` leaves functions as they are. A ``TransformerWrapper`` of x-transformers with tied embeddings has one
    as its head, which holds the module itself: the copy's hidden states would be multiplied by the policy's weights.
    """
    memo: dict[int, Any] = {}
    copied = deepcopy(model, memo)
    for module in copied.modules():
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and value.__closure__:
                cells = tuple(
                    CellType(memo.get(id(cell.cell_contents), cell.cell_contents)) for cell in value.__closure__
                )
                bound = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
                bound.__kwdefaults__ = value.__kwdefaults__
                setattr(module, name, bound)
    return copied


def _check_mask(name: str, mask: Tensor, ids: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != ids.shape:
        raise ValueError(f"{name} must be bool of {tuple(ids.shape)}, got {mask.dtype} of {tuple(mask.shape)}")


def _refuse(is_wrong: Tensor, message: str) -> None:
    """Raises ValueError with the first row where ``is_wrong``, ``(batch,)``, holds."""
    rows = is_wrong.nonzero()
    if len(rows):
        raise ValueError(f"row {rows[0].item()}: {message}")


def _response_logps(model: nn.Module, ids: Tensor, response_mask: Tensor) -> Tensor:
    """Returns ``(batch,)``, the summed log-probs of the masked tokens."""
    # The last token predicts nothing that is scored, so a model of n positions takes n + 1 tokens.
    inputs, targets, is_scored = ids[:, :-1], ids[:, 1:].long(), response_mask[:, 1:]
    output = model(inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != inputs.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            f"model must map ids {tuple(inputs.shape)} to logits {tuple(inputs.shape)} + (vocab,), or to an object "
            f"that has them as .logits, got {got}"
        )
    logps = target_logps(logits[is_scored], targets[is_scored])
    return sum_by_response(logps, is_scored.nonzero()[:, 0], responses=len(ids)).float()
