"""Ranks that share rows lose what a plain loop loses, and say where they cannot."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from dpo_ds.data.batch import discounted, packed_batch, padded_batch, part_of_rows
from dpo_ds.models.row_parts import why_not_splittable
from tests.engine.test_engines import expect_passed
from tests.models.test_attention import LENGTHS, random_pairs
from tests.models.tiny_models import FAMILIES
from tests.ranks import REPOSITORY, run_ranks
from tests.test_run import Run, lines, losses, rows_of_words
from tests.test_run import plain_losses as plain_losses
from tests.test_run import run as run

SCENARIO = "rows_in_parts_score_as_whole_ones"
LAYOUTS = ("packed", "padded")
ON_TWO = [
    *((family, "unlike", "packed") for family in FAMILIES),
    *((family, "unlike", "padded") for family in ("llama", "mistral", "gemma2", "gpt2")),
    *(("llama", lengths, layout) for lengths in (*LENGTHS, "nothing scored in the first part") for layout in LAYOUTS),
    ("gemma2", "long", "packed"),
    ("llama", "long", "packed"),
]
# Fewer heads of keys than ranks, and a row that is shorter than they are many.
ON_FOUR = [("llama", "very unlike", "packed"), ("llama with tied heads", "one-token parts", "padded")]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """Runs every scenario below, in one job for each number of ranks, and returns the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("job")
    agendas = {2: ON_TWO, 4: ON_FOUR}
    for ranks, agenda in agendas.items():
        path = folder / f"agenda{ranks}.json"
        more = [["groups_share_what_they_should", []]] if ranks == 4 else []
        path.write_text(json.dumps([*([SCENARIO, [*given]] for given in agenda), *more]))
        script = REPOSITORY / "tests/engine/sequence_scenarios.py"
        run_ranks(ranks, [script, path], folder=folder)
    return folder


@pytest.mark.ranks
@pytest.mark.parametrize("given", ON_TWO, ids=", ".join)
def test_two_ranks_that_share_rows_score_and_train_as_one(job, given):
    expect_passed(job, SCENARIO, *given)


@pytest.mark.ranks
@pytest.mark.parametrize("given", ON_FOUR, ids=", ".join)
def test_four_ranks_that_share_rows_score_and_train_as_one(job, given):
    expect_passed(job, SCENARIO, *given, ranks=4)


@pytest.mark.ranks
def test_groups_of_ranks_count_once(job):
    expect_passed(job, "groups_share_what_they_should", ranks=4)


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "size", "layout"), [(2, 2, "packed"), (2, 2, "padded"), (4, 2, "packed")])
def test_six_steps_lose_what_a_plain_loop_loses(run: Run, plain_losses, ranks, size, layout):
    shared = {"layout": layout, "sequence_parallel_size": size}
    rows = rows_of_words(24)
    finished, out = run(ranks, rows=rows, held_out=rows[:7], data={"eval": "held_out.jsonl"}, train=shared)
    assert "score alike" in finished.expect_success().outputs[0]
    assert losses(out) == pytest.approx(plain_losses, rel=1e-5, abs=1e-6)
    assert [line["pairs"] for line in lines(out)] == [4] * 6
    assert {line["pairs"] for line in lines(out, "eval")} == {7}
    assert 0 < min(line["fill_rate"] for line in lines(out)) <= 1


@pytest.mark.ranks
def test_a_cached_reference_of_shared_rows_serves_shared_rows(run: Run, plain_losses):
    shared = {"sequence_parallel_size": 2, "activation_checkpointing": "full"}
    finished, out = run(2, rows=rows_of_words(24), train=shared, reference={"mode": "cache"})
    finished.expect_success()
    assert losses(out) == pytest.approx(plain_losses, rel=1e-5, abs=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"sequence_parallel_size": 2}}, "must divide the number of ranks, 1, got 2"),
        ({"train": {"sequence_parallel_size": 0}}, "train.sequence_parallel_size must be >= 1, got 0"),
        (
            {"train": {"sequence_parallel_size": 2}, "model": {"attention": "sdpa"}},
            "train.sequence_parallel_size must be 1 unless model.attention is auto",
        ),
        ({"train": {"sequence_parallel_size": 2}, "loss": {"router_aux": 0.1}}, "loss.router_aux must be 0 where"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run: Run, sections, says):
    finished, out = run(1, rows=rows_of_words(8), **sections)
    assert finished.codes == [2]
    (line,) = [line for line in finished.errors[0].splitlines() if line.startswith("error:")]
    assert says in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "parts", "says"),
    [
        ({}, 2, None),
        ({}, 4, None),
        ({}, 3, "4 attention heads cannot be dealt to 3 ranks"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6}, 4, "6 heads of keys and values"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 2, "dynamic"),
    ],
)
def test_a_config_says_whether_ranks_can_share_rows(changes, parts, says):
    shape = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    problem = why_not_splittable(LlamaConfig(**shape | changes), parts)
    assert problem is None if says is None else says in problem


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_parts_of_rows_hold_every_token_once(layout, parts):
    pairs = random_pairs(LENGTHS["unlike"])
    whole = discounted((packed_batch if layout == "packed" else padded_batch)(pairs), 0.25)
    found = [part_of_rows(whole, part=part, parts=parts) for part in range(parts)]
    ids = torch.cat([part.input_ids for part in found], dim=1)
    length = whole.input_ids.shape[1]
    assert torch.equal(ids[:, :length], whole.input_ids)
    assert len({part.input_ids.shape for part in found}) == 1
    # What a scored token is predicted from, by its place in the whole rows.
    width = ids.shape[1] // parts
    places = [
        part.predicted_at // width * length + part.predicted_at % width + number * width
        for number, part in enumerate(found)
    ]
    order = torch.cat(places).argsort(stable=True)
    right = whole.predicted_at.argsort(stable=True)
    assert torch.equal(torch.cat(places)[order], whole.predicted_at[right])
    for name in ("targets", "response_of", "token_weights"):
        got = torch.cat([getattr(part, name) for part in found])
        assert torch.equal(got[order], getattr(whole, name)[right]), name
    positions = torch.cat([part.position_ids for part in found], dim=1)[:, :length]
    expected = torch.arange(length).expand_as(positions) if whole.position_ids is None else whole.position_ids
    assert torch.equal(positions, expected)
    assert all(part.spans[-1].end == ids.shape[1] for part in found if part.spans)
