"""``python -m dpo_ds resize``: a model with a row of its embedding for every token that a tokenizer has."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dpo_ds.errors import UserError, first_line
from dpo_ds.models.causal_lm import load_model_config, vocabulary_size
from dpo_ds.models.tokenizer import load_tokenizer

_MULTIPLE = 64
"""Of rows, as matrix products on a GPU like them."""


def resize(argv: Sequence[str]) -> str:
    """Writes the model with the tokenizer into a new folder; returns a line about it.

    In one process that holds the model whole: an embedding is a shard of every rank later, and must have its size then.
    Rows that the model had stay to the bit. New ones, of embedding and head, are drawn around the mean of the old ones
    (Hewitt 2021, "Initializing new word embeddings for pretrained language models"), the same ones each time.

    Args:
        argv: the command's arguments.

    Raises:
        UserError: model or tokenizer cannot be opened, the folder is there, or there are rows enough.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_ds resize", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--tokenizer", required=True, help="folder, SentencePiece file or hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder that is not there yet")
    parser.add_argument("--trust_remote_code", action="store_true", help="let code that comes with the two run")
    args = parser.parse_args(argv)
    out: Path = args.out
    if out.exists():
        raise UserError(f"--out {out} is there already; name another folder")
    tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=args.trust_remote_code)
    rows = vocabulary_size(load_model_config(args.model, trust_remote_code=args.trust_remote_code))
    if tokenizer.vocab_size <= rows:
        raise UserError(
            f"the model {args.model} has {rows} rows, enough for the {tokenizer.vocab_size} tokens of "
            f"{args.tokenizer}; train it as it is"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the model {args.model} cannot be opened: {first_line(error)}") from error
    torch.manual_seed(0)
    model.resize_token_embeddings(tokenizer.vocab_size, pad_to_multiple_of=_MULTIPLE)
    aside = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        tokenizer.save(aside)
        aside.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); make room, or name another folder") from error
    return f"{out}: {rows} rows before, {vocabulary_size(model.config)} now, for {tokenizer.vocab_size} tokens"
