"""Runs that train an adapter on real ranks, beside a plain loop with peft, and what they leave."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ds.cli.preflight import preflight
from dpo_ds.config import parse_run
from dpo_ds.errors import UserError
from tests.plain_dpo import PlainPair, response_logp
from tests.ranks import run_ranks
from tests.test_resume import EXPORT, SETTINGS, assert_equal_to_rounding, copied, record, start, write_run
from tests.test_run import TRAIN as LAUNCH
from tests.test_run import Run, losses, rows_of_words
from tests.test_run import run as run

# What peft reads of a model.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LORA: dict[str, Any] = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TRAIN = {"train": {"learning_rate": 1e-2}}


def plain_pairs(folder: Path) -> list[PlainPair]:
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return [
        PlainPair(ids(row["prompt"]), [*ids(row["chosen"]), 1], [*ids(row["rejected"]), 1]) for row in rows_of_words(24)
    ]


def plain_losses(folder: Path, config: LoraConfig) -> list[float]:
    """Six steps of four pairs by torch and peft alone; the reference is the base."""
    pairs = plain_pairs(folder)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def margin(pair: PlainPair) -> torch.Tensor:
        return response_logp(model, pair.prompt, pair.chosen) - response_logp(model, pair.prompt, pair.rejected)

    found = []
    for first in range(0, 24, 4):
        optimizer.zero_grad()
        step = []
        for pair in pairs[first : first + 4]:
            with torch.no_grad(), model.disable_adapter():
                reference = margin(pair)
            step.append(-torch.nn.functional.logsigmoid(0.1 * (margin(pair) - reference)))
        loss = torch.stack(step).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "mode", "extra", "sharing_rows"),
    [
        (2, "adapter", {}, 1),
        (2, "adapter", {}, 2),
        (1, "engine", {"use_rslora": True}, 1),
    ],
)
def test_an_adapter_trains_as_in_a_plain_loop_with_peft(run: Run, tiny_chat: Path, ranks, mode, extra, sharing_rows):
    train = TRAIN["train"] | {"sequence_parallel_size": sharing_rows}
    finished, out = run(ranks, rows=rows_of_words(24), adapter={**LORA, **extra}, reference={"mode": mode}, train=train)
    finished.expect_success()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA["target_modules"], task_type="CAUSAL_LM", **extra)
    expected = plain_losses(tiny_chat, config)
    assert expected[0] == pytest.approx(math.log(2), abs=1e-7)
    assert expected[-1] < 0.68
    assert losses(out) == pytest.approx(expected, abs=1e-5)
    assert "step-0 gate: policy and reference have equal weights" in finished.outputs[0]


@pytest.fixture(scope="module")
def trained(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks with DoRA whose reference is its base, saved every two steps."""
    folder = write_run(
        tmp_path_factory.mktemp("adapter") / "run",
        tiny_chat,
        adapter={**LORA, "use_dora": True},
        reference={"mode": "adapter"},
        train={**SETTINGS["train"], "learning_rate": 1e-2, "max_steps": 4, "eval_every": 2},
        checkpoint={"every": 2, "keep": 3},
    )
    start(folder).expect_success()
    return folder


