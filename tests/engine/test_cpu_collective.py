"""What ranks without a GPU need before they can talk."""

import os
import shutil
import sysconfig

import pytest
from deepspeed.accelerator import get_accelerator

from dpo_ds.engine.cpu_collective import check_cpu_collective, expose_ninja
from dpo_ds.errors import UserError


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """A machine without a GPU on which the collective was never built; gives the folder that it would be built in."""
    if get_accelerator().device_name() != "cpu":
        pytest.skip("DeepSpeed uses a GPU here, whose ranks need no collective of its own")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "deepspeed_shm_comm"


def test_a_working_compiler_and_ninja_are_enough(nothing_built):
    check_cpu_collective()


def test_a_missing_compiler_is_named_with_what_to_install(nothing_built, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"^the C\+\+ compiler 'no-such-compiler' cannot .*apt-get install g\+\+"):
        check_cpu_collective()


def test_a_compiler_that_does_not_compile_is_quoted(nothing_built, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(UserError, match=r"cannot build .*\(fatal error: Python.h: No such file\): install") as raised:
        check_cpu_collective()
    assert "\n" not in str(raised.value)


def test_a_collective_that_is_built_needs_no_compiler(nothing_built, monkeypatch):
    nothing_built.mkdir()
    (nothing_built / "deepspeed_shm_comm.so").touch()
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_cpu_collective()


def test_the_lock_of_a_build_that_was_broken_off_is_named(nothing_built):
    # torch would wait for it without end.
    nothing_built.mkdir()
    lock = nothing_built / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    with pytest.raises(UserError, match=r"deepspeed_shm_comm/lock is left from a build .* remove it"):
        check_cpu_collective()


def test_ninja_is_found_although_no_environment_is_activated(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ninja") is None
    expose_ninja()
    assert shutil.which("ninja") == os.path.join(sysconfig.get_path("scripts"), "ninja")
    expose_ninja()
    assert os.environ["PATH"].split(os.pathsep) == [sysconfig.get_path("scripts"), str(tmp_path)]
