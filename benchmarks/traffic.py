"""Bytes that ZeRO-3 moved in a DPO step, as ``benchmarks.observed`` counted them."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from dpo_ds.traffic import Traffic


def counted(collectives: Iterable[Mapping[str, Any]], *, ranks: int, steps: int) -> Traffic:
    """Returns what ``benchmarks.observed`` counted, a step; metrics and norms, a few hundred bytes, are left out.

    Args:
        collectives: one rank's.
        ranks: how many.
        steps: how many.
    """
    moved = dict.fromkeys((kind.name for kind in fields(Traffic)), 0.0)
    for one in collectives:
        kind = _kind(one["phase"], one["operation"])
        if kind is not None:
            passes = 2 if one["operation"] == "all_reduce" else 1
            moved[kind] += passes * one["bytes"] * (ranks - 1) / ranks / steps
    return Traffic(**moved)


def _kind(phase: str, operation: str) -> str | None:
    if operation.startswith("all_gather"):
        return {"policy": "policy_gathers", "reference": "reference_gathers", "update": "update"}.get(phase)
    return "gradients" if phase == "policy" else None
