"""Mixtures of experts: the loss that balances their routers, by hand and in runs on real ranks."""

import copy
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_ds.cli.preflight import preflight
from dpo_ds.config import parse_run
from dpo_ds.data.batch import packed_batch, padded_batch
from dpo_ds.data.schedule import PaddedRows, plan_training
from dpo_ds.errors import UserError
from dpo_ds.models.attention import sharing_prompts
from dpo_ds.models.scorer import Scorer
from tests.models.test_attention import LENGTHS, random_pairs
from tests.plain_dpo import PlainPair, response_logp
from tests.test_resume import write_run
from tests.test_run import lines, losses, rows_of_words
from tests.test_run import run as run

EXPERTS, TOP, WEIGHT, BUDGET = 4, 2, 0.5, 300
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": EXPERTS, "head_dim": 8},
    "olmoe": {"num_experts": EXPERTS},
}


def mixture(family: str, *, vocabulary: int = 50) -> PreTrainedModel:
    torch.manual_seed(7)
    shape = {
        **{"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": TOP},
        **{"max_position_embeddings": 700, "initializer_range": 0.3, "eos_token_id": 1, "bos_token_id": None},
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **MIXTURES[family])).eval()


@contextmanager
def routed(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Gives what the routers say of every token, ``(tokens, experts)`` of each layer and forward."""
    said: list[Tensor] = []
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    assert len(routers) == 2
    hooks = [router.register_forward_hook(lambda module, given, out: said.append(out[0])) for router in routers]
    yield said
    for hook in hooks:
        hook.remove()


def balance(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Switch Transformer's equations 4 to 6 over the tokens of some rows, each alone in a forward."""
    with routed(model) as said:
        for row in rows:
            model(torch.tensor([row]))
    probabilities = torch.cat(said).softmax(-1)
    share = F.one_hot(probabilities.topk(TOP).indices, EXPERTS).sum(1).float().mean(0)
    return EXPERTS * (share * probabilities.mean(0)).sum()


@pytest.mark.parametrize("family", MIXTURES)
def test_the_routing_loss_is_that_of_all_tokens_and_of_no_padding(family):
    model, pairs = mixture(family), random_pairs(LENGTHS["unlike"])
    scorer = Scorer(model, balances_experts=True)
    scorer(padded_batch(pairs))
    rows = [[*p.prompt_ids, *p.chosen_ids] for p in pairs] + [[*p.prompt_ids, *p.rejected_ids] for p in pairs]
    expected = balance(model, rows).item()
    assert scorer.routing_loss.item() == pytest.approx(expected, abs=1e-6)

    with sharing_prompts(model), routed(model) as said:
        scorer(packed_batch(pairs))
    probabilities = torch.cat(said).softmax(-1)
    assert len(probabilities) == 2 * sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    share = F.one_hot(probabilities.topk(TOP).indices, EXPERTS).sum(1).float().mean(0)
    assert scorer.routing_loss.item() == pytest.approx(
        (EXPERTS * (share * probabilities.mean(0)).sum()).item(), abs=1e-6
    )
    assert scorer.routing_loss.item() != pytest.approx(expected, abs=1e-4), "prompts count as often in both layouts"


def test_without_gradients_or_unasked_there_is_none():
    model, batch = mixture("mixtral"), padded_batch(random_pairs(LENGTHS["unlike"]))
    plain, balanced = Scorer(model), Scorer(model, balances_experts=True)
    plain(batch)
    with torch.no_grad():
        balanced(batch)
    assert plain.routing_loss is balanced.routing_loss is None


@pytest.fixture
def folder(tiny_chat: Path, tmp_path: Path) -> Path:
    found = tmp_path / "mixtral"
    shutil.copytree(tiny_chat, found, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    mixture("mixtral", vocabulary=264).save_pretrained(found)
    return found


def plain_losses(folder: Path, *, ranks: int, weight: float) -> tuple[list[float], list[float]]:
    """Six steps of four pairs; of each the preference loss and the routers', micro-batch by micro-batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pairs = [
        PlainPair(ids(row["prompt"]), [*ids(row["chosen"]), 1], [*ids(row["rejected"]), 1]) for row in rows_of_words(24)
    ]
    longer = np.array([len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)

    def margin(scored: PreTrainedModel, pair: PlainPair) -> Tensor:
        return response_logp(scored, pair.prompt, pair.chosen) - response_logp(scored, pair.prompt, pair.rejected)

    found, balanced = [], []
    for first in range(0, 24, 4):
        optimizer.zero_grad()
        step = range(first, first + 4)
        with torch.no_grad():
            fixed = torch.stack([margin(reference, pairs[number]) for number in step])
        loss = -F.logsigmoid(0.1 * (torch.stack([margin(model, pairs[number]) for number in step]) - fixed)).mean()
        plan = plan_training(step, rows=PaddedRows(longer), ranks=ranks, tokens_per_micro_batch=BUDGET)
        routing = torch.zeros(())
        for micro_batch in (batch for rank in plan for batch in rank if batch.weight):
            some = [pairs[number] for number in micro_batch.pairs]
            rows = [[*pair.prompt, *answer] for pair in some for answer in (pair.chosen, pair.rejected)]
            routing = routing + balance(model, rows) * len(some) / 4
        (loss + weight * routing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
        balanced.append(routing.item())
    return found, balanced


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "memory"), [(1, "none"), (2, "none"), (2, "full")])
def test_a_mixture_trains_as_in_a_plain_loop_and_its_routers_with_it(run, folder, ranks, memory):
    expected, routing = plain_losses(folder, ranks=ranks, weight=WEIGHT)
    finished, out = run(
        ranks,
        rows=rows_of_words(24),
        model={"policy": str(folder)},
        loss={"router_aux": WEIGHT},
        train={"layout": "padded", "tokens_per_micro_batch": BUDGET, "activation_checkpointing": memory},
    )
    finished.expect_success()
    assert losses(out) == pytest.approx(expected, abs=1e-5)
    assert [line["aux_loss"] for line in lines(out)] == pytest.approx(routing, abs=1e-5)
    with (
        safe_open(folder / "model.safetensors", "pt") as given,
        safe_open(out / "export/model.safetensors", "pt") as file,
    ):
        assert sorted(file.keys()) == sorted(given.keys()), "an export is stored as the model was"
        assert any(".experts.3." in name for name in file.keys())  # noqa: SIM118
    alone, _ = plain_losses(folder, ranks=ranks, weight=0.0)
    assert expected[-1] != pytest.approx(alone[-1], abs=1e-4), "the weight is too small to tell anything"


def test_a_model_without_routers_cannot_be_balanced(tiny_chat, tmp_path):
    write_run(tmp_path / "run", tiny_chat)
    argv = ["--config", str(tmp_path / "run/run.yaml"), "--loss.router_aux", "0.1"]
    with pytest.raises(UserError, match=r"router_aux must be 0 for model.policy .*, got 0.1: a .* llama has"):
        preflight(parse_run(argv), ranks=2)
