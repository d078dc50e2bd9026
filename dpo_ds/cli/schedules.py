"""The order of a run's steps, from its run file and from what its data hold."""

from dpo_ds.config import RunConfig
from dpo_ds.data.blocks import BlockSchedule
from dpo_ds.data.prepared import PreparedPairs
from dpo_ds.data.schedule import Part, Schedule
from dpo_ds.data.stream import Stream


def schedule_of(config: RunConfig, train: PreparedPairs) -> Schedule:
    """Returns the order of a run's steps.

    Args:
        config: the run file.
        train: pairs to train on, of the sources that it lists.
    """
    weights = (source.weight for source in config.data.train)
    return Schedule.of_run(
        parts=map(Part, train.pairs_of_parts, weights),
        pairs_per_step=config.train.pairs_per_step,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
    )


def block_schedule_of(config: RunConfig, stream: Stream) -> BlockSchedule:
    """Returns the order of a run's steps where its data stream.

    Args:
        config: the run file.
        stream: of the sources that it lists.

    Raises:
        UserError: the data are too few for a step.
    """
    return BlockSchedule.of_run(
        rows=stream.rows,
        rows_per_block=stream.rows_per_block,
        max_dropped=stream.max_dropped,
        pairs_per_step=config.train.pairs_per_step,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
    )
