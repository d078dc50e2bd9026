"""Dropout off, on real models whose rates are high enough to be seen in one forward."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from x_transformers import Decoder, TransformerWrapper

from dpo_ds.dropout import disable_dropout

IDS = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))


def llama(attention: str) -> nn.Module:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.5,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def gpt2(attention: str) -> nn.Module:
    config = GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        attn_pdrop=0.5,
        embd_pdrop=0.5,
        resid_pdrop=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def x_transformer(attention: str) -> nn.Module:
    layers = Decoder(
        dim=16,
        depth=2,
        heads=2,
        attn_dropout=0.5,
        ff_dropout=0.5,
        layer_dropout=0.5,
        attn_sublayer_dropout=0.5,
        attn_flash=attention == "sdpa",
    )
    return TransformerWrapper(num_tokens=32, max_seq_len=16, emb_dropout=0.5, attn_layers=layers)


def logits_of(model: nn.Module) -> Tensor:
    output = model(IDS)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", [llama, gpt2, x_transformer])
def test_two_forwards_in_training_mode_are_equal_once_dropout_is_off(build, attention):
    torch.manual_seed(0)
    model = build(attention).train()
    assert not torch.equal(logits_of(model), logits_of(model))

    assert disable_dropout(model) > 0

    assert model.training
    logits = logits_of(model)
    assert torch.equal(logits, logits_of(model))
    assert torch.equal(logits, logits_of(model.eval()))


def test_a_second_call_finds_nothing_to_switch_off():
    model = gpt2("sdpa")
    disable_dropout(model)
    assert disable_dropout(model) == 0


def test_the_rates_of_a_config_are_zeroed_since_some_forwards_read_them_there():
    model = llama("eager")
    disable_dropout(model)
    assert model.config.attention_dropout == 0.0


def test_functional_dropout_through_a_rate_of_any_name_is_off():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding_dropout_rate = 0.5
            self.layer_drops = (0.25, 0)

        def forward(self, x: Tensor) -> Tensor:
            for rate in (self.embedding_dropout_rate, *self.layer_drops):
                x = F.dropout(x, rate, self.training)
            return x

    model = Odd()
    assert disable_dropout(model) == 2
    assert torch.equal(model(torch.ones(64)), torch.ones(64))


def test_the_dropout_inside_torch_attention_and_recurrence_is_off():
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, dropout=0.5), nn.LSTM(8, 8, num_layers=2, dropout=0.5)])
    assert disable_dropout(model) == 2
    assert [module.dropout for module in model] == [0.0, 0.0]


def test_what_is_no_rate_keeps_its_value():
    model = nn.Module()
    model.drop_tokens = True
    model.drop_last = 1
    model.dropout_scale = 8.0
    model.drop_names = ("a", "b")
    model.rate = 0.5
    assert disable_dropout(model) == 0
    assert (model.drop_tokens, model.drop_last, model.dropout_scale, model.rate) == (True, 1, 8.0, 0.5)
    assert model.drop_names == ("a", "b")
