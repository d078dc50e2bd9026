"""A rank without a GPU starts anew under jemalloc, where the machine has it.

Sizes of tensors change from step to step. glibc's heap grows by what it cannot fit together again, and each new page
costs a fault; jemalloc uses old ones. PyTorch's own CPU launcher preloads it for the same reason.
"""

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_SETTINGS = {
    "narenas": "1",  # one thread allocates nearly everything
    # What is freed stays.
    "dirty_decay_ms": "-1",
    "muzzy_decay_ms": "-1",
    "oversize_threshold": "0",  # large blocks, too
    "lg_extent_max_active_fit": "8",  # a large free block may be split for a smaller one
}
# NVIDIA, AMD, Huawei. Not /dev/dri: it is there with the display of any laptop.
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/davinci_manager")


def is_jemalloc() -> bool:
    """Whether this process allocates by jemalloc."""
    return hasattr(ctypes.CDLL(None), "mallctl")


def preloaded(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables with which a process allocates by jemalloc; none where the machine has none.

    Args:
        environment: the process's; its own ``MALLOC_CONF`` stays.
    """
    library = ctypes.util.find_library("jemalloc")
    if library is None:
        return {}
    settings = ",".join(f"{name}:{value}" for name, value in _SETTINGS.items())
    return {"LD_PRELOAD": library, "MALLOC_CONF": environment.get("MALLOC_CONF", settings)}


def restart_with_jemalloc() -> None:
    """Starts this program anew, as the same process, if that gives it jemalloc.

    Left alone: machines with an accelerator, whose memory torch manages itself, unless ``DS_ACCELERATOR`` is ``cpu``;
    and a ``LD_PRELOAD`` of the user's own, an empty one, too. What the program starts goes without it.
    """
    if sys.platform != "linux" or _has_accelerator():
        return
    before = os.environ.get("LD_PRELOAD")
    if before is None:
        variables = preloaded(os.environ)
        if variables and Path(sys.executable).is_file():
            os.environ.update(variables)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    elif is_jemalloc() and before == preloaded(os.environ).get("LD_PRELOAD"):
        del os.environ["LD_PRELOAD"]


def _has_accelerator() -> bool:
    return os.environ.get("DS_ACCELERATOR") != "cpu" and any(map(os.path.exists, _ACCELERATORS))
