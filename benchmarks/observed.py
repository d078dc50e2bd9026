"""launch/train.py with its collectives counted and timed; started on every rank by ``benchmarks.scaling``.

``--planner in_order`` deals the pairs in the order they come in, to compare with the planner.
"""

import argparse
import atexit
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_ds.data.schedule import MicroBatch, Plan, Rows


@dataclass
class Collective:
    """One call of one rank.

    Attributes:
        step: the optimizer step that it belongs to, from 1.
        phase: ``reference``, ``policy``, ``update`` or ``metrics``.
        operation: torch.distributed's name.
        bytes: of the whole tensor: what is gathered, or what goes into a reduction.
        element_bytes: of one of its values.
        seconds: for which the rank was held: in the call, and waiting for its end.
    """

    step: int
    phase: str
    operation: str
    bytes: int
    element_bytes: int
    seconds: float = 0.0


@dataclass
class Observed:
    """What one rank did in its optimizer steps; attributes of the plan are one a step."""

    collectives: list[Collective] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    plan_seconds: list[float] = field(default_factory=list)
    step: int = 0
    phase: str = "metrics"

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Names what happens meanwhile."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


# Where the tensor of each operation is that is gathered into, or that is reduced: its place and its name.
_WHOLE = {
    "all_reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_gather": (0, "tensor_list"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input"),
}


def main() -> None:
    """Trains, and writes what this rank observed into the folder that ``--observed`` names."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--observed", type=Path, required=True)
    parser.add_argument("--planner", choices=("balanced", "in_order"), required=True)
    args, rest = parser.parse_known_args()
    observed = Observed()
    _watch_collectives(observed)
    _watch_training(observed, in_order=args.planner == "in_order")

    from dpo_ds.cli.train import main as train

    atexit.register(_write, observed, args.observed)
    train(rest)


def _write(observed: Observed, folder: Path) -> None:
    found = {
        "collectives": [asdict(collective) for collective in observed.collectives],
        "micro_batches": observed.micro_batches,
        "plan_seconds": observed.plan_seconds,
    }
    (folder / f"rank{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))


def plan_in_order(pairs: Iterable[int], *, rows: Rows, ranks: int, tokens_per_micro_batch: int) -> Plan:
    """Returns the plan of a loader that knows no lengths in advance: an equal, contiguous share of the pairs a rank.

    Each micro-batch takes the next pairs while the budget allows; ranks with fewer get stand-ins, or they would hang.
    Arguments as for ``plan_training``.
    """
    listed = [int(pair) for pair in pairs]
    share = -(-len(listed) // ranks)
    split = []
    for rank in range(ranks):
        batches: list[tuple[int, ...]] = []
        for pair in listed[rank * share : (rank + 1) * share]:
            longer = (*batches[-1], pair) if batches else (pair,)
            if batches and len(rows.split(longer, budget=tokens_per_micro_batch, multiple_of=1)) == 1:
                batches[-1] = longer
            else:
                batches.append((pair,))
        split.append(batches)
    most = max(map(len, split))
    stand_in = MicroBatch((listed[0],), weight=0.0)
    return tuple(
        tuple(MicroBatch(batch) for batch in batches) + (stand_in,) * (most - len(batches)) for batches in split
    )


def _watch_collectives(observed: Observed) -> None:
    """Replaces torch.distributed's functions before DeepSpeed is imported, which keeps some of them."""
    import torch.distributed as dist

    for name in _WHOLE:
        watched = _watched(getattr(dist, name), name, observed)
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, watched)


def _watched(function: Callable[..., Any], name: str, observed: Observed) -> Callable[..., Any]:
    place, keyword = _WHOLE[name]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not observed.step:
            return function(*args, **kwargs)
        whole = args[place] if len(args) > place else kwargs[keyword]
        tensors = whole if isinstance(whole, list) else [whole]
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        found = Collective(observed.step, observed.phase, name, sum(sizes), tensors[0].element_size())
        observed.collectives.append(found)
        start = time.perf_counter()
        work = function(*args, **kwargs)
        found.seconds += time.perf_counter() - start
        return None if work is None else _Work(work, found)

    return call


class _Work:
    """A collective under way, whose ``wait`` is timed."""

    def __init__(self, work: Any, found: Collective) -> None:
        self._work = work
        self._found = found

    def wait(self, *args: Any) -> Any:
        start = time.perf_counter()
        done = self._work.wait(*args)
        self._found.seconds += time.perf_counter() - start
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _watch_training(observed: Observed, *, in_order: bool) -> None:
    import dpo_ds.micro_batches
    import dpo_ds.trainer
    from dpo_ds.engine import PolicyEngine, ReferenceEngine

    _name_phases(ReferenceEngine, ("score",), "reference", observed)
    _name_phases(PolicyEngine, ("score", "backward"), "policy", observed)
    _name_phases(PolicyEngine, ("step",), "update", observed)
    plan_training = plan_in_order if in_order else dpo_ds.micro_batches.plan_training
    train = dpo_ds.trainer.Trainer.train

    def plan(*args: Any, **kwargs: Any) -> Plan:
        start = time.perf_counter()
        made = plan_training(*args, **kwargs)
        if observed.step:  # not the gate's
            observed.plan_seconds.append(time.perf_counter() - start)
            observed.micro_batches.append(len(made[0]))
        return made

    def step(self: dpo_ds.trainer.Trainer, number: int) -> dict[str, float]:
        observed.step = number
        try:
            return train(self, number)
        finally:
            observed.step = 0

    setattr(dpo_ds.micro_batches, "plan_training", plan)  # noqa: B010
    setattr(dpo_ds.trainer.Trainer, "train", step)  # noqa: B010


def _name_phases(owner: type, methods: tuple[str, ...], phase: str, observed: Observed) -> None:
    for name in methods:
        method = getattr(owner, name)

        def named(*args: Any, _method: Callable[..., Any] = method, **kwargs: Any) -> Any:
            with observed.during(phase):
                return _method(*args, **kwargs)

        setattr(owner, name, named)


if __name__ == "__main__":
    main()
