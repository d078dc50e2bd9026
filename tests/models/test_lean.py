"""Modules that keep little for backward give what a model's own give."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from dpo_ds.data.batch import packed_batch
from dpo_ds.models.adapters import Adapter, attach
from dpo_ds.models.attention import share_prompts
from dpo_ds.models.causal_lm import checkpoint_activations
from dpo_ds.models.lean import keep_little
from dpo_ds.models.scorer import Scorer
from dpo_ds.models.tiles import tile_mlps
from tests.models.test_attention import LENGTHS, random_pairs
from tests.models.tiny_models import FAMILIES, tiny_model

OWN_MLP = LlamaMLP.forward
BATCH = packed_batch(random_pairs(LENGTHS["unlike"]))
LEAN = {  # norms, MLPs; two layers each
    "llama": (5, 2),
    "llama with tied heads": (5, 2),
    "mistral": (5, 2),
    "qwen2": (5, 2),
    "qwen2_moe": (5, 2),
    "qwen3": (9, 2),
    "gemma2": (0, 0),
    "gemma3_text": (0, 0),
    "phi": (0, 0),
    "phi3": (5, 0),
    "olmo2": (0, 2),
    "smollm3": (5, 2),
    "gpt2": (0, 0),
}


def two_models(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Returns a model on packed rows and its copy that keeps little."""
    model = tiny_model(family, dtype=dtype)
    share_prompts(model)
    lean = copy.deepcopy(model)
    keep_little(lean)
    return model, lean


def scores_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    logps = Scorer(model)(BATCH)
    logps.sum().backward()
    return logps.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def kept_bytes(model: nn.Module) -> int:
    kept = {weight.untyped_storage().data_ptr(): 0 for weight in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.base_model(BATCH.input_ids, spans=BATCH.spans, position_ids=BATCH.position_ids)
    assert outputs.last_hidden_state.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_which_modules_of_a_family_keep_little(family):
    model = tiny_model(family)
    keep_little(model)
    replaced = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    norms, mlps = (sum(name.endswith(kind) for name in replaced) for kind in ("Norm", "MLP"))
    assert (norms, mlps) == LEAN[family]
    assert len(replaced) == norms + 2 * mlps


@pytest.mark.parametrize("family", [family for family, lean in LEAN.items() if any(lean)])
def test_scores_are_equal_to_the_bit_and_gradients_to_rounding(family):
    for dtype in (torch.bfloat16, torch.float32):
        (expected, gradients), (found, others) = map(scores_and_gradients, two_models(family, dtype))
        assert torch.equal(found, expected)
    torch.testing.assert_close(others, gradients, rtol=1e-5, atol=1e-5)


def test_bfloat16_gradients_are_as_near_to_those_of_float64_as_the_models_own():
    exact = tiny_model("llama", dtype=torch.bfloat16).double()
    share_prompts(exact)
    _, expected = scores_and_gradients(exact)
    (_, own), (_, lean) = map(scores_and_gradients, two_models("llama", torch.bfloat16))
    for name, gradient in expected.items():
        assert (lean[name] - gradient).norm() < 1.1 * (own[name] - gradient).norm(), name


def test_what_is_kept_is_a_third_less():
    model, lean = two_models("llama", torch.bfloat16)
    assert kept_bytes(lean) < 0.75 * kept_bytes(model)


@pytest.mark.parametrize("how", ["full", "offload"])
def test_layers_that_compute_again_may_keep_little_too(how):
    model, lean = two_models("llama")
    expected, gradients = scores_and_gradients(model)
    checkpoint_activations(lean, how)
    found, others = scores_and_gradients(lean.train())
    assert torch.equal(found, expected)
    torch.testing.assert_close(others, gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [keep_little, lambda model: None])
def test_an_mlp_may_take_few_tokens_at_a_time_and_keep_little(first):
    model = tiny_model("llama")
    share_prompts(model)
    expected, gradients = scores_and_gradients(copy.deepcopy(model))
    first(model)
    for tokens in (50, 7):
        tile_mlps(model, tokens=tokens)
    found, others = scores_and_gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(others, gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("targets", "mlps"), [(("q_proj",), 2), (("q_proj", "down_proj"), 0)])
def test_an_adapter_gets_the_same_gradients_and_an_mlp_of_which_it_is_part_stays_as_it_is(targets, mlps):
    found = []
    for lean in (False, True):
        model = tiny_model("llama")
        attach(model, Adapter(r=2, target_modules=targets))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
        share_prompts(model)
        if lean:
            keep_little(model)
            assert sum("forward" in vars(module) for module in model.modules() if isinstance(module, LlamaMLP)) == mlps
        found.append(scores_and_gradients(model))
    assert found[0][1].keys() == found[1][1].keys()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-4)


def test_a_norm_that_may_be_given_more_stays_as_it_is(monkeypatch):
    own = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x, gate=None: own(self, x))
    model = tiny_model("llama")
    keep_little(model)
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, LlamaRMSNorm))


def with_clamp(self: LlamaMLP, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x))


def mixing_tokens(self: LlamaMLP, x: Tensor) -> Tensor:
    return OWN_MLP(self, x) + x.cumsum(-2) / 10


def of_one_width(self: LlamaMLP, x: Tensor) -> Tensor:
    return OWN_MLP(self, x.view(*x.shape[:-1], self.hidden_size))


def returning_two(self: LlamaMLP, x: Tensor) -> tuple[Tensor, None]:
    return OWN_MLP(self, x), None


@pytest.mark.parametrize("forward", [with_clamp, mixing_tokens, of_one_width, returning_two])
def test_a_module_that_looks_alike_and_computes_something_else_stays_as_it_is(forward, monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    model = tiny_model("llama")
    keep_little(model)
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, LlamaMLP))
