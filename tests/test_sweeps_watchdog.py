"""A worker that lives and does nothing: said, then its trial is given away and the process ends."""

from __future__ import annotations

import subprocess
import sys

from sweeps.crew.heartbeat import EXIT_HUNG

HANGS = """
import time
from sweeps.crew.heartbeat import Watchdog
with Watchdog(lambda how: print("stalled:", how, flush=True), lambda how: print("hung:", how, flush=True), 1.2) as dog:
    for _ in range(4):
        time.sleep(0.4)
        dog.moved()
    print("worked", flush=True)
    time.sleep(60)
"""


def test_what_moves_is_left_alone_and_what_hangs_gives_its_trial_away() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=50)
    lines = done.stdout.splitlines()
    assert done.returncode == EXIT_HUNG, done.stderr
    assert lines[-2].startswith("stalled: no step for")
    assert lines[-1].startswith("hung: no step for")
    assert lines.index("worked") > lines.index(lines[0])
    assert sum(line.startswith("hung") for line in lines) == 1


def test_whoever_is_done_is_not_watched_any_more() -> None:
    body = HANGS.replace("    time.sleep(60)\n", "time.sleep(2)\n")
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0
    assert "hung" not in done.stdout
