"""Whole runs of launch/train.py on real ranks, beside a plain PyTorch loop."""

import json
import math
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.data.small_tokenizer import small_tokenizer
from tests.plain_dpo import Lion, PlainPair, RMSprop, dpo_losses
from tests.ranks import REPOSITORY, Finished, run_ranks

pytestmark = pytest.mark.ranks

TRAIN = REPOSITORY / "launch/train.py"
WORDS = ["ab", " a", "tea", " is", "hot", " milk", "\n\n", " salt", "x", "."]


def rows_of_words(count: int) -> list[dict[str, str]]:
    """Pairs of unequal lengths, by a fixed rule."""
    draw = torch.Generator().manual_seed(5)

    def text(words: int) -> str:
        return "".join(WORDS[n] for n in torch.randint(len(WORDS), (words,), generator=draw).tolist())

    return [
        {
            "prompt": f"{n}: {text(2 + n % 5)}",
            "chosen": f"yes {text(1 + n % 7)}",
            "rejected": f"no {text(2 + 3 * n % 8)}",
        }
        for n in range(count)
    ]


Run = Callable[..., tuple[Finished, Path]]


@pytest.fixture
def run(tmp_path: Path, tiny_chat: Path) -> Run:
    """Trains on a number of ranks; keyword arguments are the run file's sections, laid over a small run's."""

    def start(
        ranks: int,
        *,
        rows: list[dict[str, str]],
        held_out: Sequence[dict[str, str]] = (),
        env: dict[str, str] | None = None,
        **sections: Any,
    ) -> tuple[Finished, Path]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for name, some in (("pairs", rows), ("held_out", held_out)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        # Threshold 0, so that a tiny model's parameters really are partitioned.
        zero = {"zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}}
        (folder / "zero.json").write_text(json.dumps(zero))
        config: dict[str, Any] = {
            "model": {"policy": str(tiny_chat), "dtype": "float32"},
            "data": {"train": "pairs.jsonl", "max_length": 100, "shuffle": False},
            "train": {
                "pairs_per_step": 4,
                "tokens_per_micro_batch": 200,
                "learning_rate": 1e-3,
                "schedule": "constant",
                "warmup_ratio": 0.0,
            },
            "deepspeed": {"policy": "zero.json", "reference": "zero.json"},
            "tracking": {"wandb": "disabled"},
            "env": {"API_KEY": "secret"},
            "output_dir": str(folder / "out"),
        }
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values}
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        return run_ranks(ranks, [TRAIN, "--config", folder / "run.yaml"], folder=folder, env=env), folder / "out"

    return start


def lines(out: Path, split: str = "train") -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def works_in(process: Path, folder: Path) -> bool:
    with suppress(OSError):  # it may have ended meanwhile
        return (process / "cwd").readlink().is_relative_to(folder)
    return False


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out)]


@pytest.fixture(scope="module")
def plain_losses(tiny_chat: Path) -> list[float]:
    """Six steps of four pairs by plain PyTorch."""
    return six_plain_steps(tiny_chat)


