"""Where the relative paths of a run file lead. Nothing is opened here."""

import glob
import re
from pathlib import Path

from dpo_ds.errors import UserError

_FILE_SUFFIXES = {".arrow", ".csv", ".gz", ".json", ".jsonl", ".model", ".parquet", ".txt", ".yaml", ".zst"}


def resolve_path(value: str, *, key: str, run_file: Path | None, hub: bool = False) -> str:
    """Finds a path against the run file's folder, then the working folder, then the copy that the package carries.

    Args:
        value: a path, or a hub id where ``hub`` says that it may be one.
        key: the run file's key, for messages.
        run_file: the run file, None without one.
        hub: whether a value that is no path but looks like ``org/name`` is returned as it is.

    Raises:
        UserError: it is in none of these places.
    """
    path = Path(value).expanduser()
    places = [place / path for place in _places(run_file)]
    may_be_pattern = key.startswith("data.")
    found = next((p for p in places if p.exists() or (may_be_pattern and glob.glob(str(p), recursive=True))), None)
    if found is not None:
        return str(found)
    if hub and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value) and path.suffix not in _FILE_SUFFIXES:
        return value
    looked_at = ", ".join(dict.fromkeys(map(str, places)))
    raise UserError(f"{key}: there is no {value}; looked for {looked_at}")


def _places(run_file: Path | None) -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    shipped = package / "shipped"
    beside = [run_file.resolve().parent] if run_file is not None else []
    return [*beside, Path.cwd(), shipped if shipped.is_dir() else package.parent]
