"""Composes what a run trains on: pairs that are all there, or a stream of blocks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_ds.cli.preflight import Inputs
from dpo_ds.cli.schedules import block_schedule_of, schedule_of
from dpo_ds.data.feed import Feed, WholeFeed
from dpo_ds.data.prepared import PreparedPairs
from dpo_ds.data.supply import StreamFeed, Supplier
from dpo_ds.models.tokenizer import load_tokenizer


@contextmanager
def open_feed(
    inputs: Inputs, *, behind: int, supplies: bool, opened: Callable[[Path], PreparedPairs]
) -> Iterator[Feed]:
    """Gives what a run trains on. Where it streams, a process of this one prepares it until the block ends.

    Args:
        inputs: of the run.
        behind: the last step that was taken.
        supplies: whether this process is the one on its node that has the data prepared.
        opened: maps prepared pairs, the same on all nodes.
    """
    config, stream = inputs.config, inputs.stream
    if stream is None:
        pairs = opened(inputs.train)
        yield WholeFeed(pairs, schedule_of(config, pairs))
        return
    schedule, supplier = block_schedule_of(config, stream), None
    if supplies and behind < schedule.steps:
        tokenizer = load_tokenizer(inputs.tokenizer, trust_remote_code=config.model.trust_remote_code)
        supplier = Supplier(stream, schedule, tokenizer, turn=schedule.place(behind + 1).turn)
    try:
        yield StreamFeed(stream, schedule, supplier=supplier, patience_s=config.timeouts.data_s, opened=opened)
    finally:
        if supplier is not None:
            supplier.stop()
