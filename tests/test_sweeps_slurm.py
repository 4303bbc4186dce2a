"""The SLURM launcher, with submitit's executor that runs the array on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studies import REPOSITORY, Command, no_leftovers, wait_for

from lda.errors import UsageError
from lda.runs import read_metrics
from sweeps.slurm import main, parser, slurm_options, submitted

pytest.importorskip("submitit", reason="the SLURM launcher needs submitit, install lda-reid[slurm]")

__all__ = ["no_leftovers"]


def test_options() -> None:
    assert slurm_options(["partition=gpu", "time=720"]) == {"slurm_partition": "gpu", "slurm_time": 720}
    with pytest.raises(UsageError, match="expected KEY=VALUE"):
        slurm_options(["partition"])


def test_sqlite_is_refused_for_several_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--logs", str(tmp_path), "--", "--study", "smoke"]) == 2
    assert "sqlite serves one machine" in capsys.readouterr().err


def test_a_password_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--study", "smoke", "--storage", "postgresql://u:s3cret@h/d"]
    assert main(["--logs", str(tmp_path / "logs"), "--", *run]) == 2
    assert "put the URL into LDA_STORAGE" in (told := capsys.readouterr().err)
    assert "s3cret" not in told
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_it_waits_ends_with_130(tmp_path: Path, standin_tiny: Path) -> None:
    """The tasks are the cluster's by then: here they are ended by hand."""
    Command(tmp_path, standin_tiny, base={"steps_per_epoch": 10**6})
    run = ["--study", "mine.yaml", "--data-root", str(standin_tiny), "--workers", "1", "--output", str(tmp_path)]
    logs = ["--cluster", "local", "--tasks", "1", "--wait", "--logs", str(tmp_path / "logs")]
    with (tmp_path / "output.txt").open("w") as output:  # no pipe: the tasks would hold its other end
        process = subprocess.Popen(
            [sys.executable, "-m", "sweeps.slurm", *logs, "--", *run],
            stdout=output, stderr=output, cwd=tmp_path, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
    try:
        wait_for(lambda: "1 tasks submitted" in (tmp_path / "output.txt").read_text(), process=process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in (tmp_path / "output.txt").read_text()
    finally:
        process.kill()
        while tasks := _of(tmp_path):
            for pid in tasks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


def _of(folder: Path) -> list[int]:
    """Processes that name the folder in their command line, and have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if str(folder).encode() in (path / "cmdline").read_bytes() and int(path.name) != os.getpid():
                found.append(int(path.name))
    return found


@pytest.mark.slow
def test_an_array_of_two_tasks_shares_a_study(
    tmp_path: Path, standin_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {
        "sampler": "grid",
        "trials": 9,
        "space": {"bank_momentum": {"choices": [0.9, 0.6]}, "gem_p": {"choices": [3, 1]}},
    }
    command = Command(tmp_path, standin_tiny, search=grid, base={"steps_per_epoch": 20})
    monkeypatch.chdir(tmp_path)
    run = ["--study", "mine.yaml", "--data-root", str(standin_tiny), "--workers", "1", "--storage", "journal"]
    assert main(["--cluster", "local", "--tasks", "2", "--wait", "--logs", str(tmp_path / "logs"), "--", *run]) == 0
    assert len(command.results()) == 8
    workers = {path.name for path in (command.study / "workers").glob("*.log")}
    assert workers == {f"{os.uname().nodename}-0.log"}
    points = [command.trial(f"trial-000{number}")["params"] for number in range(4)]
    assert points[0] == {"bank_momentum": 0.9, "gem_p": 3.0}  # the defaults come first
    assert {(point["bank_momentum"], point["gem_p"]) for point in points} == {
        (m, p) for m in (0.6, 0.9) for p in (1, 3)
    }


@pytest.mark.slow
def test_a_task_that_must_go_is_queued_again_and_goes_on(
    tmp_path: Path, standin_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warned in the middle of a training: nothing is lost, and the training goes on from its checkpoint."""
    search = {"trials": 1, "pruning": {"rule": "none"}, "space": {"bank_momentum": {"low": 0.5, "high": 0.99}}}
    command = Command(tmp_path, standin_tiny, search=search, base={"epochs": 12, "steps_per_epoch": 10})
    monkeypatch.chdir(tmp_path)
    run = ["--study", "mine.yaml", "--data-root", str(standin_tiny), "--workers", "1", "--storage", "journal"]
    logs = ["--cluster", "local", "--tasks", "1", "--logs", str(tmp_path / "logs"), "--slurm", "timeout_min=60"]
    (job,) = submitted(parser().parse_args([*logs, "--", *run]))
    wait_for(lambda: any(command.study.glob("trial-*/*/checkpoint.pt")))
    (task,) = [pid for pid in _of(tmp_path) if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(task, signal.SIGUSR2)
    assert job.result() == 0
    assert job.stdout().count("Requeued job") == 1
    assert job.stderr().count("interrupted; everything finished is kept") == 1
    assert len(command.results()) == 2
    rows = read_metrics(next(iter(command.study.glob("trial-0000/*/metrics.jsonl"))))
    steps = [row["step"] for row in rows if "loss/total" in row]
    assert steps == sorted(set(steps))
