"""Time and arithmetic: laps of a step, and how much of the matrix-product rate it used."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

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
    """Floating-point operations that a step's pairs need, each prompt computed once and the head on responses only.

    Attention's own products are left out, so that the count is a lower bound.

    Attributes:
        backbone: parameters that multiply every token.
        head: parameters of the head.
        passes: operations per parameter and token: 6 for the policy's forward and backward, 2 for the reference.
    """

    backbone: int
    head: int
    passes: int

    def flops(self, *, tokens: float, scored: float) -> float:
        """Returns the operations for ``tokens`` tokens, of which ``scored`` are of responses."""
        return self.passes * (self.backbone * tokens + self.head * scored)


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
