"""The C++ extensions that DeepSpeed compiles on a machine: built once, before there are ranks that would wait."""

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from filelock import FileLock
from torch.utils import cpp_extension

from dpo_ds.errors import UserError

_BUILD_TIMEOUT_S = 300
_PROGRAM = """
#include <Python.h>
#ifdef _OPENMP
#include <omp.h>
int main() { return omp_get_max_threads() > 0 ? 0 : 1; }
#else
int main() { return 0; }
#endif
"""
_CPU_COLLECTIVE = ("ShareMemCommBuilder", "CPU collective")
_CPU_ADAM = ("CPUAdamBuilder", "CPU Adam")
_FILE_ACCESS = ("AsyncIOBuilder", "file access")
_PINNED_MEMORY = ("PinMemoryBuilder", "pinned memory")
_QUANTIZER = ("QuantizerBuilder", "quantizer")


def expose_ninja() -> None:
    """Makes the environment's own ninja the first on PATH, as activating a venv does.

    torch starts ninja by its bare name, so every rank needs this before it joins. Where a machine has another ninja,
    too, one run would build with the one and the next with the other, and each would build all that the other built.
    """
    scripts = sysconfig.get_path("scripts")
    own = Path(scripts, "ninja")
    if own.exists() and shutil.which("ninja") != str(own):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])


def keeps_optimizer_on_host(ds_config: Mapping[str, Any]) -> bool:
    """Returns whether a ds_config keeps masters and optimizer's states in host memory or on NVMe."""
    return _offload_device(ds_config, "offload_optimizer") != "none"


def _offload_device(ds_config: Mapping[str, Any], section: str) -> str:
    return str((ds_config["zero_optimization"].get(section) or {}).get("device", "none"))


def build_extensions(
    policy_config: Mapping[str, Any], *, reference_config: Mapping[str, Any] | None = None, optimizer: str = "adamw"
) -> None:
    """Builds what DeepSpeed would compile in the middle of the start, or opens what was built before.

    There it would die in ninja's output, on every rank, and a killed build would make all later ones wait without end.

    Args:
        policy_config: the policy's resolved DeepSpeed config.
        reference_config: the reference's, if it has an engine.
        optimizer: what updates the policy.

    Raises:
        UserError: the compiler or ninja is missing or does not work, or there is no such extension for this device.
    """
    on_cpu = get_accelerator().device_name() == "cpu"
    wanted = [_CPU_COLLECTIVE] if on_cpu else []
    for role, config in (("policy", policy_config), ("reference", reference_config)):
        section = config["zero_optimization"] if config else {}
        if quantized := [key for key, value in section.items() if key.startswith("zero_quantized_") and value]:
            if on_cpu:
                raise UserError(
                    f"{quantized[0]} cannot be in the {role}'s ds_config on ranks without a GPU: DeepSpeed's quantizer "
                    "is for GPUs alone; leave it out"
                )
            wanted.append(_QUANTIZER)
    if optimizer == "adamw" and keeps_optimizer_on_host(policy_config):
        wanted.append(_CPU_ADAM)
    if "nvme" in (_offload_device(policy_config, section) for section in ("offload_optimizer", "offload_param")):
        # The second builds the first where nobody has, in a folder of its own.
        wanted += [_PINNED_MEMORY, _FILE_ACCESS]
        if not get_accelerator().create_op_builder(_FILE_ACCESS[0]).is_compatible(verbose=False):
            raise UserError(
                "the policy's ds_config offloads to files, for which DeepSpeed needs libaio; install it (Debian and "
                "Ubuntu: apt-get install libaio-dev), or offload to the cpu"
            )
    for builder, what in wanted:
        _build(get_accelerator().create_op_builder(builder), what)


def _build(builder: Any, what: str) -> None:
    expose_ninja()
    if not cpp_extension.is_ninja_available():
        raise UserError(f"ninja does not run, which builds DeepSpeed's {what}; install it: pip install ninja")
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    with FileLock(folder / "one_builder.lock"):
        _outlive_other_build(folder / "lock")
        if not (folder / f"{builder.name}.so").exists():
            _check_compiler(builder.cxx_args(), what)
            print(f"building DeepSpeed's {what}, which takes about a minute and is done once ...", flush=True)
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
            raise UserError(
                f"DeepSpeed's {what} cannot be built ({_reason(str(error))}); mend that, or remove {folder}, "
                "which may hold the build of another environment"
            ) from None


def _outlive_other_build(lock: Path) -> None:
    # torch waits for this file to go, without end; a build that was killed leaves it behind.
    while lock.exists():
        if time.time() - lock.stat().st_mtime > _BUILD_TIMEOUT_S:
            lock.unlink(missing_ok=True)
            return
        time.sleep(1)


def _check_compiler(flags: list[str], what: str) -> None:
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
            raise UserError(
                f"the C++ compiler {compiler!r} cannot build DeepSpeed's {what} ({_reason(said)}): install g++ and "
                "Python's headers (Debian and Ubuntu: apt-get install g++ python3-dev), or name a compiler in CXX"
            ) from None


def _reason(said: str) -> str:
    return next((line for line in said.splitlines() if "error" in line), " ".join(said.split()))
