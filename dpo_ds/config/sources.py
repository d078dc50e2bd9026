"""Values with parts of their own: ``data.train``, ``data.eval``, ``data.streaming``, ``adapter``; nothing is opened."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from dpo_ds.config.schema import AdapterConfig, DataSource, StreamingConfig, shown
from dpo_ds.errors import UserError

_EXPECTATIONS = {
    "path": "a path or hub id",
    "weight": "a number > 0",
    "split": "text or null",
    "columns": "a mapping of our column names to the data set's",
    "name": "letters, digits, points and dashes, or null",
}
_SHAPE = "{path, weight, split, columns, name}"


def read_sources(value: object, *, key: str) -> tuple[DataSource, ...]:
    """Returns the sources that a run file's value names.

    Args:
        value: one path or hub id, or a list of ``{path, weight, split, columns, name}``.
        key: the run file's key, for messages.

    Raises:
        UserError: the value is something else, or two sources have one name.
    """
    sources = [{"path": value}] if isinstance(value, str) else value
    if not isinstance(sources, list | tuple) or not sources:
        raise UserError(f"{key} must be a path, a hub id, or a list of {_SHAPE}, got {shown(value)}")
    found = tuple(_source(source, key=f"{key}[{place}]") for place, source in enumerate(sources))
    names = source_names(found)
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(
                f"{key}[{place}] is called {name} in the metrics, as {key}[{names.index(name)}] is; give one a name"
            )
    return found


def read_streaming(value: object, *, key: str) -> StreamingConfig:
    """Returns what a run file's value says of streaming.

    Args:
        value: ``{rows_per_shard, keep}``, the second of which may be left out.
        key: the run file's key, for messages.

    Raises:
        UserError: the value is something else.
    """
    names = ("rows_per_shard", "keep")
    if not isinstance(value, dict) or "rows_per_shard" not in value or not set(value) <= {*names}:
        raise UserError(
            f"{key} must be {{{', '.join(names)}}} with at least rows_per_shard, or null, got {shown(value)}"
        )
    for name, part in value.items():
        if not isinstance(part, int) or isinstance(part, bool):
            raise UserError(f"{key}.{name} must be a whole number, got {shown(part)}")
    return StreamingConfig(**value)


def read_adapter(value: object, *, key: str) -> AdapterConfig:
    """Returns what a run file's value says of an adapter.

    Args:
        value: a mapping of ``AdapterConfig``'s attributes, any of which may be left out.
        key: the run file's key, for messages.

    Raises:
        UserError: the value is something else, or sets what ``path`` decides.
    """
    names = [entry.name for entry in fields(AdapterConfig)]
    if not isinstance(value, dict):
        raise UserError(f"{key} must be {{{', '.join(names)}}}, or null, got {shown(value)}")
    for name, part in value.items():
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
            raise UserError(f"{key}: unknown key {name}; did you mean {nearest}?")
        if not _fits_adapter(name, part):
            raise UserError(f"{key}.{name} must be {_OF_ADAPTER[name]}, got {shown(part)}")
    given: dict[str, Any] = {name: tuple(part) if isinstance(part, list) else part for name, part in value.items()}
    adapter = AdapterConfig(**given)
    if adapter.path is not None and adapter != AdapterConfig(path=adapter.path):
        raise UserError(f"{key} must hold no other key beside path, whose adapter_config.json decides them")
    return adapter


_OF_ADAPTER = {
    "r": "a whole number",
    "alpha": "a number",
    "target_modules": "all-linear or a list of names",
    "use_dora": "true or false",
    "use_rslora": "true or false",
    "init": "default or gaussian",
    "path": "a folder or null",
}


def _fits_adapter(name: str, part: object) -> bool:
    if name.startswith("use_"):
        return isinstance(part, bool)
    if name == "target_modules":
        return part == "all-linear" or (isinstance(part, list) and bool(part) and _names(part))
    if name == "init":
        return part in ("default", "gaussian")
    if name == "path":
        return part is None or (isinstance(part, str) and bool(part.strip()))
    return isinstance(part, int if name == "r" else int | float) and not isinstance(part, bool)


def source_names(sources: Sequence[DataSource]) -> tuple[str, ...]:
    """Returns what metrics call the sources: their names, or the last part of their path or hub id without suffixes."""
    return tuple(source.name or _name_of(source.path) for source in sources)


def _name_of(path: str) -> str:
    plain = [part for part in PurePath(path).parts if not re.search(r"[*?\[]", part)]
    stem = plain[-1].split(".")[0] if plain else ""
    return re.sub(r"[^\w-]+", "-", stem) or "data"


def _source(value: object, *, key: str) -> DataSource:
    if not isinstance(value, dict) or "path" not in value:
        raise UserError(f"{key} must be {_SHAPE} with at least a path, got {shown(value)}")
    for name, part in value.items():
        if name not in _EXPECTATIONS:
            raise UserError(f"{key}: unknown key {name}; a source has {', '.join(_EXPECTATIONS)}")
        if not _fits(name, part):
            raise UserError(f"{key}.{name} must be {_EXPECTATIONS[name]}, got {shown(part)}")
    return DataSource(**value)


def _fits(name: str, value: Any) -> bool:
    if name == "path":
        return isinstance(value, str) and bool(value.strip())
    if name == "weight":
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if name == "name":
        return value is None or (isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None)
    if name == "split":
        return value is None or isinstance(value, str)
    return isinstance(value, dict) and all(isinstance(ours, str) and _names(theirs) for ours, theirs in value.items())


def _names(value: object) -> bool:
    names = value if isinstance(value, list) and value else [value]
    return all(isinstance(name, str) for name in names)
