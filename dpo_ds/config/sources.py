"""``data.train`` and ``data.eval``: a path, a hub id, or a list of sources. No data is looked at."""

import math
from typing import Any

from dpo_ds.config.schema import DataSource, shown
from dpo_ds.errors import UserError

_EXPECTATIONS = {
    "path": "a path or hub id",
    "weight": "a number > 0",
    "split": "text or null",
    "columns": "a mapping of our column names to the data set's",
}


def read_sources(value: object, *, key: str) -> tuple[DataSource, ...]:
    """Returns the sources that a run file's value names.

    Args:
        value: one path or hub id, or a list of ``{path, weight, split, columns}``.
        key: the run file's key, for messages.

    Raises:
        UserError: the value is something else.
    """
    sources = [{"path": value}] if isinstance(value, str) else value
    if not isinstance(sources, list | tuple) or not sources:
        raise UserError(
            f"{key} must be a path, a hub id, or a list of {{path, weight, split, columns}}, got {shown(value)}"
        )
    return tuple(_source(source, key=f"{key}[{place}]") for place, source in enumerate(sources))


def _source(value: object, *, key: str) -> DataSource:
    if not isinstance(value, dict) or "path" not in value:
        raise UserError(f"{key} must be {{path, weight, split, columns}} with at least a path, got {shown(value)}")
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
    if name == "split":
        return value is None or isinstance(value, str)
    return isinstance(value, dict) and all(isinstance(ours, str) and _names(theirs) for ours, theirs in value.items())


def _names(value: object) -> bool:
    names = value if isinstance(value, list) and value else [value]
    return all(isinstance(name, str) for name in names)
