"""What ranks do that share rows: ``python sequence_scenarios.py AGENDA``, as ``scenarios.py`` does."""

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ds.data.batch import PairBatch, discounted, packed_batch, padded_batch
from dpo_ds.engine import DataParallel, World
from dpo_ds.models.attention import share_prompts
from dpo_ds.models.scorer import Scorer
from tests.engine.scenarios import main
from tests.models.test_attention import LENGTHS, random_pairs
from tests.models.tiny_models import tiny_model

# Long pairs, computed in blocks, and a part of a row that has no token to score.
MORE_LENGTHS = {"long": [(300, 260, 20)], "nothing scored in the first part": [(40, 3, 2)]}


def scores_and_gradients(scorer: Scorer, batch: PairBatch) -> tuple[Tensor, list[Tensor]]:
    logps = scorer(batch)
    # Every response has another weight.
    (logps * torch.arange(1, logps.numel() + 1).view_as(logps) / logps.numel()).sum().backward()
    return logps.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in scorer.parameters()]


def rows_in_parts_score_as_whole_ones(world: World, family: str, lengths: str, layout: str) -> None:
    pairs = random_pairs((LENGTHS | MORE_LENGTHS)[lengths])
    batch = discounted((packed_batch if layout == "packed" else padded_batch)(pairs), 0.5)
    model = tiny_model(family)
    share_prompts(model)
    whole, in_parts = Scorer(model), Scorer(copy.deepcopy(model))
    in_parts.row_parts = DataParallel(world, sequence_parallel_size=world.size).row_parts
    expected, expected_gradients = scores_and_gradients(whole, batch)
    got, gradients = scores_and_gradients(in_parts, batch)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for gradient, right in zip(gradients, expected_gradients, strict=True):
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-5 * max(1.0, float(right.abs().max())))


def groups_share_what_they_should(world: World) -> None:
    """Four ranks in groups of two."""
    ranks = DataParallel(world, sequence_parallel_size=2)
    assert (ranks.rank, ranks.size) == (world.rank // 2, 2)
    assert ranks.row_parts is not None
    assert (ranks.row_parts.part, ranks.row_parts.parts) == (world.rank % 2, 2)
    assert ranks.gather(world.rank // 2) == [0, 1]
    # As many as groups, not as ranks.
    assert float(ranks.sum(torch.ones(1))) == 2
    assert float(ranks.row_parts.sum(torch.tensor([float(world.rank)]))) == {0: 1.0, 1: 5.0}[ranks.rank]


if __name__ == "__main__":
    main(sys.argv[1], globals())
