"""Prints this core's bfloat16 matrix products, in operations a second; started on all cores at once."""

import statistics
import time

import torch

from dpo_ds.throughput import matmul_flops

_SECONDS = 4


def main() -> None:
    """Measures for a few seconds; the middle of the second half counts, when all cores are busy."""
    rates = []
    end = time.time() + _SECONDS
    while time.time() < end:
        rates.append(matmul_flops(torch.device("cpu"), torch.bfloat16))
    print(statistics.median(rates[len(rates) // 2 :]))


if __name__ == "__main__":
    main()
