"""Seconds and memory of a head's log-probs, forward and backward, several ways: python -m benchmarks.scoring

One process, one thread, bfloat16. All ways must agree in float32, gradients included, before they are timed.
"""

import argparse
import ctypes
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.ranks import ENVIRONMENT, ROOT

os.environ.update(ENVIRONMENT)  # before torch and DeepSpeed read it

import torch
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpo_ds.logps import chunked_target_logps, target_logps
from dpo_ds.models.scorer import KEPT_LOGIT_BYTES, LOGIT_CHUNK_BYTES

AGREE_TO = 1e-5
TOKENS_OF_A_CHUNK = 128
_ENOUGH_S = 1.0
Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states ``(tokens, width)``, targets ``(tokens,)`` and weight ``(vocab, width)`` -> log-probs ``(tokens,)``."""
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""What ``Score`` got, what it returned, and the loss's slope at each log-prob: fills the gradients."""


@dataclass(frozen=True)
class Size:
    """One head and one batch."""

    width: int
    vocab: int
    tokens: int


@dataclass(frozen=True)
class Way:
    """One way to the log-probs and their gradients."""

    name: str
    score: Score
    backward: Backward


SIZES = (
    Size(512, 32_000, 256),
    Size(512, 32_000, 1600),
    Size(512, 128_000, 800),
    Size(2048, 32_000, 256),
    Size(2048, 32_000, 1600),
    Size(2048, 128_000, 256),
)


