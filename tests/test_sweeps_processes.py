"""Devices and worker processes of one machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from lda.errors import UsageError
from sweeps.crew import slots as devices
from sweeps.crew.assignment import Assignment
from sweeps.crew.processes import StudyError, WorkerPool
from sweeps.crew.slots import Slot, plan_slots
from sweeps.study_folder import StudyFolder


def test_cpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(devices, "cores", lambda: 8)
    assert plan_slots(None, 0, "auto") == [Slot(index, "", 1) for index in range(8)]
    assert plan_slots(None, 3, "auto") == [Slot(0, "", 3), Slot(1, "", 3)]
    assert plan_slots(2, 0, "auto") == [Slot(0, "", 1), Slot(1, "", 1)]


def test_gpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(devices, "cores", lambda: 16)
    assert plan_slots(None, 0, "auto") == [Slot(0, "2", 8), Slot(1, "5", 8)]
    assert [slot.gpu for slot in plan_slots(3, 0, "auto")] == ["2", "5", "2"]  # more workers than GPUs share them
    assert [slot.gpu for slot in plan_slots(2, 0, "cpu")] == ["", ""]
    assert Slot(0, "5", 8).environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert Slot(0, "5", 8).environment["OMP_NUM_THREADS"] == "8"


def test_one_gpu_can_be_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(devices, "cores", lambda: 16)
    assert plan_slots(None, 0, "cuda") == plan_slots(None, 0, "auto")
    assert plan_slots(None, 0, "cuda:1") == [Slot(0, "5", 16)]
    for missing in ("cuda:2", "cuda:x"):
        with pytest.raises(UsageError, match=rf"device: '{missing}' is not there; this machine has 2 CUDA"):
            plan_slots(None, 0, missing)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match=r"device: 'cuda' is not there; this machine has 0 CUDA device\(s\)"):
        plan_slots(None, 0, "cuda")


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: x)'\necho 'GPU 1: NVIDIA H200 (UUID: y)'\n")
    tool.chmod(0o755)
    assert devices.gpus() == ["0", "1"]
    tool.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert devices.gpus() == []


def test_workers_that_die_before_they_begin_end_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StudyFolder(tmp_path)
    folder.workers.mkdir()
    monkeypatch.setattr(sys, "executable", "/bin/false")

    def nothing(slot: Slot, incarnation: int) -> Assignment:
        return Assignment("s", {}, "", str(tmp_path), "", {}, "real", slot.index, 1, "", None)

    pool = WorkerPool([Slot(0, "", 1)], folder, nothing)

    def supervise() -> None:
        while True:
            pool.supervise(attempts=0)
            time.sleep(0.05)

    with pytest.raises(StudyError, match="workers die before they begin: the last one ended with exit code 1"):
        supervise()
    pool.stop()
    assert "worker 0 ended with exit code 1; starting it again" in (tmp_path / "events.jsonl").read_text()
