"""Losses that depend on all pairs of a step, exactly, although a step's pairs are spread over ranks and micro-batches.

All log-probs are known before the first backward: then the step's loss is a function of a few numbers, the same on
every rank, whose slopes turn each micro-batch's backward into one of a weighted sum of its log-probs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_ds.data.schedule import Plan
from dpo_ds.losses import Objective, PairLabels, PairLogps, PreferenceLoss, Running


class Judged(NamedTuple):
    """What the whole step says of one micro-batch.

    Attributes:
        loss: its pairs' losses and rewards; where the loss sorts, a pair stands for the quantile at its place.
        slopes: ``(2, pairs)``, derivative of the sum of all pairs' losses by the policy's log-probs.
    """

    loss: PreferenceLoss
    slopes: Tensor


def judge_whole_step(
    objective: Objective,
    plan: Plan,
    logps: Sequence[PairLogps],
    pair_weights: Sequence[Tensor | None],
    *,
    rank: int,
    running: Mapping[str, Running],
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> list[Judged]:
    """Returns what the losses of all pairs of a plan say of each of this rank's micro-batches; collective.

    It depends neither on the number of ranks nor on the micro-batches: the pairs are put in the order of the data.

    Args:
        objective: what is minimised.
        plan: of the step, or of an evaluation.
        logps: of this rank's micro-batches, in the plan's order, without graphs.
        pair_weights: what the data say of each micro-batch's pairs, as ``PairLabels.weights``.
        rank: whose micro-batches are asked for.
        running: the means that the losses carry.
        sum_over_ranks: adds the ranks' tensors up.
    """
    real = sorted(
        (pair, owner, number, column)
        for owner, micro_batches in enumerate(plan)
        for number, micro_batch in enumerate(micro_batches)
        for column, pair in enumerate(micro_batch.pairs)
        if micro_batch.weight
    )
    place = {key[1:]: row for row, key in enumerate(real)}
    rows = [
        torch.tensor([place[rank, number, column] for column in range(len(micro_batch.pairs))], dtype=torch.long)
        if micro_batch.weight
        else None
        for number, micro_batch in enumerate(plan[rank])
    ]
    device = logps[0].policy_chosen.device
    table = torch.zeros(len(real), 7, dtype=torch.float64, device=device)
    for mine, pairs, weights in zip(rows, logps, pair_weights, strict=True):
        if mine is not None:
            values = [*_numbers(pairs), torch.ones(len(mine)) if weights is None else weights]
            table[mine.to(device)] = torch.stack([value.double().to(device) for value in values], dim=1)
    columns = sum_over_ranks(table).T
    policy, reference, tokens, weight = columns[:2].clone().requires_grad_(), columns[2:4], columns[4:6], columns[6]
    labels = PairLabels(weights=weight) if objective.takes_weights else PairLabels()
    with torch.enable_grad():
        everything = PairLogps(policy[0], policy[1], reference[0], reference[1], tokens[0], tokens[1])
        loss = objective(everything, labels=labels, running=running)
        (slopes,) = torch.autograd.grad(loss.losses.sum(), policy)
    whole = torch.stack([loss.losses.detach(), loss.chosen_rewards, loss.rejected_rewards, *slopes])
    judged = []
    for mine, pairs in zip(rows, logps, strict=True):
        zeros = torch.zeros(len(whole), len(pairs.policy_chosen), dtype=whole.dtype, device=device)
        part = (zeros if mine is None else whole[:, mine.to(device)]).to(pairs.policy_chosen.dtype)
        judged.append(Judged(PreferenceLoss(*part[:3]), part[3:]))
    return judged


def _numbers(pairs: PairLogps) -> list[Tensor]:
    return [
        *(pairs.policy_chosen, pairs.policy_rejected, pairs.reference_chosen, pairs.reference_rejected),
        *(pairs.chosen_tokens, pairs.rejected_tokens),
    ]
