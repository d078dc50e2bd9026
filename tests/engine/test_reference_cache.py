import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpo_ds.cli.train import main as train
from tests.cli.test_train import files as files
from tests.engine.cache_scenarios import PAIRS, scoring
from tests.engine.scenarios import some_pairs
from tests.engine.test_engines import expect_passed
from tests.plain_dpo import response_logp
from tests.ranks import REPOSITORY, Finished, run_ranks
from tests.test_run import Run, losses, rows_of_words
from tests.test_run import plain_losses as plain_losses
from tests.test_run import run as run

SCENARIOS = REPOSITORY / "tests/engine/cache_scenarios.py"
LAYOUTS = ("padded", "packed")


def run_agenda(ranks: int, agenda: list[list[object]], folder: Path) -> Finished:
    path = folder / f"agenda{ranks}.json"
    path.write_text(json.dumps(agenda))
    return run_ranks(ranks, [SCENARIOS, path], folder=folder)


@pytest.fixture(scope="module")
def job(tiny_models, tmp_path_factory) -> Path:
    """Runs every scenario below, in one job for each number of ranks, and returns the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("job")
    llama, tied = str(tiny_models["llama"]), str(tiny_models["llama-tied"])
    large = folder / "large"
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(large)
    copied, edited, renamed = (Path(shutil.copytree(llama, folder / name)) for name in ("copied", "edited", "renamed"))
    weights = bytearray((edited / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (edited / "model.safetensors").write_bytes(weights)
    (renamed / "config.json").write_text(
        (renamed / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    models = [llama, str(copied), str(edited), str(renamed)]
    everywhere = {
        ranks: [
            ["digests", [str(folder / f"digests{ranks}"), models]],
            *(["fills", [llama, str(folder / f"{layout}{ranks}"), layout]] for layout in LAYOUTS),
        ]
        for ranks in (1, 2, 3)
    }
    everywhere[2] += [
        ["memory_comes_back", [str(large)]],
        ["goes_on", [llama, str(folder / "goes_on")]],
        ["other_weights_are_scored_anew", [llama, tied, str(folder / "others")]],
        ["poisoned_rows_are_found", [llama, str(folder / "poisoned")]],
        ["infinite_rows_are_refused", [llama, str(folder / "infinite")]],
        ["what_cannot_be_written_is_named", [llama, str(folder / "a_file")]],
        ["policy_agrees", [llama, str(folder / "policy")]],
    ]
    for ranks, agenda in everywhere.items():
        run_agenda(ranks, agenda, folder)
    return folder


def cached(job: Path, name: str) -> list[list[float]]:
    return json.loads((job / name / "logps.json").read_text())


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_log_probs_are_the_live_engines_to_the_bit_and_of_pairs_alone_to_1e_5_a_token(job, tiny_models, layout):
    expect_passed(job, "fills", str(tiny_models["llama"]), str(job / f"{layout}2"))


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_log_probs_do_not_depend_on_the_number_of_ranks(job, layout):
    one, two, three = (cached(job, f"{layout}{ranks}") for ranks in (1, 2, 3))
    assert one == two == three


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_log_probs_are_those_of_plain_pytorch_on_each_response_alone(job, tiny_models, layout):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
    with torch.no_grad():
        expected = [
            [float(response_logp(model, [*pair.prompt_ids], [*getattr(pair, side)])) for pair in some_pairs(PAIRS)]
            for side in ("chosen_ids", "rejected_ids")
        ]
    torch.testing.assert_close(cached(job, f"{layout}2"), expected, rtol=0, atol=1e-4)


PASS = {
    "memory_comes_back": "no shard is alive when the engine is gone, and the machine has their memory again",
    "goes_on": "missing and damaged blocks are scored again, the others are not",
    "other_weights_are_scored_anew": "nothing is taken from another fingerprint",
    "poisoned_rows_are_found": "rows that the live engine does not score are found by a sample",
    "infinite_rows_are_refused": "a log-prob that is not finite is named by its row and never written",
    "what_cannot_be_written_is_named": "a folder that cannot be written is the user's mistake on every rank",
    "policy_agrees": "a policy built after the engine's end has its scores to the bit, until it moves",
}


@pytest.mark.ranks
@pytest.mark.parametrize("scenario", PASS)
def test_a_cache_can_be_relied_upon(job, scenario):
    expect_passed(job, scenario)


@pytest.mark.ranks
def test_a_checkpoints_digest_is_of_its_bytes_and_not_of_its_place_or_the_number_of_ranks(job):
    one, two, three = (json.loads((job / f"digests{ranks}").read_text()) for ranks in (1, 2, 3))
    assert one == two == three
    original, copied, edited, other_config = one
    assert original == copied
    assert len({original, edited, other_config}) == 3


def test_everything_that_log_probs_depend_on_changes_the_key():
    base = scoring()
    others = [
        replace(base, **{name: value + 1 if isinstance(value, int) else f"{value}!"})
        for name, value in vars(base).items()
    ]
    assert len({one.key for one in (base, *others)}) == 1 + len(vars(base))


@pytest.mark.ranks
def test_a_killed_pass_goes_on_where_it_was(tiny_models, tmp_path):
    llama, folder = str(tiny_models["llama"]), tmp_path / "cache"
    died = run_agenda(2, [["ends_early", [llama, str(folder)]]], tmp_path)
    assert 9 in died.codes
    (cache,) = folder.iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")}
    assert len(before) == 2
    run_agenda(2, [["fills", [llama, str(folder), "padded"]]], tmp_path).expect_success()
    after = {file.name: file.stat().st_mtime_ns for file in cache.glob("*.safetensors")}
    assert len(after) == 3
    assert before.items() <= after.items()


@pytest.mark.ranks
def test_runs_share_a_cache_and_lose_what_a_plain_loop_loses(run: Run, plain_losses, tmp_path):
    shared = {"mode": "cache", "cache_dir": str(tmp_path / "cache")}
    rows = rows_of_words(24)
    first, out = run(2, rows=rows, reference=shared, data={"eval": "pairs.jsonl"})
    first.expect_success()
    assert losses(out) == pytest.approx(plain_losses, abs=1e-5)
    assert "step-0 gate: policy and reference have equal weights" in first.outputs[0]
    assert "engine is not built" not in first.outputs[0]
    # With another number of ranks, too: these are the same micro-batches.
    second, again = run(1, rows=rows, reference=shared, data={"eval": "pairs.jsonl"})
    second.expect_success()
    assert "engine is not built" in second.outputs[0]
    assert "step-0 gate: policy and reference have equal weights" in second.outputs[0]
    assert losses(again) == pytest.approx(plain_losses, abs=1e-5)


@pytest.mark.ranks
def test_another_reference_is_cached_ahead_of_a_run_and_gives_the_losses_of_its_engine(run: Run, tiny_chat, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_chat, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.05)
    model.save_pretrained(other)
    rows, models = rows_of_words(12), {"reference": str(other)}
    live, expected = run(1, rows=rows, model=models)
    live.expect_success()
    folder = expected.parent
    filling = [REPOSITORY / "launch/cache_reference.py", "--config", folder / "run.yaml"]
    filling += ["--output_dir", tmp_path / "ahead", "--reference.cache_dir", tmp_path / "cache"]
    for ranks in (2, 1):  # the second time it checks what it finds
        run_ranks(ranks, filling, folder=folder).expect_success()
    assert not (tmp_path / "ahead/metrics.jsonl").exists()
    reused, out = run(1, rows=rows, model=models, reference={"mode": "cache", "cache_dir": str(tmp_path / "cache")})
    reused.expect_success()
    assert "engine is not built" in reused.outputs[0]
    assert "step-0 gate" not in reused.outputs[0]
    assert losses(out) == pytest.approx(losses(expected), abs=1e-5)


@pytest.mark.ranks
def test_in_bfloat16_a_cached_run_starts_at_ln_2_within_rounding_and_keeps_its_log_probs_in_its_own_folder(run: Run):
    finished, out = run(2, rows=rows_of_words(8), reference={"mode": "cache"}, model={"dtype": "bfloat16"})
    finished.expect_success()
    assert "step-0 gate: policy and reference have equal weights" in finished.outputs[0]
    assert losses(out)[0] == pytest.approx(math.log(2), abs=1e-2)
    assert len(list((out / "reference").glob("*/*.safetensors"))) == 1


def test_a_cache_folder_that_is_a_file_is_named_before_anything_is_built(files, capsys):
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as left:
        train(["--config", "run.yaml", "--reference.mode", "cache", "--reference.cache_dir", "pairs.jsonl/logps"])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.startswith("error: reference.cache_dir must be a folder, got pairs.jsonl/logps")
    assert said.count("\n") == 1
    assert sorted(files.rglob("*")) == before
