"""Runs launch/train.py until a moment, at which something happens: ``FAULT="PHASE DOES" python at.py ARGUMENTS``.

What marks a moment is a library's function, which goes on to do its work: nothing of what is tested is replaced. DOES
is ``wait`` (for a signal from outside), ``raise``, ``hang`` or ``jump`` (of the clock), on the rank that the variable
FAULT_RANK names; the others wait for it where they need it, as they would.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pyarrow as pa
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from transformers import AutoModelForCausalLM

TRAIN = Path(__file__).parents[2] / "launch/train.py"
phase, does = os.environ["FAULT"].split()
has_come = False


def come() -> None:
    """The moment."""
    global has_come
    if has_come or os.environ.get("RANK") != os.environ["FAULT_RANK"]:
        return
    has_come = True
    Path(os.environ["FAULT_MARK"]).write_text(phase)
    if does == "raise":
        raise ValueError("the disk is on fire")
    if does == "jump":
        now = time.time
        time.time = lambda: now() + 7 * 24 * 3600
    else:
        deadline = time.monotonic() + (60 if does == "wait" else 600)
        while time.monotonic() < deadline and (does == "hang" or not Path(os.environ["FAULT_MARK"] + ".sent").exists()):
            time.sleep(0.05)


def before(owner: Any, name: str, *, call: int = 1, where: Callable[[], bool] = lambda: True) -> None:
    """Lets the moment come before the call of a function, counted among those where something holds."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += where()
        if calls == call:
            come()
        return original(*args, **options)

    setattr(owner, name, counted)


class Steps:
    """How many optimizer steps this rank has taken."""

    taken = 0


def counted_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``DeepSpeedEngine.step``, counted."""

    def step(*args: Any, **options: Any) -> Any:
        Steps.taken += 1
        return original(*args, **options)

    return step


if phase == "load":
    before(AutoModelForCausalLM, "from_pretrained")
elif phase == "prepare":
    before(pa.ipc, "new_file")
elif phase == "cache":
    before(deepspeed.DeepSpeedEngine, "forward", call=4)
elif phase == "train":
    before(deepspeed.DeepSpeedEngine, "step", call=5)
elif phase == "eval":
    deepspeed.DeepSpeedEngine.step = counted_step(deepspeed.DeepSpeedEngine.step)
    before(deepspeed.DeepSpeedEngine, "forward", call=2, where=lambda: Steps.taken == 6 and not torch.is_grad_enabled())
elif phase == "save":
    before(TorchCheckpointEngine, "save", call=4)
elif phase == "export":
    before(deepspeed.zero.GatheredParameters, "__enter__", call=3)
elif phase == "convert":
    before(torch, "load", where=lambda: "LOCAL_RANK" in os.environ)

sys.argv = [str(TRAIN), *(argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))]
runpy.run_path(str(TRAIN), run_name="__main__")
