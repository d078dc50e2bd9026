"""What a run minimises: a loss of the table, its numbers, what is added to it, and what it cannot be combined with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

import dpo_ds.losses.functions as functions
from dpo_ds.losses.pairs import Divergence, PairLabels, PairLogps, PreferenceLoss, Reduction

_NO_LABELS = PairLabels()


class Running(NamedTuple):
    """A mean over the steps so far, which a loss needs; it is saved with a run and the same on every rank.

    Attributes:
        value: the mean.
        pairs: how many pairs it has seen.
    """

    value: float = 0.0
    pairs: int = 0


def _mean_reward(running: Running, chosen: float, rejected: float, pairs: int) -> Running:
    """Both rewards' mean over all pairs so far."""
    seen = running.pairs + pairs
    return Running(running.value + ((chosen + rejected) / 2 - running.value) * pairs / seen, seen)


def _recent_margin(running: Running, chosen: float, rejected: float, pairs: int) -> Running:
    """The margins' mean, which keeps nine tenths of itself a step."""
    return Running(0.9 * running.value + 0.1 * (chosen - rejected), running.pairs + pairs)


@dataclass(frozen=True)
class Loss:
    """One line of the table.

    Attributes:
        function: the loss of each pair, ``(pairs,)``, from ``PairLogps`` and the keywords that the next fields name.
        reduction: how it takes a response's log-probs.
        has_mean_term: whether a part of it averages over tokens, whatever the reduction.
        takes_beta: whether the equation has a beta.
        smooths_labels: whether it knows labels that are wrong with some probability, one for all pairs.
        needs_smoothing: whether that probability must not be 0.
        takes_soft_labels: whether each pair may have such a probability of its own.
        takes_margins: whether it compares ``beta * margin`` with a bound that a pair's own margin may shift.
        compares_nothing: whether it sees the chosen response alone, so that no label says anything to it.
        compares_margins: whether it sees log-ratios as their difference only, so that another divergence may give it.
        needs_reference: whether the reference's log-probs are in the equation.
        needs_whole_step: whether a pair's loss depends on the other pairs of its step.
        sorts_pairs: whether the losses are those of quantiles, so that no pair can have a weight.
        running: how the mean that it carries from step to step goes on from a step's mean rewards, chosen and
            rejected, and its number of pairs; None where it carries nothing.
        parameters: the equation's own numbers, all >= 0, with their defaults.
        positive: those of them that must not be 0.
    """

    function: Callable[..., Tensor]
    reduction: Reduction = "sum"
    has_mean_term: bool = False
    takes_beta: bool = True
    smooths_labels: bool = False
    needs_smoothing: bool = False
    takes_soft_labels: bool = False
    takes_margins: bool = False
    compares_nothing: bool = False
    compares_margins: bool = False
    needs_reference: bool = True
    needs_whole_step: bool = False
    sorts_pairs: bool = False
    running: Callable[[Running, float, float, int], Running] | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    positive: tuple[str, ...] = ()


# A margin like DPO's, in whose place another divergence and a bound of the pair's own may come.
_dpo_like = partial(Loss, takes_margins=True, compares_margins=True)
_sorting = partial(Loss, smooths_labels=True, needs_whole_step=True, sorts_pairs=True)

