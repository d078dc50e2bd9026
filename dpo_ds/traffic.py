"""Bytes that ZeRO-3 moves in a DPO step: predicted from the model, the ranks and the micro-batches. No rank."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in one step, where collectives are rings.

    Attributes:
        policy_gathers: the policy's weights, for forward and backward.
        reference_gathers: the reference's weights.
        gradients: the policy's gradients, summed and scattered.
        update: after the update, the weights that are small enough to stay whole on every rank.
    """

    policy_gathers: float = 0.0
    reference_gathers: float = 0.0
    gradients: float = 0.0
    update: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all kinds together."""
        return float(sum(getattr(self, kind.name) for kind in fields(self)))


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model under ZeRO-3.

    Attributes:
        sharded: values of the tensors that are gathered whenever they are used.
        whole: values of the tensors under ``stage3_param_persistence_threshold``, which every rank keeps whole.
        trained: values that have gradients; None: all.
    """

    sharded: int
    whole: int
    trained: int | None = None


def predicted(
    sizes: Sizes,
    *,
    ranks: int,
    micro_batches: int,
    reference_micro_batches: int,
    gathers: int,
    weight_bytes: int = 2,
    gradient_bytes: int = 2,
) -> Traffic:
    """Returns what a step moves: weights are gathered a micro-batch, gradients reduced a micro-batch.

    Args:
        sizes: of the policy and of the reference.
        ranks: how many share the weights.
        micro_batches: of a rank in a step.
        reference_micro_batches: the reference's, 0 where its log-probs are cached.
        gathers: of each of the policy's weights in a micro-batch: 2 (forward and backward), 1 where
            ``stage3_max_reuse_distance`` keeps them from forward to backward.
        weight_bytes: of a weight.
        gradient_bytes: of a gradient's value on its way.
    """
    others = (ranks - 1) / ranks  # a rank holds its own share already
    once = sizes.sharded * weight_bytes * others
    trained = sizes.sharded + sizes.whole if sizes.trained is None else sizes.trained
    return Traffic(
        policy_gathers=gathers * micro_batches * once,
        reference_gathers=reference_micro_batches * once,
        gradients=micro_batches * trained * gradient_bytes * others,
        update=sizes.whole * weight_bytes * others,
    )
