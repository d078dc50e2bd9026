import json

from dpo_ds.errors import Stopped
from dpo_ds.launcher.marker import mark_stopped, unmark


def test_a_marker_says_how_to_go_on_and_can_be_taken_away(tmp_path):
    mark_stopped(tmp_path / "out", Stopped("SIGUSR1", step=3, checkpoint=None))
    mark_stopped(tmp_path / "out", Stopped("SIGTERM", step=7, checkpoint="checkpoints/step-00000007"))
    assert json.loads((tmp_path / "out/RESUME.json").read_text()) == {
        "status": "stopped",
        "reason": "SIGTERM",
        "step": 7,
        "checkpoint": "checkpoints/step-00000007",
        "command_exit_code": 200,
    }
    for _ in range(2):
        unmark(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
