import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

from tests.ranks import REPOSITORY


def test_the_wheel_carries_what_people_type_and_the_ds_configs(tmp_path):
    (wheel,) = WheelBuilder(str(REPOSITORY)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("launch", "ds_configs"):
        for file in (REPOSITORY / folder).rglob("*"):
            if file.suffix in (".py", ".json", ".yaml", ".jsonl") and "__pycache__" not in file.parts:
                assert f"dpo_ds/shipped/{Path(folder) / file.relative_to(REPOSITORY / folder)}" in names
    assert "dpo_ds/engine/policy.py" in names
