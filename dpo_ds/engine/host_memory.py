"""What a rank without a GPU does with memory that it frees: keep it, since new pages cost a quarter of a step.

jemalloc was told so when the process started (``launcher.allocator``), glibc is told here; others are left alone.
"""

import ctypes
import os

from dpo_ds.launcher.allocator import is_jemalloc

_ALL_ARENAS = 4096  # MALLCTL_ARENAS_ALL
_SPARED_MS = 500  # at once, a whole run took four times as long (benchmarks/LOG.md)
_KERNELS = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def keep_freed() -> None:
    """Keeps all memory that is freed from now on."""
    if not is_jemalloc():
        # It would map every large tensor anew.
        _mallopt((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_MAX, 0))


def keep_few_kernels() -> None:
    """Bounds what stays of matrix products that are over; to be called before the first, a user's own bounds stay.

    oneDNN compiles one for each combination of shapes, and so does ideep, torch's layer above it. Each keeps the last
    1,024, of about 0.3 MB. Rows of unlike lengths fill both; those of a large micro-batch, about 200, are enough, once.
    """
    for name, value in _KERNELS.items():
        os.environ.setdefault(name, value)


def trim() -> None:
    """Hands freed memory back to the system, once."""
    libc = ctypes.CDLL(None)
    if is_jemalloc():
        _mallctl(f"arena.{_ALL_ARENAS}.purge")
    elif hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def spare() -> None:
    """Hands freed memory back as it comes, from now on, at the price of some time."""
    if is_jemalloc():
        for state in ("dirty", "muzzy"):
            _mallctl(f"arenas.{state}_decay_ms", _SPARED_MS)  # of arenas to come
            _mallctl(f"arena.0.{state}_decay_ms", _SPARED_MS)
    else:
        _mallopt((_M_TRIM_THRESHOLD, 2**26), (_M_MMAP_MAX, 2**16), (_M_MMAP_THRESHOLD, 2**24))


def _mallopt(*settings: tuple[int, int]) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for name, value in settings:
            libc.mallopt(name, value)


def _mallctl(name: str, value: int | None = None) -> None:
    new = None if value is None else ctypes.byref(ctypes.c_ssize_t(value))
    size = ctypes.c_size_t(0 if value is None else ctypes.sizeof(ctypes.c_ssize_t))
    failed = ctypes.CDLL(None).mallctl(name.encode(), None, None, new, size)
    assert not failed, f"jemalloc refuses {name}: error {failed}"
