"""What DeepSpeed needs before ranks without a GPU can talk: a C++ compiler and ninja, to build its collective once."""

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from dpo_ds.errors import UserError

_BUILD_TIMEOUT_S = 300
_PROGRAM = "#include <Python.h>\n#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"


def expose_ninja() -> None:
    """Puts the environment's scripts on PATH where ninja would not be found, as when a venv is not activated.

    torch starts ninja by its bare name, so every rank needs this before it joins.
    """
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def check_cpu_collective() -> None:
    """Checks that DeepSpeed can build, or has built, the collective of ranks without a GPU; elsewhere does nothing.

    DeepSpeed itself would die in ninja's output, on every rank.

    Raises:
        UserError: the compiler or ninja is missing or does not work, or an earlier build was broken off.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return
    expose_ninja()
    if not cpp_extension.is_ninja_available():
        raise UserError("ninja does not run, which builds DeepSpeed's CPU collective; install it: pip install ninja")
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    _wait_for_other_build(folder / "lock")
    if not (folder / f"{builder.name}.so").exists():
        _check_compiler(builder.cxx_args())


def _wait_for_other_build(lock: Path) -> None:
    # torch waits for this file to go, without end; a build that was killed leaves it behind.
    while lock.exists():
        if time.time() - lock.stat().st_mtime > _BUILD_TIMEOUT_S:
            raise UserError(f"{lock} is left from a build of DeepSpeed's CPU collective that was broken off: remove it")
        time.sleep(1)


def _check_compiler(flags: list[str]) -> None:
    compiler = str(cpp_extension.get_cxx_compiler())  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.cpp")
        source.write_text(_PROGRAM)
        include = sysconfig.get_path("include")
        command = [*shlex.split(compiler), *flags, f"-I{include}", str(source), "-o", f"{folder}/program"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            reason = next((line for line in said.splitlines() if "error" in line), " ".join(said.split()))
            raise UserError(
                f"the C++ compiler {compiler!r} cannot build DeepSpeed's CPU collective ({reason}): install g++ and "
                "Python's headers (Debian and Ubuntu: apt-get install g++ python3-dev), or name a compiler in CXX"
            ) from None
