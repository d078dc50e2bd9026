"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def material() -> Path:
    """The folder of real preference data, tokenizers and the tiny pretrained model."""
    folder = os.environ.get("DPO_DS_MATERIAL")
    if not folder:
        pytest.skip("DPO_DS_MATERIAL is not set: it names the folder with real data, tokenizers and a tiny model")
    return Path(folder)