def main() -> None:
    """Checks that all ways agree, measures each at every size, prints a table a size and writes the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for scoring.json")
    parser.add_argument("--largest", action="store_true", help="also 2048 wide, 128,000 tokens, 1600 scored: minutes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    _keep_freed_memory()
    _check_that_all_agree()
    rows = []
    for size in (*SIZES, Size(2048, 128_000, 1600)) if args.largest else SIZES:
        inputs = _inputs(size, torch.bfloat16)
        measured = [{"way": way.name, **_measured(way, inputs)} for way in WAYS]
        print(_table(size, measured), flush=True)
        rows.append({**asdict(size), "ways": measured})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scoring.json").write_text(json.dumps(rows, indent=2) + "\n")


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(hidden, weight, bias)


def _ours(chunk_bytes: int, *, kept_bytes: int = 0) -> Score:
    def score(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        logps, _ = chunked_target_logps(
            hidden,
            targets,
            weight=weight,
            bias=None,
            logits=_head,
            slope=None,
            chunk_bytes=chunk_bytes,
            kept_bytes=kept_bytes,
        )
        return logps

    return score


def _all_at_once(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return target_logps(_head(hidden, weight), targets)


def _checkpointed(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    chunks = zip(hidden.split(TOKENS_OF_A_CHUNK), targets.split(TOKENS_OF_A_CHUNK), strict=True)
    logps = [checkpoint(_all_at_once, states, ids, weight, use_reentrant=False) for states, ids in chunks]
    return torch.cat(logps)


def _deepspeed_chunked(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    loss: Tensor = chunked_cross_entropy(_head(hidden, weight), targets, reduction="none")
    return -loss


@torch.no_grad()
def _tiled(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    chunks = zip(hidden.split(TOKENS_OF_A_CHUNK), targets.split(TOKENS_OF_A_CHUNK), strict=True)
    return torch.cat([_all_at_once(states, ids, weight) for states, ids in chunks])


def _tiled_backward(hidden: Tensor, targets: Tensor, weight: Tensor, logps: Tensor, slope: Tensor) -> None:
    """Runs DeepSpeed's loss with the slope as its mask.

    It takes the gradients of a sum within forward, where DPO's slope, which depends on all of a pair's log-probs, is
    not yet known: hence the log-probs' own pass before.
    """

    def weighted(_: None, states: Tensor, ids: Tensor, slopes: Tensor) -> Tensor:
        return (_all_at_once(states, ids, weight) * slopes).sum()

    shards = -(-len(targets) // TOKENS_OF_A_CHUNK)
    loss = TiledFusedLogitsLoss.apply(weighted, None, hidden[None], targets[None], slope[None], shards, [weight], "sum")
    loss.backward()


def _autograd(hidden: Tensor, targets: Tensor, weight: Tensor, logps: Tensor, slope: Tensor) -> None:
    logps.backward(slope)


WAYS = (
    *(Way(f"dpo_ds, chunks of {mib} MiB", _ours(mib * 2**20), _autograd) for mib in (8, 32, 128)),
    Way(
        "chunks of 8 MiB, up to 128 MiB of logits kept",
        _ours(LOGIT_CHUNK_BYTES, kept_bytes=KEPT_LOGIT_BYTES),
        _autograd,
    ),
    Way("all logits at once, float32", _all_at_once, _autograd),
    Way(f"checkpoint over {TOKENS_OF_A_CHUNK} tokens", _checkpointed, _autograd),
    Way("DeepSpeed chunked_cross_entropy", _deepspeed_chunked, _autograd),
    Way("DeepSpeed TiledFusedLogitsLoss, after a pass for the log-probs", _tiled, _tiled_backward),
)


def _check_that_all_agree() -> None:
    # Three tokens over whole chunks of tokens, and a vocabulary over whole chunks of columns.
    size = Size(width=48, vocab=70_001, tokens=2 * TOKENS_OF_A_CHUNK + 3)
    hidden, targets, weight, slope = _inputs(size, torch.float32)
    found = {}
    for way in (Way("float64", _double, _autograd), *WAYS):
        hidden.grad = weight.grad = None
        logps = way.score(hidden, targets, weight)
        way.backward(hidden, targets, weight, logps, slope)
        assert hidden.grad is not None
        assert weight.grad is not None
        found[way.name] = (logps.detach(), hidden.grad, weight.grad)
    expected = found["float64"]
    for name, values in found.items():
        for what, value, right in zip(
            ("log-probs", "states' gradient", "weight's gradient"), values, expected, strict=True
        ):
            difference = float((value - right).abs().max() / right.abs().max().clamp(min=1))
            if not difference <= AGREE_TO:
                raise SystemExit(f"{name}: the {what} differ by {difference:.1e}, allowed are {AGREE_TO:g}")


def _double(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    return _head(hidden.double(), weight.double()).log_softmax(1).gather(1, targets[:, None]).squeeze(1).float()


def _inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(size.tokens, size.width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(size.vocab, size.width, generator=generator) / size.width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(size.vocab, (size.tokens,), generator=generator)
    return hidden, targets, weight, torch.randn(size.tokens, generator=generator)


def _measured(way: Way, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Returns the seconds of the best run, and the peak of the first one's memory, gradients included."""
    hidden, targets, weight, slope = inputs
    runs: list[tuple[float, float]] = []
    peak = 0
    while len(runs) < 2 or (len(runs) < 5 and sum(map(sum, runs)) < _ENOUGH_S):
        hidden.grad = weight.grad = None
        if not runs:
            before = _start_watching_memory()
        start = time.perf_counter()
        logps = way.score(hidden, targets, weight)
        middle = time.perf_counter()
        way.backward(hidden, targets, weight, logps, slope)
        end = time.perf_counter()
        if not runs:
            peak = _kilobytes("VmHWM") - before
        runs.append((middle - start, end - middle))
        del logps
    forward, backward = min(runs, key=sum)
    return {"forward_s": forward, "backward_s": backward, "seconds": forward + backward, "peak_mib": peak / 1024}


def _start_watching_memory() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    return _kilobytes("VmRSS")


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _keep_freed_memory() -> None:
    libc, m_trim_threshold, m_mmap_max = ctypes.CDLL(None), -1, -4  # as a CPU rank of dpo_ds does
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def _table(size: Size, measured: list[dict[str, Any]]) -> str:
    gradients = 2 * size.width * (size.vocab + size.tokens) / 2**20
    lines = [
        f"\n{size.width} wide, vocabulary {size.vocab:,}, {size.tokens} scored tokens; "
        f"memory includes {gradients:.0f} MiB of gradients",
        "| way | forward, s | backward, s | both, s | peak extra memory, MiB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['way']} | {row['forward_s']:.3f} | {row['backward_s']:.3f} | {row['seconds']:.3f} "
        f"| {row['peak_mib']:.0f} |"
        for row in measured
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
