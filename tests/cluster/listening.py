"""One rank that listens to the other machine and does nothing else: ``listening.py FOLDER``, until ``FOLDER/done``."""

import json
import sys
import time
from pathlib import Path

from dpo_ds.engine.pulse import Place, watch_machines
from dpo_ds.launcher.identity import Identity

SILENCE_S = 4


def _share(place: Place | None) -> Place | None:
    file = Path(sys.argv[1], "place.json")
    if place is not None:
        file.with_suffix(".tmp").write_text(json.dumps(vars(place)))
        file.with_suffix(".tmp").rename(file)
    while not file.exists():
        time.sleep(0.05)
    return Place(**json.loads(file.read_text()))


if __name__ == "__main__":
    identity = Identity.from_environment()
    unwatch = watch_machines(identity, _share, silence_s=SILENCE_S)
    Path(sys.argv[1], f"{identity.rank}.listens").touch()
    while not Path(sys.argv[1], "done").exists():
        time.sleep(0.05)
    unwatch()
    print("left")
    time.sleep(2 * SILENCE_S)
