"""Devices and worker processes of one machine."""

from __future__ import annotations

import itertools
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lda.errors import UsageError
from sweeps.crew import slots as devices
from sweeps.crew.assignment import Assignment, End
from sweeps.crew.processes import StudyError, WorkerPool
from sweeps.crew.slots import Slot, plan_slots
from sweeps.list.machines import host_of, slot_of
from sweeps.study_folder import StudyFolder


def test_cpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(devices, "cores", lambda: 8)
    assert plan_slots(None, 0, "auto") == [Slot(index, "", 1) for index in range(8)]
    assert plan_slots(None, 3, "auto") == [Slot(0, "", 3), Slot(1, "", 3)]
    assert plan_slots(2, 0, "auto") == [Slot(0, "", 1), Slot(1, "", 1)]


@pytest.fixture
def gpus_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Puts an nvidia-smi that prints these lines, and nothing else, on PATH."""

    def listed(*lines: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(devices, "_DEVICES", tmp_path)

    return listed


def eight() -> list[str]:
    return [f"GPU {index}: NVIDIA H100 (UUID: GPU-{index}a2b3c4d-0000)" for index in range(8)]


def test_gpu_slots(monkeypatch: pytest.MonkeyPatch, gpus_listed: Callable[..., None]) -> None:
    gpus_listed(*eight())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(devices, "cores", lambda: 16)
    assert plan_slots(None, 0, "auto") == [Slot(0, "2", 8), Slot(1, "5", 8)]
    assert [slot.gpu for slot in plan_slots(3, 0, "auto")] == ["2", "5", "2"]  # more workers than GPUs share them
    assert [slot.gpu for slot in plan_slots(2, 0, "cpu")] == ["", ""]
    assert Slot(0, "5", 8).environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert Slot(0, "5", 8).environment["OMP_NUM_THREADS"] == "8"


def test_one_gpu_can_be_picked(monkeypatch: pytest.MonkeyPatch, gpus_listed: Callable[..., None]) -> None:
    gpus_listed(*eight())
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


@pytest.mark.parametrize(
    ("visible", "found", "told"),
    [
        ("0,1,2,3", [], "'0' is not there, this machine has 0 GPU(s); the CPU is used"),
        ("-1", [], ""),
        ("", [], ""),
        (" , ", [], ""),
        ("GPU-0a2b3c4d", [], "'GPU-0a2b3c4d' is not there"),
        ("NoDevFiles", [], "'NoDevFiles' is not there"),
    ],
)
def test_no_gpu_is_taken_for_one(
    visible: str,
    found: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    gpus_listed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus_listed()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.gpus() == found
    assert told in (line := capsys.readouterr().err)
    assert len(line.splitlines()) == bool(told)


@pytest.mark.parametrize(
    ("visible", "found", "told"),
    [
        ("1,0", ["1", "0"], ""),
        ("0,7,1", ["0"], "'7' is not there, this machine has 2 GPU(s); 0 used"),  # CUDA stops there as well
        ("1,-1,0", ["1"], ""),
        ("GPU-1a2b", ["GPU-1a2b"], ""),
        ("GPU-9", [], "'GPU-9' is not there"),
        ("MIG-77c4-part,1", ["MIG-77c4-part", "1"], ""),
        ("MIG-GPU-1a2b3c4d-0000/1/0", ["MIG-GPU-1a2b3c4d-0000/1/0"], ""),
    ],
)
def test_gpus_have_numbers_and_names(
    visible: str,
    found: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    gpus_listed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpus_listed(*eight()[:2], "  MIG 1g.10gb     Device  0: (UUID: MIG-77c4-part)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.gpus() == found
    assert told in (line := capsys.readouterr().err)
    assert len(line.splitlines()) == bool(told)


def test_devices_count_where_no_tool_lists_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container often has the one and not the other; and a tool may hang with its driver."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "_DEVICES", tmp_path)
    for name in ("nvidiactl", "nvidia-uvm", "nvidia3", "nvidia5"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,1")
    assert devices.gpus() == ["GPU-abc", "1"]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nwhile :; do :; done\n")
    tool.chmod(0o755)
    monkeypatch.setattr(devices, "_SMI_SECONDS", 0.2)
    assert devices.gpus() == ["GPU-abc", "1"]


def test_more_workers_than_a_machine_can_start_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--workers: expected \d+ at most, got 1000000: each is a process"):
        plan_slots(10**6, 1, "cpu")


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.gpus() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: x)'\necho 'GPU 1: NVIDIA H200 (UUID: y)'\n")
    tool.chmod(0o755)
    assert devices.gpus() == ["0", "1"]
    tool.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert devices.gpus() == []


def nothing(slot: Slot, incarnation: int) -> Assignment:
    return Assignment("s", {}, "", "", "", {}, "real", slot.index, 1, "", None, "")


def supervised(folder: StudyFolder, attempts: Iterator[int]) -> None:
    """A pool of one slot until it raises or `attempts` (those begun so far, at every look) run out."""
    folder.workers.mkdir(parents=True)
    pool = WorkerPool([Slot(0, "", 1)], folder, nothing)
    try:
        for begun in attempts:
            pool.supervise(begun)
            time.sleep(0.05)
    finally:
        pool.stop()


def test_workers_that_die_before_they_begin_end_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StudyError, match="workers die before they begin: the last one ended with exit code 1"):
        supervised(StudyFolder(tmp_path), itertools.repeat(0))
    assert "worker 0 ended with exit code 1; starting it again" in (tmp_path / "events.jsonl").read_text()


def ending(folder: Path, body: str) -> str:
    """A program that stands in for Python, and so for the worker: it runs `body` whatever it is asked to."""
    script, program = folder / "body.py", folder / "python"
    script.write_text(f"import os, signal, sys\nfrom sweeps.crew.assignment import End\n{body}\n")
    program.write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))}\n"
    )  # paths with spaces
    program.chmod(0o755)
    return str(program)


def test_a_worker_that_cannot_use_the_data_says_so_whatever_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message was the last line of the log: a warning that came later took its place."""
    body = """End("unusable", "error: no such data").send(sys.stdout.buffer)
print("a late warning", file=sys.stderr)
sys.exit(2)"""
    monkeypatch.setattr(sys, "executable", ending(tmp_path, body))
    with pytest.raises(UsageError) as error:
        supervised(StudyFolder(tmp_path / "study"), itertools.repeat(0))
    assert str(error.value) == "error: no such data"
    assert "a late warning" in next((tmp_path / "study" / "workers").glob("*.log")).read_text()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('End("failed", "ValueError: bad luck").send(sys.stdout.buffer); sys.exit(1)', "failed: ValueError: bad luck"),
        ('print("noise"); sys.exit(1)', "ended with exit code 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9"),
        ("os._exit(75)", "lost touch with the storage"),
        ('End("failed", "x" * 10**6).send(sys.stdout.buffer); sys.exit(1)', "failed: xxx"),
    ],
    ids=["failed", "noise", "killed", "fenced", "long"],
)
def test_how_a_worker_ended_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, told: str) -> None:
    monkeypatch.setattr(sys, "executable", ending(tmp_path, body))
    folder = StudyFolder(tmp_path / "study")
    supervised(folder, itertools.takewhile(lambda _: not folder.events()[0], itertools.count()))
    event = folder.events()[0][0]
    assert event.kind == "worker"
    assert event.text.startswith(f"worker 0 {told}")
    assert event.text.endswith("; starting it again")


_PRINTS = """
import json, sys, threading
from sweeps.crew import worker
class Failing:
    def __init__(self, assignment, stop):
        print("printed by a library")
    def run(self):
        raise ValueError("two\\nlines")
worker.Worker = Failing
sys.exit(worker.main())
"""


def test_a_worker_has_its_stdout_for_its_last_word_alone(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _PRINTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    nothing(Slot(0, "", 1), 0).send(process.stdin)
    said, log = process.communicate()
    assert process.returncode == 1
    assert End.receive(said) == End("failed", "ValueError: two")
    assert said.count(b"\n") == 1
    assert b"printed by a library" in log
    assert b"Traceback" in log


def test_two_commands_on_one_machine_have_slots_of_their_own(tmp_path: Path) -> None:
    """One may have a sick GPU, and the other none."""
    pools = [WorkerPool([Slot(0, "", 1)], StudyFolder(tmp_path), lambda slot, number: None) for _ in range(2)]  # type: ignore[arg-type, return-value]
    (first,), (second,) = pools[0].open, pools[1].open
    assert first != second
    assert {slot_of(f"{name}-0a1b2c") for name in (first, second)} == {first, second}
    assert {host_of(f"{name}-0a1b2c") for name in (first, second)} == {platform.node()}