def six_plain_steps(
    tiny_chat: Path, *, model: torch.nn.Module | None = None, learning_rate: float = 1e-3, **options: Any
) -> list[float]:
    """Six steps of four pairs by plain PyTorch, with transformers' own tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pairs = [
        PlainPair(ids(row["prompt"]), [*ids(row["chosen"]), 1], [*ids(row["rejected"]), 1]) for row in rows_of_words(24)
    ]
    assert tokenizer.eos_token_id == 1
    model = model or AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32)
    steps = [pairs[start : start + 4] for start in range(0, 24, 4)]
    return dpo_losses(model, steps, beta=0.1, learning_rate=learning_rate, clip=1.0, **options)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_six_steps_lose_what_a_plain_loop_loses_on_any_number_of_ranks(run, plain_losses, ranks, layout):
    finished, out = run(ranks, rows=rows_of_words(24), train={"layout": layout})
    finished.expect_success()
    assert losses(out) == pytest.approx(plain_losses, abs=1e-5)
    assert abs(losses(out)[0] - math.log(2)) < 1e-6
    assert lines(out)[0]["rewards/chosen"] == lines(out)[0]["rewards/rejected"] == 0
    assert plain_losses[-1] < plain_losses[0] - 0.01, "the steps are too small to tell anything"


# With small parameters that stay whole, and with shards in host memory.
ELSEWHERE = {"policy": "ds_configs/zero3_cpu.json", "reference": "ds_configs/zero3_reference_offload.json"}


@pytest.mark.parametrize(("ranks", "weight", "configs"), [(2, 0.6, {}), (1, 1.0, {}), (2, 0.4, ELSEWHERE)])
def test_a_reference_that_follows_the_policy_is_that_of_a_plain_loop(
    run, tiny_chat, plain_losses, ranks, weight, configs
):
    moving = {"sync_every": 2, "sync_weight": weight}
    expected = six_plain_steps(tiny_chat, **moving)
    finished, out = run(ranks, rows=rows_of_words(24), reference=moving, deepspeed=configs)
    finished.expect_success()
    assert losses(out) == pytest.approx(expected, abs=1e-5)
    assert losses(out)[2:] != pytest.approx(plain_losses[2:], abs=1e-3)
    if weight == 1:
        assert [line["rewards/chosen"] == 0 for line in lines(out)] == [True, False] * 3


OPTIMIZERS: dict[str, tuple[dict[str, Any], Callable[..., torch.optim.Optimizer]]] = {
    "lion": ({"betas": [0.9, 0.99], "weight_decay": 0.5}, partial(Lion, betas=(0.9, 0.99), weight_decay=0.5)),
    "rmsprop": ({"betas": [0.0, 0.99], "eps": 1e-7}, partial(RMSprop, decay=0.99, eps=1e-7)),
}
OFFLOADED = {"policy": "ds_configs/zero3_offload_optimizer.json"}


@pytest.mark.parametrize(("ranks", "configs"), [(2, {}), (1, OFFLOADED)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizer_loses_what_its_equation_loses(run, tiny_chat, plain_losses, name, ranks, configs):
    numbers, optimizer_of = OPTIMIZERS[name]
    expected = six_plain_steps(tiny_chat, learning_rate=1e-4, optimizer_of=optimizer_of)
    given = {"optimizer": name, "learning_rate": 1e-4, **numbers}
    finished, out = run(ranks, rows=rows_of_words(24), train=given, deepspeed=configs)
    finished.expect_success()
    assert losses(out) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.01, "the steps are too small to tell anything"


TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|end|>{{ m.content }}\n{% else %}{{ m.content }}<eos>{% endif %}"
    "{% endfor %}"
)


def test_soft_labels_margins_weights_and_several_turns_lose_what_a_plain_loop_loses(run, tiny_chat, tmp_path_factory):
    tokens = tmp_path_factory.mktemp("tokens")
    small_tokenizer(tokens, template=TURNS)
    given = [{"p": 1 - 0.1 * (n % 4), "m": 0.2 * (n % 3) - 0.1, "w": 0.5 + n % 5} for n in range(12)]
    rows, pairs = [], []
    tokenizer = AutoTokenizer.from_pretrained(tokens)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for n, (row, numbers) in enumerate(zip(rows_of_words(12), given, strict=True)):
        asked, answered = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}
        # Every second one goes on: an answer, another question, and an answer again.
        more = [{"role": "user", "content": "and"}, {"role": "assistant", "content": "so"}] * (n % 2)
        rejected = [asked, {"role": "assistant", "content": row["rejected"]}]
        rows.append({"chosen": [asked, answered, *more], "rejected": rejected, **numbers})
        parts = [[*ids(row["chosen"]), 1], *([ids("<|end|>and\n"), [*ids("so"), 1]] if more else [])]
        pairs.append(
            PlainPair(
                ids(f"<|end|>{row['prompt']}\n"),
                [token for part in parts for token in part],
                [*ids(row["rejected"]), 1],
                *numbers.values(),
                chosen_scored=[place != 1 for place, part in enumerate(parts) for _ in part],
            )
        )
    source = {"path": "pairs.jsonl", "columns": {"probability": "p", "margin": "m", "weight": "w"}}
    finished, out = run(
        2,
        rows=rows,
        model={"tokenizer": str(tokens)},
        data={"train": [source], "eval": [source], "scored": "all_assistant_turns"},
        train={"tokens_per_micro_batch": 120},
    )
    finished.expect_success()
    assert "policy and reference have equal weights and score alike" in finished.outputs[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32)
    plain = dpo_losses(model, [pairs[:4], pairs[4:8], pairs[8:]], beta=0.1, learning_rate=1e-3, clip=1.0)
    assert losses(out) == pytest.approx(plain, abs=1e-5)
    starts = [
        w * (p * math.log1p(math.exp(m)) + (1 - p) * math.log1p(math.exp(-m))) for p, m, w in map(dict.values, given)
    ]
    assert lines(out, "eval")[0]["loss"] == pytest.approx(sum(starts) / 12, abs=1e-6)


def test_one_rank_by_four_is_two_by_two_is_four_by_one(run, plain_losses):
    # The longest pair takes 2 x 47 tokens, so that a budget of 100 holds one pair.
    by_split = []
    for ranks, budget in ((1, 100), (2, 100), (4, 100), (1, 2000)):
        split = {"tokens_per_micro_batch": budget, "layout": "padded"}
        finished, out = run(ranks, rows=rows_of_words(24), train=split)
        finished.expect_success()
        by_split.append(losses(out))
    for split in by_split:
        assert split == pytest.approx(plain_losses, abs=1e-5)


def test_twenty_steps_lose_the_same_packed_and_padded(run):
    by_layout = []
    for layout in ("packed", "padded"):
        finished, out = run(2, rows=rows_of_words(80), train={"layout": layout, "learning_rate": 3e-4})
        finished.expect_success()
        by_layout.append(lines(out))
    packed, padded = ([line["loss"] for line in some] for some in by_layout)
    assert len(packed) == 20
    assert packed == pytest.approx(padded, abs=1e-5)
    assert packed[-1] < packed[0] - 0.05
    assert all(line["fill_rate"] == 1.0 for line in by_layout[0])
    assert by_layout[0][0]["tokens"] == by_layout[1][0]["tokens"]


@pytest.mark.parametrize(("layout", "mode"), [("packed", "engine"), ("padded", "engine"), ("packed", "cache")])
def test_mlps_by_tiles_and_inputs_on_the_host_lose_what_a_plain_loop_loses(run, plain_losses, layout, mode):
    small = {"tokens_per_mlp_tile": 7, "activation_checkpointing": "offload", "layout": layout}
    finished, out = run(2, rows=rows_of_words(24), train=small, reference={"mode": mode})
    finished.expect_success()
    assert losses(out) == pytest.approx(plain_losses, abs=1e-5)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_reference_with_larger_micro_batches_gives_the_same_losses(run, plain_losses, layout):
    split = {"tokens_per_micro_batch": 100, "layout": layout}
    finished, out = run(2, rows=rows_of_words(24), train=split, reference={"tokens_per_micro_batch": 400})
    finished.expect_success()
    assert losses(out) == pytest.approx(plain_losses, abs=1e-5)


def test_the_entropies_are_those_of_a_plain_loop(run, tiny_chat):
    rows = rows_of_words(8)
    sections = {"data": {"eval": "held_out.jsonl"}, "tracking": {"entropy": True}}
    shared = {"max_steps": 1, "sequence_parallel_size": 2}
    for ranks, train in ((1, {"max_steps": 1}), (2, shared)):
        _, out = run(ranks, rows=rows[:4], held_out=rows, train=train, **sections)
        tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
        model = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float64)
        for side in ("chosen", "rejected"):
            means = []
            for row in rows:
                prompt, response = (
                    tokenizer(row[part], add_special_tokens=False)["input_ids"] for part in ("prompt", side)
                )
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *response, 1]])).logits[0, len(prompt) - 1 : -1]
                means.append(float(torch.distributions.Categorical(logits=logits).entropy().mean()))
            first, name = lines(out, "eval")[0], f"entropy/{side}"
            assert first[name] == pytest.approx(sum(means) / 8, abs=1e-5)
            assert lines(out)[0][name] == pytest.approx(sum(means[:4]) / 4, abs=1e-5)


def test_bfloat16_starts_at_rewards_of_exactly_zero_and_learns(run):
    finished, out = run(2, rows=rows_of_words(24), model={"dtype": "bfloat16"})
    finished.expect_success()
    first, *_, last = lines(out)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("count", [5, 7, 9])
def test_uneven_pairs_finish_with_every_collective_in_step(run, ranks, count):
    rows = rows_of_words(count)
    finished, out = run(
        ranks,
        rows=rows,
        env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"},
        data={"eval": "pairs.jsonl"},
        train={"tokens_per_micro_batch": 100},
    )
    finished.expect_success()
    assert sum(line["pairs"] for line in lines(out)) == count
    assert [line["pairs"] for line in lines(out, "eval")] == [count, count]


def test_an_evaluation_behind_a_weighted_mixture_does_not_depend_on_ranks_or_budget(run):
    found = []
    mixture = [{"path": "pairs.jsonl", "weight": 1.5}, {"path": "held_out.jsonl", "weight": 0.5}]
    both = [{"path": "pairs.jsonl"}, {"path": "held_out.jsonl", "name": "new"}]
    for ranks, budget in ((1, 100), (2, 150), (3, 2000)):
        finished, out = run(
            ranks,
            rows=rows_of_words(11),
            held_out=rows_of_words(15)[11:],
            data={"train": mixture, "eval": both, "shuffle": True},
            train={"tokens_per_micro_batch": budget, "eval_every": 1},
        )
        finished.expect_success()
        evaluations = lines(out, "eval")
        found.append([line[name] for line in evaluations for name in ("loss", "source/new/loss")])
        for line in evaluations:
            for name in ("loss", "rewards/accuracies"):
                of_all = (11 * line[f"source/pairs/{name}"] + 4 * line[f"source/new/{name}"]) / 15
                assert of_all == pytest.approx(line[name], rel=1e-6)
    assert [line["step"] for line in evaluations] == [0, 1, 2, 3, 4, 5]
    # Of 11 pairs 16.5 are taken, rounded half up, of 4 pairs 2.
    assert [line["pairs"] for line in lines(out)] == [4, 4, 4, 4, 3]
    for evaluation in found[1:]:
        assert evaluation == pytest.approx(found[0], abs=1e-5)


def test_without_a_reference_the_loss_is_of_the_policys_own_log_probs(run, tiny_chat):
    finished, out = run(
        2, rows=rows_of_words(8), reference={"mode": "none"}, loss={"type": "sigmoid_norm", "beta": 2.0}
    )
    finished.expect_success()
    first = lines(out)[0]
    assert first["rewards/chosen"] < 0
    assert first["seconds/reference"] < first["seconds/policy"]


def segments() -> set[Path]:
    """Shared memory on this machine, without semaphores, whose names last for a moment."""
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.")}


def test_the_output_folder_holds_what_was_promised_and_nothing_stays_behind(run, tmp_path):
    before = segments()
    finished, out = run(
        2,
        rows=rows_of_words(8),
        data={"eval": "pairs.jsonl"},
        tracking={"wandb": "offline", "answers": 3, "answer_tokens": 9, "machines": True},
        env={"API_KEY": "secret"},
    )
    finished.expect_success()
    assert {path.name for path in out.iterdir()} == {
        "config.yaml",
        "curves.png",
        "data",
        "export",
        "metrics.jsonl",
        "summary.json",
        "wandb",
        "wandb_run_id",
    }
    assert segments() <= before
    assert not [process for process in Path("/proc").glob("[0-9]*") if works_in(process, out.parent)]
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["data"]["train"] == str(out.parent / "pairs.jsonl")
    assert not any("secret" in path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["pairs"], summary["world_size"]) == ("complete", 2, 8, 2)
    assert len(summary["peak_host_bytes_per_rank"]) == 2
    expected = "loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected "
    expected += "grad_norm learning_rate pairs tokens step_seconds tokens_per_second mfu fill_rate seconds/reference "
    expected += "seconds/policy seconds/wait seconds/batches seconds/update lengths/chosen lengths/rejected"
    assert set(expected.split()) <= set(lines(out)[0])
    assert all(line[f"system/{socket.gethostname()}/host_memory_gib"] > 1 / 8 for line in lines(out))
    exported = AutoModelForCausalLM.from_pretrained(out / "export")
    tokenizer = AutoTokenizer.from_pretrained(out / "export")
    assert tokenizer.eos_token_id == 1
    assert exported.config.dtype is torch.float32
    said = lines(out, "eval")[-1]["answers"]
    for row, heard in zip(rows_of_words(8), said, strict=False):
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        answer = exported.generate(ids, do_sample=False, max_new_tokens=9, eos_token_id=1, pad_token_id=1)[0]
        assert heard["answer"] == tokenizer.decode(answer[ids.shape[1] :], skip_special_tokens=True)
        assert (heard["prompt"], heard["chosen"]) == (row["prompt"], row["chosen"])
    assert len(said) == 3


def test_a_run_that_diverges_stops_all_ranks_with_the_step_and_the_pairs_named(run):
    finished, out = run(2, rows=rows_of_words(16), train={"learning_rate": 1e30})
    assert finished.codes[0] == 1
    assert finished.codes[1] != 0
    errors = [line for error in finished.errors for line in error.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "step 2: the loss is not finite for 4 pairs (" in errors[0]
    # Unshuffled, the second step holds rows 5 to 8.
    assert all(f"pairs.jsonl row {row}" in errors[0] for row in (5, 6, 7, 8))
    assert not (out / "export").exists()


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_the_pairs_that_are_named_are_those_to_blame(run, tiny_chat, tmp_path_factory, loss):
    policy = tmp_path_factory.mktemp("broken")
    shutil.copytree(tiny_chat, policy, dirs_exist_ok=True)
    rows = rows_of_words(8)
    rows[2]["chosen"] += "~ so"
    (bad,) = AutoTokenizer.from_pretrained(policy)("~", add_special_tokens=False)["input_ids"]
    weights = load_file(policy / "model.safetensors")
    weights["model.embed_tokens.weight"][bad] = float("inf")
    save_file(weights, policy / "model.safetensors", metadata={"format": "pt"})
    models = {"policy": str(policy), "reference": str(tiny_chat)}
    finished, _ = run(2, rows=rows, model=models, loss={"type": loss})
    assert "step 1: the loss is not finite for 1 pair (" in finished.errors[0], finished.errors
    assert "pairs.jsonl row 3)" in finished.errors[0]


def test_real_pairs_and_a_real_model_generalise(run, material):
    """Unseen pairs, of prompts that are seen: the 836 pairs have 153 prompts."""
    rows = [json.loads(line) for line in (material / "prefs/pandalm_dpo.jsonl").read_text().splitlines()]
    fitting = {"max_length": 512, "max_dropped": 0.3, "shuffle": True}
    finished, out = run(
        2,
        rows=[row for n, row in enumerate(rows) if n % 7],
        held_out=rows[::7],
        model={"policy": str(material / "models/stories260K-hf")},
        data={"eval": "held_out.jsonl", **fitting},
        train={"pairs_per_step": 8, "tokens_per_micro_batch": 4096, "learning_rate": 2e-5},
    )
    finished.expect_success()
    before, after = lines(out, "eval")
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert 95 <= after["pairs"] <= 105
    assert after["loss"] < 0.6


@pytest.mark.parametrize("twice", [("policy",), ("reference",), ("policy", "reference")], ids=" and ".join)
def test_weights_kept_twice_lose_the_same(run, plain_losses, tmp_path, twice):
    """ZeRO++'s hpZ, of either engine: shards over all ranks, and again over those of one machine, here two."""
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2}
    (tmp_path / "hpz.json").write_text(json.dumps({"zero_optimization": zero}))
    start = partial(run, 4, rows=rows_of_words(24), deepspeed=dict.fromkeys(twice, str(tmp_path / "hpz.json")))
    finished, out = start(checkpoint={"every": 3, "keep": 2})
    finished.expect_success()
    assert losses(out) == pytest.approx(plain_losses, rel=1e-5, abs=1e-6)
    if twice == ("policy",):
        finished, again = start(checkpoint={"resume": str(out / "checkpoints/step-00000003")})
        finished.expect_success()
        assert losses(again) == losses(out)[3:]
