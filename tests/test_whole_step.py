"""Losses of a whole step, in one process whose ranks are played one after the other."""

import pytest
import torch

from dpo_ds.data.schedule import MicroBatch, Plan
from dpo_ds.losses import LOSSES, Objective, PairLabels, PairLogps, Running
from dpo_ds.whole_step import judge_whole_step

PAIRS = 7
RUNNING = {"beta_dpo": Running(0.3, 5)}


def some_logps() -> PairLogps:
    draw = torch.Generator().manual_seed(0)
    logps = -30 * torch.rand(4, PAIRS, generator=draw, dtype=torch.float64)
    tokens = torch.randint(2, 20, (2, PAIRS), generator=draw)
    return PairLogps(*logps, *tokens)


def at(logps: PairLogps, pairs: tuple[int, ...]) -> PairLogps:
    columns = [value[list(pairs)] for value in vars(logps).values() if isinstance(value, torch.Tensor)]
    return PairLogps(*columns)


PLANS: dict[str, Plan] = {
    "one rank, one micro-batch": ((MicroBatch((0, 1, 2, 3, 4, 5, 6)),),),
    "one rank, three micro-batches": ((MicroBatch((6, 0)), MicroBatch((3,)), MicroBatch((1, 2, 5, 4))),),
    "two ranks": ((MicroBatch((5, 1)), MicroBatch((0, 2))), (MicroBatch((6,)), MicroBatch((3, 4)))),
    "three ranks, one with a stand-in": (
        (MicroBatch((4, 1)), MicroBatch((2,))),
        (MicroBatch((6, 5)), MicroBatch((0,))),
        (MicroBatch((3,)), MicroBatch((3,), 0.0)),
    ),
}


def judged(objective: Objective, plan: Plan, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Losses, rewards and slopes of each pair, as the ranks of a plan find them together: ``(5, PAIRS)``."""
    logps, tables, found = some_logps(), [], torch.full((5, PAIRS), torch.nan, dtype=torch.float64)

    def ask(rank, sum_over_ranks):
        parts = [at(logps, micro_batch.pairs) for micro_batch in plan[rank]]
        said = [None if weights is None else weights[list(micro_batch.pairs)] for micro_batch in plan[rank]]
        return judge_whole_step(objective, plan, parts, said, rank=rank, running=RUNNING, sum_over_ranks=sum_over_ranks)

    for rank in range(len(plan)):
        ask(rank, lambda table: tables.append(table) or table)
    for rank in range(len(plan)):
        for micro_batch, (loss, slopes) in zip(plan[rank], ask(rank, lambda _: sum(tables)), strict=True):
            part = torch.stack([*loss, *slopes])
            if micro_batch.weight:
                found[:, list(micro_batch.pairs)] = part
            else:
                assert not part.any()
    return found


OBJECTIVES = {
    "aot": Objective("aot", beta=0.2, label_smoothing=0.1),
    "aot_unpaired": Objective("aot_unpaired", beta=0.2),
    "beta_dpo": Objective("beta_dpo", beta=0.2),
    "a sum": Objective("sigmoid", beta=0.2, add={"aot": 0.5, "sft": 1.0, "beta_dpo": 0.3}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("layout", PLANS)
def test_a_whole_step_does_not_depend_on_ranks_and_micro_batches(name, layout):
    objective, logps = OBJECTIVES[name], some_logps()
    logps.policy_chosen.requires_grad_()
    logps.policy_rejected.requires_grad_()
    whole = objective(logps, running={**objective.start(), **RUNNING})
    whole.losses.sum().backward()
    expected = torch.stack([*whole, logps.policy_chosen.grad, logps.policy_rejected.grad]).detach()
    assert torch.equal(judged(objective, PLANS[layout]), expected)


def test_sorting_within_micro_batches_would_be_another_loss():
    objective, logps = OBJECTIVES["aot"], some_logps()
    micro_batches = PLANS["one rank, three micro-batches"][0]
    apart = sum(objective(at(logps, micro_batch.pairs)).losses.sum() for micro_batch in micro_batches)
    assert abs(apart - objective(logps).losses.sum()) > 0.1


def test_weights_of_pairs_reach_the_slopes():
    weights = torch.linspace(0.5, 2.0, PAIRS, dtype=torch.float64)
    plain, weighted = (judged(OBJECTIVES["beta_dpo"], PLANS["two ranks"], w) for w in (None, weights))
    torch.testing.assert_close(weighted[[0, 3, 4]], plain[[0, 3, 4]] * weights, rtol=1e-12, atol=0)
    assert torch.equal(weighted[1:3], plain[1:3])


def test_a_loss_of_single_pairs_has_the_same_slopes_either_way():
    # What the mechanism computes is the gradient itself, whatever the loss.
    objective, logps = Objective("nca_pair", beta=0.2), some_logps()
    logps.policy_chosen.requires_grad_()
    objective(logps, labels=PairLabels()).losses.sum().backward()
    torch.testing.assert_close(judged(objective, PLANS["two ranks"])[3], logps.policy_chosen.grad, rtol=1e-12, atol=0)


def test_a_whole_step_of_mean_log_probs_knows_the_tokens_of_both_responses():
    objective, logps = Objective("beta_dpo", beta=0.2, reduction="mean"), some_logps()
    logps.policy_chosen.requires_grad_()
    logps.policy_rejected.requires_grad_()
    losses = objective(logps, running=RUNNING).losses
    losses.sum().backward()
    found = judged(objective, PLANS["two ranks"])
    torch.testing.assert_close(found[0], losses.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[4], logps.policy_rejected.grad, rtol=1e-12, atol=0)


def test_a_whole_step_takes_float32_and_gives_it_back_without_a_graph():
    logps = some_logps()
    single = PairLogps(
        *(x.float().requires_grad_() for x in (logps.policy_chosen, logps.policy_rejected)),
        *(x.float() for x in (logps.reference_chosen, logps.reference_rejected)),
        *(logps.chosen_tokens, logps.rejected_tokens),
    )
    plan = PLANS["one rank, one micro-batch"]
    ((loss, slopes),) = judge_whole_step(
        OBJECTIVES["aot"], plan, [single], [None], rank=0, running=RUNNING, sum_over_ranks=lambda table: table
    )
    assert {x.dtype for x in (*loss, slopes)} == {torch.float32}
    assert not any(x.requires_grad for x in (*loss, slopes))
    torch.testing.assert_close(loss.losses.double(), OBJECTIVES["aot"](logps).losses, rtol=1e-5, atol=1e-6)


def test_the_losses_of_a_whole_step_are_known_as_such():
    assert {name for name, loss in LOSSES.items() if loss.needs_whole_step} == {"aot", "aot_unpaired", "beta_dpo"}
