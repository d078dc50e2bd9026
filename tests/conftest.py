"""Fixtures that every room's tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.data.small_tokenizer import small_tokenizer


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Takes back what a command that ran in this process has set for its ranks."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def material() -> Path:
    """The folder of real preference data, tokenizers and the tiny pretrained model."""
    folder = os.environ.get("DPO_DS_MATERIAL")
    if not folder:
        pytest.skip("DPO_DS_MATERIAL is not set: it names the folder with real data, tokenizers and a tiny model")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama with a byte-level tokenizer, as a Hugging Face folder."""
    return tiny_chat_in(tmp_path_factory.mktemp("tiny"))


def tiny_chat_in(folder: Path) -> Path:
    """Writes it into a folder."""
    folder.mkdir(exist_ok=True)
    small_tokenizer(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
