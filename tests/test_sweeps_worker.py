"""The worker process: its sampler, its fence, its way of finding work done before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from study_files import write_unit

from sweeps.crew.worker import build_sampler
from sweeps.plan.space import distributions
from sweeps.plan.study_files import load, resolve, study_file
from sweeps.study_folder import StudyFolder, WorkerSign


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_workers_open_with_different_proposals(sampler: str, tmp_path: Path) -> None:
    text = study_file("smoke").read_text().replace("sampler: random", f"sampler: {sampler}")
    (tmp_path / "mine.yaml").write_text(text)
    spec = resolve(load(tmp_path / "mine.yaml"), tmp_path / "mine.yaml")

    def first(salt: str, study: str = "mine") -> dict[str, float]:
        made = optuna.create_study(sampler=build_sampler(spec, study, salt))
        return made.ask(distributions(spec.search.space, spec.method)).params

    assert first("a") == first("a")
    assert first("a") != first("b")
    assert first("a") != first("a", study="other")


_BEATS = """
import sys, threading, time
from sweeps.crew.heartbeat import Heartbeat
count = 0
def beat():
    global count
    count += 1
    if count > 3:
        threading.Event().wait(60)  # the database does not answer
with Heartbeat(beat, 0.1, 0.5) as heart:
    for _ in range(100):
        time.sleep(0.05)
        print("alive", flush=True)
"""


def test_a_worker_whose_heartbeat_hangs_ends_itself() -> None:
    done = subprocess.run([sys.executable, "-c", _BEATS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert "fenced" in done.stderr
    assert 4 <= done.stdout.count("alive") <= 40


_RAISES = """
import time
from optuna.exceptions import StorageInternalError
from sweeps.crew.heartbeat import Heartbeat
start, late = time.monotonic(), []
def beat():
    if 0.2 < time.monotonic() - start < 0.8:
        raise StorageInternalError("away")
with Heartbeat(beat, 0.1, 2.0) as heart:
    time.sleep(3)
print("done")
"""


def test_a_short_outage_is_survived() -> None:
    done = subprocess.run([sys.executable, "-c", _RAISES], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "heartbeat not recorded, will try again" in done.stderr


_HOLDS = """
import sys, time
from pathlib import Path
from sweeps.study_folder import StudyFolder, WorkerSign
sign = WorkerSign(StudyFolder(Path(sys.argv[1])), "w")
sign.write({"state": "running"})
print("ready", flush=True)
time.sleep(60)
"""


def test_a_free_lock_is_a_dead_worker(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", _HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert list(folder.dead_workers()) == []
    process.kill()
    process.communicate()
    assert list(folder.dead_workers()) == ["w"]
    assert [status["state"] for status in folder.statuses()] == ["running"]
    folder.forget_worker("w")
    assert list(folder.dead_workers()) == []
    assert folder.statuses() == []


def test_a_worker_that_leaves_in_order_leaves_nothing(tmp_path: Path) -> None:
    sign = WorkerSign(StudyFolder(tmp_path), "w")
    sign.write({"state": "waiting"})
    sign.remove()
    assert list((tmp_path / "workers").iterdir()) == []


def test_a_unit_run_before_is_found_wherever_it_lies(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    for trial, unit in (("trial-0000", "aaa"), ("trial-0001", "bbb")):
        write_unit(folder.path / trial / "cuhk03-s0", "cuhk03", unit=unit)
    (tmp_path / "trial-0002").mkdir()
    (folder.path / "trial-0002" / "cuhk03-s0").symlink_to("../trial-0001/cuhk03-s0")
    assert folder.finished_unit("bbb") == folder.path / "trial-0001" / "cuhk03-s0"
    assert folder.finished_unit("ccc") is None
