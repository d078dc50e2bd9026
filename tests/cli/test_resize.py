"""Models that get rows for a tokenizer's added tokens."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dpo_ds.cli.commands import main
from dpo_ds.cli.preflight import preflight
from dpo_ds.config import parse_run
from dpo_ds.errors import UserError
from tests.test_resume import write_run

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def larger(tiny_chat: Path, tmp_path: Path) -> Path:
    """The tiny model's tokenizer with 70 more tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    tokenizer.add_tokens([f"<tool {n}>" for n in range(70)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def resize(model: Path, tokenizer: Path, out: Path) -> dict[str, torch.Tensor]:
    main(["resize", "--model", str(model), "--tokenizer", str(tokenizer), "--out", str(out)])
    return load_file(out / "model.safetensors")


def test_old_rows_stay_to_the_bit_and_new_ones_are_drawn_alike_each_time(tiny_chat, larger, tmp_path, capsys):
    before = load_file(tiny_chat / "model.safetensors")
    tensors = resize(tiny_chat, larger, tmp_path / "once")
    assert f"{tmp_path / 'once'}: 264 rows before, 384 now, for 333 tokens" in capsys.readouterr().out
    for name, tensor in before.items():
        assert torch.equal(tensors[name][: len(tensor)], tensor), name
        assert (len(tensors[name]) == 384) == (name in (EMBEDDING, HEAD)), name
    new = tensors[EMBEDDING][264:]
    assert (new - before[EMBEDDING].mean(0)).abs().max() < 5 * before[EMBEDDING].std()
    again = resize(tiny_chat, larger, tmp_path / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_a_run_names_the_command_and_takes_what_it_wrote(tiny_chat, larger, tmp_path):
    write_run(tmp_path / "run", tiny_chat)
    argv = ["--config", str(tmp_path / "run/run.yaml"), "--model.tokenizer", str(larger)]
    with pytest.raises(UserError, match=rf"knows 333 tokens.*resize --model {tiny_chat} --tokenizer {larger} --out"):
        preflight(parse_run(argv), ranks=1)
    resize(tiny_chat, larger, tmp_path / "model")
    shutil.rmtree(larger)
    argv = ["--config", str(tmp_path / "run/run.yaml"), "--model.policy", str(tmp_path / "model")]
    assert preflight(parse_run(argv), ranks=1).tokenizer == str(tmp_path / "model")


def test_what_needs_no_rows_or_is_there_already_is_one_line(tiny_chat, larger, tmp_path, capsys):
    for tokenizer, out, complaint in (
        (tiny_chat, tmp_path / "new", f"error: the model {tiny_chat} has 264 rows, enough for the 263 tokens of"),
        (larger, tmp_path, f"error: --out {tmp_path} is there already; name another folder"),
        (tmp_path / "none", tmp_path / "new", "error: "),
    ):
        with pytest.raises(SystemExit) as left:
            resize(tiny_chat, tokenizer, out)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith(complaint)
        assert said.count("\n") == 1
        assert not (tmp_path / "new").exists()