LOSSES: dict[str, Loss] = {
    "sigmoid": _dpo_like(functions.sigmoid_loss, smooths_labels=True, takes_soft_labels=True),
    "sigmoid_norm": Loss(
        functions.sigmoid_loss, "mean", smooths_labels=True, takes_soft_labels=True, takes_margins=True
    ),
    "robust": _dpo_like(functions.robust_loss, smooths_labels=True),
    "hinge": _dpo_like(functions.hinge_loss),
    "ipo": Loss(functions.ipo_loss, "mean"),
    "exo_pair": _dpo_like(functions.exo_pair_loss, smooths_labels=True, needs_smoothing=True, takes_soft_labels=True),
    "nca_pair": Loss(functions.nca_pair_loss),
    "bco_pair": Loss(functions.bco_pair_loss, running=_mean_reward),
    "bco_pair_unshifted": Loss(functions.bco_pair_unshifted_loss),
    "sppo_hard": Loss(functions.sppo_hard_loss),
    "aot": _sorting(functions.aot_loss),
    "aot_unpaired": _sorting(functions.aot_unpaired_loss),
    "apo_zero": Loss(functions.apo_zero_loss),
    "apo_down": Loss(functions.apo_down_loss),
    "discopop": _dpo_like(functions.discopop_loss, parameters={"tau": 0.05}, positive=("tau",)),
    "simpo": Loss(functions.simpo_loss, "mean", takes_margins=True, needs_reference=False, parameters={"gamma": 0.5}),
    "orpo": Loss(functions.orpo_loss, "mean", needs_reference=False),
    "cpo": Loss(functions.cpo_loss, has_mean_term=True, needs_reference=False, parameters={"cpo_alpha": 1.0}),
    "slic": Loss(
        functions.slic_loss,
        takes_beta=False,
        needs_reference=False,
        parameters={"slic_delta": 1.0, "slic_lambda": 1.0},
    ),
    "sft": Loss(functions.sft_loss, "mean", takes_beta=False, compares_nothing=True, needs_reference=False),
    "dpop": Loss(functions.dpop_loss, parameters={"dpop_lambda": 50.0}),
    "chi_po": Loss(functions.chi_po_loss, parameters={"chi_clip": 10.0}, positive=("chi_clip",)),
    "r_dpo": Loss(functions.r_dpo_loss, takes_margins=True, parameters={"length_penalty": 0.01}),
    "beta_dpo": Loss(
        functions.beta_dpo_loss, needs_whole_step=True, running=_recent_margin, parameters={"beta_sensitivity": 0.6}
    ),
    "cal_dpo": Loss(functions.cal_dpo_loss),
}


