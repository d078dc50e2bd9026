"""A sum of losses that need the whole step and means of earlier ones, on real ranks, beside a plain PyTorch loop."""

import copy
import json

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.plain_dpo import PlainPair, response_logp
from tests.ranks import run_ranks
from tests.test_run import TRAIN, lines, rows_of_words

pytestmark = pytest.mark.ranks

BETA, ALPHA, STEPS = 0.3, 0.4, 6


def discounted_logp(model: torch.nn.Module, pair: PlainPair, response: list[int]) -> torch.Tensor:
    """Counts tokens beyond the length of the shorter response by ``ALPHA``."""
    shared = min(len(pair.chosen), len(pair.rejected))
    head = response_logp(model, pair.prompt, response, [n < shared for n in range(len(response))])
    return head + ALPHA * (response_logp(model, pair.prompt, response) - head)


def plain_losses(model: torch.nn.Module, steps: list[list[PlainPair]]) -> tuple[list[float], list[float]]:
    """Trains the model on whole steps; returns each step's loss and the shift that it had."""
    reference = copy.deepcopy(model).eval()
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rewards, recent, losses, shifts = list[float](), 0.0, [], []
    for pairs in steps:
        optimizer.zero_grad()
        policy = [[discounted_logp(model, pair, answer) for answer in (pair.chosen, pair.rejected)] for pair in pairs]
        with torch.no_grad():
            fixed = [
                [discounted_logp(reference, pair, answer) for answer in (pair.chosen, pair.rejected)] for pair in pairs
            ]
        chosen, rejected = torch.stack([torch.stack(row) for row in policy]).T
        fixed_chosen, fixed_rejected = torch.stack([torch.stack(row) for row in fixed]).T
        h_c, h_r = chosen - fixed_chosen, rejected - fixed_rejected
        shift = sum(rewards) / len(rewards) if rewards else 0.0
        bco = -F.logsigmoid(BETA * h_c - shift) - F.logsigmoid(-(BETA * h_r - shift))
        aot = -F.logsigmoid(BETA * ((chosen - rejected).sort().values - (fixed_chosen - fixed_rejected).sort().values))
        margin = BETA * float((h_c - h_r).detach().mean())
        beta_dpo = -F.logsigmoid(BETA * (1 + 0.9 * (margin - recent)) * (h_c - h_r))
        loss = (bco + 0.5 * aot + 0.3 * beta_dpo).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        shifts.append(shift)
        rewards += (BETA * torch.cat([h_c, h_r]).detach()).tolist()
        recent = 0.9 * recent + 0.1 * margin
    return losses, shifts


def test_losses_of_a_whole_step_are_those_of_a_plain_loop_and_go_on_on_other_ranks(tiny_chat, tmp_path):
    rows = rows_of_words(4 * STEPS)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    zero = {"zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    run = {
        "model": {"policy": str(tiny_chat), "dtype": "float32"},
        "data": {"train": "pairs.jsonl", "eval": "pairs.jsonl", "max_length": 100, "shuffle": False},
        "loss": {
            **{"type": "bco_pair", "beta": BETA, "ld_alpha": ALPHA, "add": {"aot": 0.5, "beta_dpo": 0.3}},
            "parameters": {"beta_sensitivity": 0.9},
        },
        "train": {
            **{"pairs_per_step": 4, "tokens_per_micro_batch": 95, "learning_rate": 1e-3, "schedule": "constant"},
            **{"warmup_ratio": 0.0},
        },
        "deepspeed": {"policy": "zero.json", "reference": "zero.json"},
        "checkpoint": {"every": 3, "keep": 5},
        "tracking": {"wandb": "disabled"},
        "output_dir": str(tmp_path / "two"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    command = [TRAIN, "--config", tmp_path / "run.yaml"]
    finished = run_ranks(2, command, folder=tmp_path).expect_success()
    assert "step-0 gate" in finished.outputs[0]

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pairs = [PlainPair(ids(row["prompt"]), [*ids(row["chosen"]), 1], [*ids(row["rejected"]), 1]) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32)
    expected, shifts = plain_losses(model, [pairs[start : start + 4] for start in range(0, len(pairs), 4)])
    two = lines(tmp_path / "two")
    assert [line["loss"] for line in two] == pytest.approx(expected, abs=1e-5)
    assert abs(expected[-1] - expected[0]) > 0.05, "the steps are too small to tell anything"
    middle = tmp_path / "two/checkpoints/step-00000003"
    saved = json.loads((middle / "state.json").read_text())["progress"]["running"]
    assert saved["bco_pair"] == pytest.approx([shifts[3], 12], abs=1e-6)
    assert abs(shifts[3]) > 0.01

    # From the middle of the other run: one rank and larger micro-batches, or two ranks that share rows.
    for name, ranks, more in (
        ("one", 1, ["--train.tokens_per_micro_batch", "400"]),
        ("shared", 2, ["--train.sequence_parallel_size", "2"]),
    ):
        elsewhere = ["--output_dir", tmp_path / name, "--checkpoint.resume", middle, *more]
        run_ranks(ranks, [*command, *elsewhere], folder=tmp_path).expect_success()
        again = lines(tmp_path / name)
        assert [line["loss"] for line in again] == pytest.approx(expected[3:], abs=1e-5)
        assert_alike(again, two[3:])
        assert_alike(lines(tmp_path / name, "eval")[-1:], lines(tmp_path / "two", "eval")[-1:])
    last = lines(tmp_path / "two", "eval")[-1]
    assert sum(last["histogram/rewards/margins"]["counts"]) == len(pairs)


def assert_alike(some: list[dict], others: list[dict]) -> None:
    for line, other in zip(some, others, strict=True):
        for name in ("loss", "rewards/margins", "kl/chosen", "gradient_weight", "length_correlation", "displaced"):
            assert line[name] == pytest.approx(other[name], abs=2e-5), name
