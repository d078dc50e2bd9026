"""Time and arithmetic: laps of a step, and how much of the matrix-product rate it used."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_SIZE = 1024


class Stopwatch:
    """Splits a step into laps, each ending when the device has finished its work."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        """Starts the clock.

        Args:
            synchronize: waits for the device.
        """
        self._synchronize = synchronize
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Names the seconds since the last lap."""
        self._synchronize()
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now

    def total(self) -> float:
        """Returns the seconds since the start."""
        return time.perf_counter() - self._start


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations that pairs need, each prompt computed once and the head on responses only.

    Attributes:
        backbone: parameters that multiply every token.
        head: parameters of the head.
        attention: products of a token with an earlier one, over all layers: for the scores, and with the values.
        passes: operations per product: 6 for the policy's forward and backward, 2 for the reference.
    """

    backbone: int
    head: int
    attention: int
    passes: int

    def flops(
        self, *, tokens: NDArray[np.int64], scored: NDArray[np.int64], attended: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Returns the operations of each pair, ``(pairs,)``.

        Args:
            tokens: ``(pairs,)``, tokens of the pair, its prompt counted once.
            scored: ``(pairs,)``, tokens of both responses.
            attended: ``(pairs,)``, (token, earlier token) pairs.
        """
        return self.passes * (self.backbone * tokens + self.head * scored + self.attention * attended)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the operations a second of this device's matrix products, in about 0.1 s.

    The rate that a model can hope for here and now, which a data sheet's peak is not: ``mfu`` is relative to it.
    """
    left, right = (torch.rand(_SIZE, _SIZE, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        float((left @ right)[0, 0])  # reading a number waits for the device
        rates.append(2 * _SIZE**3 / (time.perf_counter() - start))
    return max(rates)