@dataclass(frozen=True)
class Objective:
    """A loss with its numbers, and what is added to it. Building one checks that all of it goes together.

    Attributes:
        type: a key of ``LOSSES``.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: probability that a label is wrong, in [0, 0.5); only where the loss knows it.
        reduction: whether a response's log-prob is the sum over its tokens or their mean; None takes the loss's own.
        parameters: numbers of the losses' own equations, by name; those left out have their defaults.
        add: further losses and their weights; that of ``type`` is 1. Each takes log-probs in its own reduction, and
            beta, smoothing and divergence as far as it knows them.
        divergence: which f-divergence from the reference is bounded, as ``PairLogps.under`` says.
        divergence_alpha: the alpha of ``alpha_divergence``, of which the paper's own is ``1 - alpha``.
        weighting: ``wpo`` multiplies each pair's loss by how likely its two responses are to the policy,
            ``exp(log pi_c / n_c + log pi_r / n_r)``, a constant for the gradient: Zhou et al. 2024, eq. 2,
            arXiv:2406.11827, without the alignment by the most likely tokens.
    """

    type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reduction: Reduction | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    add: Mapping[str, float] = field(default_factory=dict)
    divergence: Divergence = "reverse_kl"
    divergence_alpha: float = 0.5
    weighting: Literal["none", "wpo"] = "none"

    def __post_init__(self) -> None:
        """Checks the combination.

        Raises:
            ValueError: it is impossible; the message begins with the attribute's name.
        """
        self._check_names()
        wholes = [name for name, loss in self.losses.items() if loss.sorts_pairs]
        if self.label_smoothing and not LOSSES[self.type].smooths_labels:
            raise ValueError(f"label_smoothing must be 0 for the {self.type} loss, got {self.label_smoothing}")
        for name, loss in self.losses.items():
            if loss.needs_smoothing and not self.label_smoothing:
                raise ValueError(
                    f"label_smoothing must be > 0 for the {name} loss, which has its logarithm, got 0; 0.001 is usual"
                )
            if self.divergence != "reverse_kl" and loss.needs_reference and not loss.compares_margins:
                raise ValueError(
                    f"divergence must be reverse_kl for the {name} loss, got {self.divergence!r}: only a difference "
                    f"of two rewards can be one under another divergence, as in "
                    f"{', '.join(known for known, other in LOSSES.items() if other.compares_margins)}"
                )
            is_alike = loss.reduction == self.own_reduction and LOSSES[self.type].needs_reference
            if name != self.type and loss.running and not is_alike:
                raise ValueError(
                    f"add must not hold {name} beside {self.type}: its running mean is one of rewards of "
                    f"{loss.reduction} log-probs over a reference's, and those of {self.type} are others"
                )
        if self.divergence != "reverse_kl" and not LOSSES[self.type].compares_margins:
            raise ValueError(f"divergence must be reverse_kl for the {self.type} loss, got {self.divergence!r}")
        if self.reduction is not None and self.reduction != "sum" and self.divergence != "reverse_kl":
            raise ValueError(f"divergence must be reverse_kl for mean log-probs, got {self.divergence!r}")
        if self.weighting != "none" and wholes:
            raise ValueError(
                f"weighting must be none for the {wholes[0]} loss, got {self.weighting!r}: it sorts, and a quantile "
                "is no pair that could have a weight"
            )

    def _check_names(self) -> None:
        for key, name in [("type", self.type), *(("add", name) for name in self.add)]:
            if name not in LOSSES:
                raise ValueError(f"{key} must be one of {', '.join(LOSSES)}, got {name!r}")
        if self.type in self.add:
            raise ValueError(f"add must not hold {self.type}, which is the type already and has the weight 1")
        for name, weight in self.add.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"add must hold weights > 0, got {weight} for {name}")
        known = {name for loss in self.losses.values() for name in loss.parameters}
        positive = {name for loss in self.losses.values() for name in loss.positive}
        for name, value in self.parameters.items():
            if name not in known:
                raise ValueError(
                    f"parameters must name numbers that the {' + '.join(self.losses)} loss has "
                    f"({', '.join(sorted(known)) or 'none'}), got {name!r}"
                )
            if not (value > 0 if name in positive else value >= 0) or value == float("inf"):
                raise ValueError(f"parameters.{name} must be {'>' if name in positive else '>='} 0, got {value}")
        for name, options in (("divergence", get_args(Divergence)), ("weighting", ("none", "wpo"))):
            if vars(self)[name] not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {vars(self)[name]!r}")

    @property
    def losses(self) -> dict[str, Loss]:
        """The losses that are summed, by name; the first is ``type``."""
        return {name: LOSSES[name] for name in (self.type, *self.add)}

    @property
    def own_reduction(self) -> Reduction:
        """How a response's log-prob enters the rewards."""
        return self.reduction or LOSSES[self.type].reduction

    @property
    def needs_reference(self) -> bool:
        """Whether any term has the reference's log-probs in its equation."""
        return any(loss.needs_reference for loss in self.losses.values())

    @property
    def needs_whole_step(self) -> bool:
        """Whether a pair's loss depends on the other pairs of its step."""
        return any(loss.needs_whole_step for loss in self.losses.values())

    @property
    def averages(self) -> bool:
        """Whether log-probs are averaged over tokens, in any term or in what weighs the pairs."""
        reductions = [self.own_reduction, *(LOSSES[name].reduction for name in self.add)]
        return (
            "mean" in reductions or self.weighting == "wpo" or any(loss.has_mean_term for loss in self.losses.values())
        )

    @property
    def takes_soft_labels(self) -> bool:
        """Whether the data may say how probably a label is right."""
        return LOSSES[self.type].takes_soft_labels and all(
            loss.takes_soft_labels or loss.compares_nothing for loss in self.losses.values()
        )

    @property
    def takes_margins(self) -> bool:
        """Whether the data may say by how much the chosen reward has to be the larger."""
        return LOSSES[self.type].takes_margins and all(
            loss.takes_margins or loss.compares_nothing for loss in self.losses.values()
        )

    @property
    def takes_weights(self) -> bool:
        """Whether the data may say how much a pair counts."""
        return not any(loss.sorts_pairs for loss in self.losses.values())

    def start(self) -> dict[str, Running]:
        """Returns the running means before the first step, by the losses that carry one."""
        return {name: Running() for name, loss in self.losses.items() if loss.running}

    def carried(
        self, running: Mapping[str, Running], *, chosen_reward: float, rejected_reward: float, pairs: int
    ) -> dict[str, Running]:
        """Returns the running means after a step.

        Args:
            running: those before it.
            chosen_reward: the step's mean over all ranks.
            rejected_reward: the same of the rejected responses.
            pairs: of the step.
        """
        moved = {}
        for name, before in running.items():
            go_on = LOSSES[name].running
            assert go_on is not None
            moved[name] = go_on(before, chosen_reward, rejected_reward, pairs)
        return moved

    def __call__(
        self,
        logps: PairLogps,
        *,
        labels: PairLabels = _NO_LABELS,
        running: Mapping[str, Running] | None = None,
    ) -> PreferenceLoss:
        """Returns each pair's loss and implicit rewards ``beta * h``, Rafailov et al. 2023, sec. 5.1, arXiv:2305.18290.

        A soft label ``p`` makes the loss ``p l(x) + (1 - p) l(-x)``, which label smoothing ``e`` does for all pairs
        with ``p = 1 - e``; where both are given, the label is wrong where one of the two is: ``p (1 - e) + (1 - p) e``
        takes the place of ``p``. A margin ``m`` is subtracted from ``x = beta * margin``: Touvron et al. 2023
        (Llama 2), arXiv:2307.09288, for reward models, and for DPO the offset of Amini et al. 2024,
        arXiv:2402.10571. The hinge becomes ``max(0, 1 + m - beta * margin)``.

        Args:
            logps: summed log-probs of the pairs; all pairs of a step where ``needs_whole_step``.
            labels: what the data say of each pair. The rewards are those that ``type`` compares, and no label changes
                them.
            running: the means that the losses carry; by default those before the first step.

        Raises:
            ValueError: the losses do not know labels of this kind.
        """
        self._check_labels(labels)
        carried = self.start() if running is None else running
        is_wrong: float | Tensor = self.label_smoothing
        if labels.probabilities is not None:
            smoothing = self.label_smoothing
            is_wrong = labels.probabilities * smoothing + (1 - labels.probabilities) * (1 - smoothing)
        losses = torch.zeros_like(logps.policy_chosen)
        for name, weight in ((self.type, 1.0), *self.add.items()):
            losses = losses + weight * self._term(name, logps, labels.margins, is_wrong, carried)
        if self.weighting == "wpo":
            means = logps.averaged()
            losses = losses * (means.policy_chosen + means.policy_rejected).detach().exp()
        seen = self._seen(self.type, logps)
        return PreferenceLoss(
            losses=losses if labels.weights is None else losses * labels.weights,
            chosen_rewards=self.beta * seen.chosen_logratios.detach(),
            rejected_rewards=self.beta * seen.rejected_logratios.detach(),
        )

    def _check_labels(self, labels: PairLabels) -> None:
        named = " + ".join(self.losses)
        for values, is_known, what in (
            (labels.probabilities, self.takes_soft_labels, "soft labels"),
            (labels.margins, self.takes_margins, "margins"),
            (labels.weights, self.takes_weights, "weights of pairs"),
        ):
            if values is not None and not is_known:
                raise ValueError(f"the {named} loss knows no {what}")

    def _seen(self, name: str, logps: PairLogps) -> PairLogps:
        """Returns the log-probs as a loss takes them."""
        reduction = self.own_reduction if name == self.type else LOSSES[name].reduction
        seen = logps.averaged() if reduction == "mean" else logps
        return seen if LOSSES[name].needs_reference else seen.without_reference()

    def _term(
        self,
        name: str,
        logps: PairLogps,
        margins: Tensor | None,
        is_wrong: float | Tensor,
        running: Mapping[str, Running],
    ) -> Tensor:
        loss, seen = LOSSES[name], self._seen(name, logps)
        if loss.needs_reference:
            seen = seen.under(self.divergence, alpha=self.divergence_alpha)
        if margins is not None and loss.takes_margins:
            seen = replace(seen, policy_chosen=seen.policy_chosen - margins / self.beta)
        numbers: dict[str, float | Tensor] = {
            parameter: self.parameters.get(parameter, default) for parameter, default in loss.parameters.items()
        }
        if loss.takes_beta:
            numbers["beta"] = self.beta
        if loss.smooths_labels:
            numbers["label_smoothing"] = is_wrong
        if loss.running:
            numbers["running"] = running[name].value
        return loss.function(seen, **numbers)


def preference_loss(
    logps: PairLogps,
    *,
    type: str,
    beta: float,
    label_smoothing: float = 0.0,
    reduction: Reduction | None = None,
    labels: PairLabels = _NO_LABELS,
) -> PreferenceLoss:
    """Returns what ``Objective`` does for one loss of the table, with its own numbers.

    Args:
        logps: summed log-probs of the pairs.
        type: a key of ``LOSSES``.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: probability that a label is wrong, in [0, 0.5); only where the loss knows it.
        reduction: whether a response's log-prob is the sum over its tokens or their mean; None takes the loss's own.
        labels: what the data say of each pair.

    Raises:
        ValueError: ``label_smoothing``, soft labels, margins or weights are set for a loss that does not know them.
    """
    objective = Objective(type, beta, label_smoothing, reduction)
    return objective(logps, labels=labels)
