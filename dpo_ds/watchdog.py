"""What users would want to be told of while a run goes on: numbers in, a line of warning out. No tensors, no ranks."""

from collections.abc import Mapping
from typing import Literal


class Watchdog:
    """Looks at the metrics of every step and barks once at each thing that is wrong.

    It looks at means over all ranks, so that every rank comes to the same answer.
    """

    def __init__(
        self,
        *,
        not_moving_steps: int | None,
        chosen_drop: float | None,
        beta: float,
        reduction: Literal["sum", "mean"],
    ) -> None:
        """Sets the bounds.

        Args:
            not_moving_steps: so many steps in a row whose rewards are exactly 0 are too many; None: any number is fine.
            chosen_drop: so many nats a token below the reference are too few for the chosen responses; None: never.
            beta: factor between log-ratios and rewards.
            reduction: whether the rewards' log-ratios are sums over a response's tokens or their means.
        """
        self._not_moving_steps = not_moving_steps
        self._chosen_drop = chosen_drop
        self._beta = beta
        self._reduction = reduction
        self._still = 0

    def look(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Returns what is wrong since this step, in one line, or None; the same thing is not said twice.

        Args:
            step: the optimizer step, from 1.
            metrics: its means, with ``rewards/chosen``, ``rewards/rejected``, ``lengths/chosen`` and ``learning_rate``.
        """
        self._still = self._still + 1 if metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0 else 0
        if self._not_moving_steps is not None and self._still > self._not_moving_steps:
            self._not_moving_steps = None
            return (
                f"step {step}: the policy does not move: the rewards of {self._still} steps are exactly 0, with a "
                f"learning rate of {metrics['learning_rate']:.3g}; raise train.learning_rate, or train in float32"
            )
        drop = self._drop(metrics)
        if self._chosen_drop is not None and drop > self._chosen_drop:
            bound, self._chosen_drop = self._chosen_drop, None
            return (
                f"step {step}: the chosen responses collapse: they are {drop:.2f} nats a token less likely than under "
                f"the reference (watchdogs.chosen_drop {bound:g}); lower train.learning_rate, raise loss.beta, or stop "
                "earlier"
            )
        return None

    def _drop(self, metrics: Mapping[str, float]) -> float:
        ratio = metrics["rewards/chosen"] / self._beta
        return -ratio if self._reduction == "mean" else -ratio / metrics["lengths/chosen"]
