"""What all programs of a benchmark work on: a random Llama, a tokenizer, preference pairs, and DeepSpeed configs.

A word of the pairs' text is one token, so that whoever tokenizes it trains on the same ids.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_ds.data.preferences import Source
from dpo_ds.data.prepare import prepare
from dpo_ds.engine.ds_config import policy_ds_config, reference_ds_config
from dpo_ds.models.tokenizer import load_tokenizer

VOCABULARY = 32_000
LONGEST = 512
_SPECIAL = ["<pad>", "<s>", "</s>"]

# Quantiles of the tokens of prompt, chosen and rejected response (with its EOS) in a real chat preference set: the
# 2,221 pairs of Anthropic's HH-RLHF, harmless-base, test split, that fit into 512 tokens of a 32,000-piece
# SentencePiece tokenizer. Their means are 119, 41 and 50.
_SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1)
_TOKENS = (
    (14, 19, 22, 27, 49, 75, 100, 125, 153, 188, 259, 309, 363, 466),
    (2, 8, 11, 14, 19, 23, 29, 36, 46, 61, 88, 116, 146, 273),
    (3, 8, 11, 17, 22, 29, 37, 47, 59, 75, 104, 129, 173, 283),
)

Ids = tuple[list[int], list[int], list[int]]
"""Prompt, chosen and rejected response; the responses without their EOS."""


@dataclass(frozen=True)
class Workload:
    """Where everything lies.

    Attributes:
        model: folder of weights and tokenizer.
        pairs: JSON lines of ``prompt, chosen, rejected``.
        policy_config: resolved DeepSpeed config of the engine that trains, without batch sizes.
        reference_config: likewise of the frozen one.
    """

    model: Path
    pairs: Path
    policy_config: Path
    reference_config: Path


def write_model(
    folder: Path, *, layers: int, width: int, inner: int, heads: int, kv_heads: int, tied: bool, positions: int = 2048
) -> int:
    """Writes a Llama with random bfloat16 weights and the word tokenizer, unless the folder holds it already.

    Weights are drawn layer by layer and written file by file, so that a large model needs little memory.

    Args:
        folder: where.
        layers: decoder layers.
        width: of the hidden state.
        inner: of the feed-forward network.
        heads: of queries.
        kv_heads: of keys and values.
        tied: whether the head is the embedding.
        positions: longest sequence.

    Returns:
        The number of parameters.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    if not (folder / "model.safetensors.index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        _write_weights(folder, parameters, std=config.initializer_range)
    return sum(p.numel() for p in parameters.values())


def _write_weights(folder: Path, parameters: dict[str, torch.nn.Parameter], *, std: float) -> None:
    from safetensors.torch import save_file

    by_file: dict[str, list[str]] = {}
    for name in parameters:
        part = name.split(".")[2] if ".layers." in name else "outside"
        by_file.setdefault(f"model-{part}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in by_file.items():
        tensors = {}
        for name in names:
            values = torch.ones(parameters[name].shape)
            if values.dim() > 1:
                values.normal_(std=std, generator=generator)
            tensors[name] = values.to(torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, names in by_file.items() for name in names}
    index = {"metadata": {}, "weight_map": places}
    # Last: it says that the folder is complete.
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer to which each word of ``as_text`` is the token that it came from."""
    words = _SPECIAL + [_word(token) for token in range(len(_SPECIAL), VOCABULARY)]
    raw = RawTokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=pad, bos_token=bos, eos_token=eos)


def synthetic_pairs(count: int) -> list[Ids]:
    """Returns pairs of random tokens whose lengths are spread like those of real chats.

    The three lengths of a pair are drawn independently (in the real ones they correlate by 0.15 to 0.25).
    """
    random = np.random.RandomState(0)  # its stream never changes (NEP 19)
    pairs: list[Ids] = []
    while len(pairs) < count:
        prompt, chosen, rejected = (round(np.interp(random.random_sample(), _SHARES, tokens)) for tokens in _TOKENS)
        drawn = [random.randint(len(_SPECIAL), VOCABULARY, n).tolist() for n in (prompt, chosen - 1, rejected - 1)]
        if prompt + max(chosen, rejected) <= LONGEST:
            pairs.append((drawn[0], drawn[1], drawn[2]))
    return pairs


def equal_pairs(count: int, *, tokens: int) -> list[Ids]:
    """Returns pairs of random tokens, all of one length: half of it prompt, a quarter each response with its EOS."""
    random = np.random.RandomState(0)
    sizes = (tokens - 2 * (tokens // 4), tokens // 4 - 1, tokens // 4 - 1)
    drawn = [[random.randint(len(_SPECIAL), VOCABULARY, n).tolist() for n in sizes] for _ in range(count)]
    return [(prompt, chosen, rejected) for prompt, chosen, rejected in drawn]


def real_pairs(data: Path, tokenizer: Path, count: int, *, work: Path) -> list[Ids]:
    """Returns the first pairs, in a fixed random order, of a file in any form that ``data.train`` may have.

    Args:
        data: the file.
        tokenizer: of 32,000 tokens at most, whose ids 0, 1 and 2 are padding or unknown, BOS and EOS, as Llama's.
        count: how many.
        work: folder for the tokenized pairs.

    Raises:
        UserError: the data cannot be read, or the tokenizer is another kind.
    """
    from dpo_ds.errors import UserError

    opened = load_tokenizer(str(tokenizer))
    if opened.vocab_size > VOCABULARY or opened.eos_id != _SPECIAL.index("</s>"):
        raise UserError(f"--tokenizer must have {VOCABULARY} tokens at most and EOS 2, as Llama's, got {tokenizer}")
    prepared = prepare(
        [Source(str(data), "train", {})],
        opened,
        max_length=LONGEST,
        truncation=None,
        max_dropped=1.0,
        folder=work,
    )
    if len(prepared) < count:
        raise UserError(f"--data must hold {count} usable pairs of at most {LONGEST} tokens, got {len(prepared)}")
    order = np.random.RandomState(0).permutation(len(prepared))[:count]
    chosen = [prepared.pair(int(index)) for index in order]
    return [(list(p.prompt_ids), list(p.chosen_ids[:-1]), list(p.rejected_ids[:-1])) for p in chosen]


def program_arguments(*more_files: str) -> argparse.Namespace:
    """Returns what a program is started with.

    Args:
        more_files: options that name files, beside those of every program.
    """
    parser = argparse.ArgumentParser()
    for name in ("--model", "--pairs", "--policy_config", "--out", *more_files):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--steps", "--pairs_per_step", "--pairs_per_micro_batch", "--local_rank"):
        parser.add_argument(name, type=int, required=True)
    for name in ("--learning_rate", "--beta"):
        parser.add_argument(name, type=float, required=True)
    return parser.parse_args()


def write_pairs(pairs: list[Ids], file: Path) -> None:
    """Writes pairs as text, so that a response's tokens follow its prompt's when the two strings are joined."""
    with file.open("w", encoding="utf-8") as out:
        for prompt, chosen, rejected in pairs:
            row = {"prompt": as_text(prompt), "chosen": " " + as_text(chosen), "rejected": " " + as_text(rejected)}
            print(json.dumps(row), file=out)


def read_pairs(file: Path) -> list[dict[str, str]]:
    """Returns the rows that ``write_pairs`` wrote."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def as_text(ids: list[int]) -> str:
    """Returns a text whose words are these tokens."""
    return " ".join(_SPECIAL[token] if token < len(_SPECIAL) else _word(token) for token in ids)


def write_ds_configs(folder: Path, *, policy: Path, reference: Path) -> tuple[Path, Path]:
    """Writes the DeepSpeed configs that ``launch/train.py`` makes of these files, for programs that pass them on.

    Left out are batch sizes and who ends a step, which each program says for itself.
    """
    resolved = {
        "policy": policy_ds_config(policy, dtype="bfloat16", gradient_clipping=1.0),
        "reference": reference_ds_config(reference, dtype="bfloat16"),
    }
    for role, config in resolved.items():
        left: dict[str, Any] = {
            key: value
            for key, value in config.items()
            if key
            not in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "managed_gradient_accumulation")
        }
        (folder / f"{role}.json").write_text(json.dumps(left, indent=2))
    return folder / "policy.json", folder / "reference.json"


def _word(token: int) -> str:
    return f"w{token}"