@pytest.mark.ranks
def test_what_is_exported_is_an_adapter_that_peft_opens_and_that_scores_alike(trained: Path, tiny_chat: Path):
    export = trained / "out/export"
    assert {file.name for file in export.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert not (export / "config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, export).eval()
    stored = load_file(export / "adapter_model.safetensors")
    assert set(get_peft_model_state_dict(model)) == set(stored)
    assert any("magnitude" in name for name in stored)
    pairs = plain_pairs(tiny_chat)[13:18]
    last = [line for line in record(trained) if line["split"] == "eval"][-1]
    with torch.no_grad():
        chosen = torch.stack([response_logp(model, pair.prompt, pair.chosen) for pair in pairs]).mean()
        with model.disable_adapter():
            before = torch.stack([response_logp(model, pair.prompt, pair.chosen) for pair in pairs]).mean()
    assert last["step"] == 4
    assert last["logps/chosen"] == pytest.approx(chosen.item(), abs=1e-4)
    assert last["rewards/chosen"] == pytest.approx(0.1 * (chosen - before).item(), abs=1e-5)
    assert abs(last["rewards/chosen"]) > 1e-3


@pytest.mark.ranks
def test_checkpoints_hold_the_adapter_alone_and_a_resumed_run_ends_as_one_that_was_not_stopped(
    trained: Path, tmp_path: Path
):
    shutil.copytree(trained, tmp_path / "again")
    again, second = tmp_path / "again", trained / "out/checkpoints/step-00000002"
    exported = load_file(trained / "out/export/adapter_model.safetensors")
    values = sum(weight.numel() for weight in exported.values())
    # Masters and two moments of the adapter; the base's weights alone would be 140 kB more.
    assert sum(file.stat().st_size for file in second.glob("*.pt")) < 12 * values + 2**16
    shutil.rmtree(again / "out")
    run_file = (again / "run.yaml").read_text().replace(str(trained), str(again))
    (again / "run.yaml").write_text(run_file)
    finished = start(again, "--checkpoint.resume", str(second)).expect_success()
    assert "going on behind step 2 of 4" in finished.outputs[0]
    lines = [line for line in record(trained) if line["step"] > 2]
    assert [line for line in record(again) if line["step"] > 2] == lines
    resumed = load_file(again / "out/export/adapter_model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in exported.items())


ON_HOST = {"offload_optimizer": {"device": "cpu"}}


def without_its_past(trained: Path, folder: Path, zero: dict[str, Any]) -> tuple[Path, Path]:
    """Returns a copy of a run that has not begun, and another ds_config for it."""
    again = copied(trained, folder)
    shutil.rmtree(again / "out")
    config = json.loads((again / "zero.json").read_text())
    config["zero_optimization"] |= zero
    (again / "elsewhere.json").write_text(json.dumps(config))
    return again, again / "elsewhere.json"


def assert_equal_behind_step_2(one: Path, other: Path) -> None:
    assert_equal_to_rounding(*([line for line in record(run) if line["step"] > 2] for run in (one, other)), 1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "zero"), [(1, {}), (3, {}), (2, ON_HOST)], ids=["1", "3", "2, offloaded"])
def test_an_adapter_goes_on_elsewhere(trained: Path, tmp_path: Path, ranks, zero):
    again, ds_config = without_its_past(trained, tmp_path / "again", zero)
    second = trained / "out/checkpoints/step-00000002"
    command = [LAUNCH, "--config", again / "run.yaml", "--checkpoint.resume", second, "--deepspeed.policy", ds_config]
    run_ranks(ranks, command, folder=again).expect_success()
    assert_equal_behind_step_2(again, trained)


@pytest.mark.ranks
def test_an_adapter_that_began_with_masters_on_the_host_goes_on_with_them_on_the_device(trained: Path, tmp_path: Path):
    began, ds_config = without_its_past(trained, tmp_path / "began", ON_HOST)
    start(began, "--deepspeed.policy", str(ds_config)).expect_success()
    assert_equal_behind_step_2(began, trained)
    again, _ = without_its_past(trained, tmp_path / "again", {})
    start(again, "--checkpoint.resume", str(began / "out/checkpoints/step-00000002")).expect_success()
    assert_equal_behind_step_2(again, trained)


@pytest.mark.ranks
def test_the_adapter_of_a_checkpoint_is_exported_without_training(trained: Path, tmp_path: Path):
    command = [EXPORT, "--config", trained / "run.yaml", "--export.folder", tmp_path / "adapter"]
    run_ranks(1, command, folder=tmp_path).expect_success()
    stored, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", trained / "out/export")
    )
    assert stored.keys() == expected.keys()
    assert all(torch.equal(weight, stored[name]) for name, weight in expected.items())


@pytest.mark.ranks
def test_an_adapter_is_continued_against_a_frozen_copy_of_itself_and_merged_into_a_whole_model(
    trained: Path, tiny_chat: Path, tmp_path: Path
):
    export = trained / "out/export"
    folder = write_run(
        tmp_path / "run",
        tiny_chat,
        adapter={"path": str(export)},
        reference={"mode": "adapter"},
        export={"merged": True},
        train={**SETTINGS["train"], "learning_rate": 1e-2, "max_steps": 2, "eval_every": 2},
    )
    finished = start(folder).expect_success()
    assert "step-0 gate: policy and reference have equal weights" in finished.outputs[0]
    before = [line for line in record(trained) if line["split"] == "eval"][-1]
    first, after = [line for line in record(folder) if line["split"] == "eval"]
    assert first["logps/chosen"] == pytest.approx(before["logps/chosen"], abs=1e-5)
    assert (first["rewards/chosen"], first["rewards/rejected"]) == (0, 0)
    assert abs(after["rewards/chosen"]) > 1e-4
    assert after["rewards/chosen"] == pytest.approx(0.1 * (after["logps/chosen"] - first["logps/chosen"]), abs=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(folder / "out/export").eval()
    assert not hasattr(whole, "peft_config")
    with torch.no_grad():
        chosen = [response_logp(whole, pair.prompt, pair.chosen) for pair in plain_pairs(tiny_chat)[13:18]]
    assert torch.stack(chosen).mean().item() == pytest.approx(after["logps/chosen"], abs=1e-4)


def test_an_adapter_that_does_not_fit_is_refused_before_the_engines(tiny_chat: Path, tmp_path: Path):
    folder = write_run(tmp_path / "run", tiny_chat)

    def look(adapter: str) -> str:
        return preflight(parse_run(["--config", str(folder / "run.yaml"), "--adapter", adapter]), ranks=2).plan

    with pytest.raises(UserError, match=r"got 'q_prj'; did you mean q_proj\?"):
        look("{target_modules: [q_prj]}")
    with pytest.raises(UserError, match="must not name the head, got 'lm_head'"):
        look("{target_modules: [lm_head]}")
    with pytest.raises(UserError, match=r"adapter\.path must be a folder with an adapter_config\.json"):
        look(f"{{path: {tiny_chat}}}")
    assert "frozen, with LoRA of rank 3" in look("{r: 3}")
