"""Small modules for the wrapper's tests: a table, x-transformers' and Hugging Face's, and what is asked of them."""

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from x_transformers import Decoder, TransformerWrapper

VOCAB = 16
PROMPT = 3


class Bigram(nn.Module):
    """A language model that is a table: row ``i`` holds the logits of what follows token ``i``."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


# After token 0 comes 1 with 0.7, and so on; token 3 is the padding.
PROBABILITIES = [[0.1, 0.7, 0.1, 0.1], [0.3, 0.2, 0.4, 0.1], [0.5, 0.2, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]]
PAD = 3


def tiny_transformer(*, tie_embedding: bool = False) -> TransformerWrapper:
    layers = Decoder(dim=32, depth=1, heads=2, attn_dim_head=16, attn_dropout=0.1, ff_dropout=0.1)
    return TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=12, emb_dropout=0.1, attn_layers=layers, tie_embedding=tie_embedding
    )


def tiny_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config)


def tiny_gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLM.from_config(config)


def random_pairs(batch: int = 3, length: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Returns preferred, unpreferred and prompt mask: equal prompts, other responses, no token 0."""
    generator = torch.Generator().manual_seed(1)
    preferred, unpreferred = torch.randint(1, VOCAB, (2, batch, length), generator=generator)
    unpreferred[:, :PROMPT] = preferred[:, :PROMPT]
    prompt_mask = (torch.arange(length) < PROMPT).expand(batch, length)
    return preferred, unpreferred, prompt_mask


def disturb(model: nn.Module) -> None:
    """Moves a model away from where it was, so that it differs from its reference."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def response_logp(model: nn.Module, ids: Tensor, *, start: int, end: int) -> Tensor:
    """``log pi(ids[start:end] | ids[:start])`` of one sequence, ``(seq,)``, token by token and without a mask."""
    output = model(ids[None])
    logits = output if isinstance(output, Tensor) else output.logits
    logps = logits[0].double().log_softmax(-1)
    return torch.stack([logps[t - 1, ids[t]] for t in range(start, end)]).sum()
