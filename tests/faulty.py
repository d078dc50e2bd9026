"""Runs a script on a rank to which something happens in a step: ``python faulty.py WHAT STEP RANK SCRIPT ...``.

WHAT is ``raise`` or ``hang``. The method is DeepSpeed's, so that nothing of what is tested is replaced.
"""

import os
import runpy
import sys
import time
from typing import Any

from deepspeed import DeepSpeedEngine

what, call, rank, *arguments = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
original = DeepSpeedEngine.step
calls = 0


def faulty(*args: Any, **options: Any) -> Any:
    global calls
    calls += 1
    if calls == int(call) and os.environ["RANK"] == rank:
        print(f"fault at {time.monotonic()}", flush=True)
        if what == "raise":
            raise ValueError("the disk is on fire")
        time.sleep(600)
    return original(*args, **options)


DeepSpeedEngine.step = faulty
sys.argv = arguments
runpy.run_path(sys.argv[0], run_name="__main__")
