"""Runs a script on a rank that kills itself at a known moment: ``python dying.py METHOD CALL RANK SCRIPT ...``.

The methods are DeepSpeed's, so that nothing of what is tested is replaced.
"""

import os
import runpy
import signal
import sys
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

method, call, rank, *arguments = sys.argv[1:]
owner: Any = {"step": DeepSpeedEngine, "save": TorchCheckpointEngine}[method]
original = getattr(owner, method)
calls = 0


def dying(*args: Any, **options: Any) -> Any:
    global calls
    calls += 1
    if calls == int(call) and os.environ["RANK"] == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)


setattr(owner, method, dying)
sys.argv = arguments
runpy.run_path(sys.argv[0], run_name="__main__")
