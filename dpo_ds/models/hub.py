"""Models and tokenizers of the hub: fetched once for all that share a cache, before any rank waits for them.

The cache is the hub's own (``HF_HOME``), and so are its locks. Ranks read from it and never ask the network.
"""

from pathlib import Path

from dpo_ds.errors import UserError, first_line

_WEIGHTS = "*.safetensors"
_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_CODE = "*.py"
# Weights in the shapes of other programs, and of other precisions.
_DOUBLES = ["*/*.safetensors", "consolidated*.safetensors", "onnx/*", "original/*"]


def fetch(name: str, *, key: str, weights: bool, code: bool) -> str | None:
    """Sees to it that a model of the hub is in this machine's cache. One process fetches a file, others wait for it.

    Args:
        name: a hub id; a folder or file is left alone.
        key: the run file's, for the message.
        weights: whether they are wanted, too, in safetensors.
        code: whether code that comes with them is.

    Returns:
        The commit, None for what is not of the hub.

    Raises:
        UserError: it is neither in the cache nor can it be fetched.
    """
    if Path(name).exists():
        return None
    from huggingface_hub import constants, snapshot_download

    wanted = [*_FILES, *([_WEIGHTS] if weights else []), *([_CODE] if code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_DOUBLES)).name
    except Exception as error:  # those of the network share no class with the others
        offline = ", and HF_HUB_OFFLINE forbids to fetch it" if constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"{key} {name} is neither a folder nor complete in the cache {constants.HF_HUB_CACHE}{offline} "
            f"({first_line(error)}); check the name, or fetch it where there is a network: hf download {name}"
        ) from error


def held(name: str) -> str:
    """Returns the folder of a model that ``fetch`` has fetched whole, and any other name as it is."""
    if Path(name).exists():
        return name
    from huggingface_hub import snapshot_download

    wanted = [*_FILES, _WEIGHTS]
    try:
        return str(snapshot_download(name, local_files_only=True, allow_patterns=wanted, ignore_patterns=_DOUBLES))
    except (OSError, ValueError):
        return name
