"""Jobs on clusters that are made of this one machine."""

import os
import shutil

import pytest


def needs(lacking: str | None) -> pytest.MarkDecorator:
    """Skips tests for want of something; fails where ``DPO_DS_REQUIRE_CLUSTER`` says that it must be there.

    Args:
        lacking: what this machine lacks, or None.
    """
    assert lacking is None or "DPO_DS_REQUIRE_CLUSTER" not in os.environ, lacking
    return pytest.mark.skipif(lacking is not None, reason=str(lacking))


def needs_program(program: str, package: str) -> pytest.MarkDecorator:
    """The same for one program, which a package of Debian's brings."""
    return needs(None if shutil.which(program) else f"{program} not installed (apt install {package})")
