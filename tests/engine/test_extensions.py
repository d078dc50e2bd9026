"""What DeepSpeed compiles on a machine, and what a user hears where that cannot work."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from dpo_ds.engine.extensions import _check_compiler, build_extensions, expose_ninja, keeps_optimizer_on_host
from dpo_ds.errors import UserError
from tests.ranks import REPOSITORY

POLICY = {"zero_optimization": {"stage": 3}}
HAS_LIBAIO = get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False)
BUILD = f"from dpo_ds.engine.extensions import build_extensions; build_extensions({POLICY})"


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """A machine without a GPU on which the collective was never built; gives the folder that it would be built in."""
    if get_accelerator().device_name() != "cpu":
        pytest.skip("DeepSpeed uses a GPU here, whose ranks need no collective of its own")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "deepspeed_shm_comm"


def test_two_processes_build_once_and_a_lock_that_a_killed_build_left_does_not_stop_them(nothing_built):
    nothing_built.mkdir()
    lock = nothing_built / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    both = [
        subprocess.Popen([sys.executable, "-c", BUILD], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = "".join(process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count("building DeepSpeed's CPU collective") == 1
    assert (nothing_built / "deepspeed_shm_comm.so").exists()
    assert not lock.exists()


def test_a_missing_compiler_is_named_with_what_to_install(nothing_built, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"^the C\+\+ compiler 'no-such-compiler' cannot .*apt-get install g\+\+"):
        build_extensions(POLICY)


def test_a_compiler_that_does_not_compile_is_quoted(nothing_built, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(UserError, match=r"cannot build .*\(fatal error: Python.h: No such file\): install") as raised:
        build_extensions(POLICY)
    assert "\n" not in str(raised.value)


def test_a_build_that_breaks_is_one_line(nothing_built, monkeypatch, tmp_path):
    # Compiles the check's one program and nothing else.
    moody = tmp_path / "g++"
    moody.write_text('#!/bin/sh\ncase "$*" in *program.cpp*|*--version*) ;; *) echo "error: no room"; exit 1;; esac\n')
    moody.chmod(0o755)
    monkeypatch.setenv("CXX", str(moody))
    finished = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, check=False
    )
    last = finished.stderr.strip().splitlines()[-1]
    assert "UserError: DeepSpeed's CPU collective cannot be built (" in last
    assert "no room" in last


def test_missing_libaio_is_named_with_what_to_install(nothing_built, monkeypatch):
    # A compiler that links nothing stands for a machine without the library.
    monkeypatch.setenv("CC", "false")
    to_files = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
    with pytest.raises(UserError, match=r"DeepSpeed needs libaio; install it .*libaio-dev"):
        build_extensions(to_files)


@pytest.mark.parametrize(
    ("offload", "on_host"),
    [(None, False), ({"device": "none"}, False), ({}, False), ({"device": "cpu"}, True), ({"device": "nvme"}, True)],
)
def test_cpu_adam_is_for_optimizers_that_are_kept_on_the_host(offload, on_host):
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}
    assert keeps_optimizer_on_host(config) is on_host


def test_a_quantizer_is_for_gpus_alone():
    zero, plain = {"stage": 3, "zero_quantized_weights": True}, {"zero_optimization": {"stage": 3}}
    with pytest.raises(
        UserError, match="zero_quantized_weights cannot be in the reference's ds_config on ranks without"
    ):
        build_extensions(plain, reference_config={"zero_optimization": zero})
    with pytest.raises(UserError, match="in the policy's ds_config"):
        build_extensions({"zero_optimization": zero})


def test_the_environments_own_ninja_is_found_first_although_none_is_activated(monkeypatch, tmp_path):
    another = tmp_path / "ninja"
    another.write_text("#!/bin/sh\n")
    another.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ninja") == str(another)
    expose_ninja()
    assert shutil.which("ninja") == os.path.join(sysconfig.get_path("scripts"), "ninja")
    expose_ninja()
    assert os.environ["PATH"].split(os.pathsep) == [sysconfig.get_path("scripts"), str(tmp_path)]


@pytest.mark.parametrize("builder", ["ShareMemCommBuilder", "CPUAdamBuilder", "PinMemoryBuilder", "AsyncIOBuilder"])
def test_the_check_of_the_compiler_asks_for_no_more_than_a_builder_does(builder):
    _check_compiler(get_accelerator().create_op_builder(builder).cxx_args(), builder)


@pytest.mark.skipif(not HAS_LIBAIO, reason="needs libaio")
def test_what_file_access_builds_beside_itself_outlives_a_killed_build_too():
    lock = Path(cpp_extension._get_build_directory("pin_memory", verbose=False)) / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    to_files = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    build = f"from dpo_ds.engine.extensions import build_extensions; build_extensions({to_files})"
    subprocess.run([sys.executable, "-c", build], cwd=REPOSITORY, check=True, timeout=400)
    assert not lock.exists()
