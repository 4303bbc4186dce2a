"""The SLURM launcher, with submitit's executor that runs the array on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from studies import Command, no_leftovers

from lda.errors import UsageError
from sweeps.slurm import main, slurm_options

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
