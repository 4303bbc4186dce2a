"""Every file of a unit may be torn, zeroed, empty, gone, a folder or a dangling link: the unit ends as undisturbed."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studies import REPOSITORY
from test_unit import StopError, stop_at

from lda.checkpoint import read_checkpoint
from lda.config import Config, preset
from lda.errors import FolderInUseError, UsageError
from lda.files import LOCK, held, read_json
from lda.runs import (
    BUFFER_BANK,
    CHECKPOINT,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RESULT,
    Result,
    read_metrics,
    read_unit,
)
from lda.unit import run_unit

BANK = f"{BUFFER_BANK}.npz"
FILES = (CONFIG, ENVIRONMENT, METRICS, CHECKPOINT, RESULT, BANK)


def quick(**changes: Any) -> Config:
    """A run of a second: two epochs of three steps."""
    settings: dict[str, Any] = {"epochs": 2, "steps_per_epoch": 3, "warmup_epochs": 0, "milestones": (), "pad": 2}
    settings |= {"image_height": 32, "image_width": 16, "ids_per_batch": 4, "images_per_id": 2, "log_every": 1}
    settings |= {"bank_warmup_updates": 0, "threads": 1, "wandb": "disabled", "evaluate_every": 1}
    return preset("standin", **{"protocol": "protocol3", "target": "cuhk03", **settings, **changes})


@pytest.fixture(scope="module")
def undisturbed(standin_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished unit. Read only."""
    folder = tmp_path_factory.mktemp("undisturbed") / "finished"
    run_unit(quick(), folder, data_root=standin_tiny)
    return folder


@pytest.fixture(scope="module")
def stopped(standin_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a unit that was stopped in its second epoch. Read only."""
    folder = tmp_path_factory.mktemp("undisturbed") / "stopped"
    with pytest.raises(StopError):
        run_unit(quick(), folder, data_root=standin_tiny, on_progress=stop_at(5))
    return folder


def measured(result: Result) -> Result:
    """What a result says of the method, not of the machine."""
    return replace(result, seconds=0, images_per_second=0, trained_in="")


def check_whole(folder: Path, undisturbed: Path) -> None:
    """All files are there and say what those of an undisturbed unit say."""
    unit, expected = read_unit(folder), read_unit(undisturbed)
    assert unit.result is not None
    assert expected.result is not None
    assert measured(unit.result) == measured(expected.result)
    assert (unit.unit, unit.settings) == (expected.unit, expected.settings)
    assert read_json(folder / ENVIRONMENT)["host"]
    ours, theirs = (
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(path / METRICS)]
        for path in (folder, undisturbed)
    )
    assert ours == theirs
    check_same_bank(folder, undisturbed)
    states = [read_checkpoint(path / CHECKPOINT).method for path in (folder, undisturbed)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def check_same_bank(folder: Path, undisturbed: Path) -> None:
    with np.load(folder / BANK) as ours, np.load(undisturbed / BANK) as theirs:
        assert set(ours.files) == set(theirs.files)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)


DAMAGES = ("truncated", "zeroed", "emptied", "removed", "a folder", "a dangling link")


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Tear a file at a random place, or put something else where it was."""
    if not path.exists():
        return
    content = path.read_bytes()
    place = draw.randrange(len(content))
    if how == "truncated":
        path.write_bytes(content[:place])
    elif how == "zeroed":
        end = min(len(content), place + draw.choice([16, 512, 4096, len(content)]))
        path.write_bytes(content[:place] + bytes(end - place) + content[end:])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()
        if how == "a folder":
            (path / "with").mkdir(parents=True)
        elif how == "a dangling link":
            path.symlink_to(path.with_name("nowhere"))


@pytest.fixture
def run_again(
    undisturbed: Path, stopped: Path, standin_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Damage some files of a unit, run it again, and check what came of it. Returns what was said on stderr."""

    def run(before: str, damages: dict[str, str], draw: random.Random) -> str:
        folder = tmp_path / re.sub(r"\W+", "-", f"{before} {damages}")
        shutil.copytree(undisturbed if before == "finished" else stopped, folder)
        for name, how in damages.items():
            damage(folder / name, how, draw)
        intact = before == "finished" and RESULT not in damages
        damaged = (folder / RESULT).read_bytes() if intact else b""
        result = run_unit(quick(), folder, data_root=standin_tiny)
        said = capsys.readouterr().err
        assert all(line.startswith("warning: ") for line in said.splitlines()), said
        expected = Result.read(undisturbed)
        assert measured(result) == measured(expected)
        if not intact:
            check_whole(folder, undisturbed)
            return said
        assert (folder / RESULT).read_bytes() == damaged, "a finished unit is not run twice"
        assert read_json(folder / CONFIG)["unit"] == expected.unit
        if (folder / BANK).exists() and CHECKPOINT not in damages:
            check_same_bank(folder, undisturbed)
        return said

    return run


@pytest.mark.parametrize("before", ["stopped", "finished"])
@pytest.mark.parametrize("name", FILES)
def test_each_file_torn(run_again: Any, before: str, name: str) -> None:
    """One damage each; a file that is not the first of a unit's two is named."""
    draw = random.Random(f"{before} {name}")
    how = draw.choice(["emptied", "a folder"])
    said = run_again(before, {name: how}, draw)
    exists = before == "finished" or name not in (RESULT, BANK)
    silent = before == "finished" and name in (ENVIRONMENT, METRICS, CHECKPOINT)  # nobody reads them then
    rewritten = how == "emptied" and name == ENVIRONMENT  # says where the unit ran last, whatever it said before
    assert (name in said) == (exists and not silent and not rewritten), said


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 200))])
def test_random_damages(run_again: Any, seed: int) -> None:
    """One or two files, each torn at a random place."""
    draw = random.Random(seed)
    before, names = draw.choice(["stopped", "finished"]), draw.sample(FILES, draw.choice([1, 1, 2]))
    run_again(before, {name: draw.choice(DAMAGES) for name in names}, draw)


def test_missing_rows_are_found_out(
    stopped: Path, undisturbed: Path, standin_tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    """A power cut dropped the end of the metrics, at a line: the checkpoint knows how many there were."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    lines = (folder / METRICS).read_bytes().splitlines(keepends=True)
    (folder / METRICS).write_bytes(b"".join(lines[:2]))
    seen: list[int] = []
    run_unit(quick(), folder, data_root=standin_tiny, on_progress=lambda progress: seen.append(progress.step))
    assert seen == list(range(1, 7))
    assert "metrics.jsonl lacks some of its 4 rows before step 3; starting the unit again" in capsys.readouterr().err
    check_whole(folder, undisturbed)


def test_a_zeroed_block_of_weights_is_found_out(stopped: Path, tmp_path: Path) -> None:
    """torch.load does not look at the checksums that torch.save writes."""
    content = bytearray((stopped / CHECKPOINT).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    (tmp_path / CHECKPOINT).write_bytes(content)
    torch.load(tmp_path / CHECKPOINT, weights_only=True)
    with pytest.raises(UsageError, match=r"cannot be read \(wrong checksum of .*it may be truncated"):
        read_checkpoint(tmp_path / CHECKPOINT)


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_damaged(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would begin anew, and overwrite it."""

    def load(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(torch.OutOfMemoryError):
        read_checkpoint(stopped / CHECKPOINT)


def test_a_folder_without_config_is_whose_the_checkpoint_says(
    stopped: Path, standin_tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (folder / CONFIG).write_bytes(b"")
    before = (folder / CHECKPOINT).read_bytes()
    with pytest.raises(UsageError, match="holds another run"):
        run_unit(quick(bank_momentum=0.5), folder, data_root=standin_tiny)
    assert ((folder / CONFIG).read_bytes(), (folder / CHECKPOINT).read_bytes()) == (b"", before)


def test_a_checkpoint_of_another_unit_is_not_trusted(
    stopped: Path, undisturbed: Path, standin_tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    replace(read_checkpoint(stopped / CHECKPOINT), unit="another").save(folder / CHECKPOINT)
    run_unit(quick(), folder, data_root=standin_tiny)
    assert "is of another unit, another; starting the unit again" in capsys.readouterr().err
    check_whole(folder, undisturbed)


def test_a_result_of_another_format_is_refused(undisturbed: Path, standin_tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    (folder / RESULT).write_text('{"format": 3}')
    with pytest.raises(UsageError, match="expected format 2, got 3; a newer version wrote it"):
        run_unit(quick(), folder, data_root=standin_tiny)


# --- stopped during an evaluation ------------------------------------------------------------------------------------


def test_a_stop_during_an_evaluation_takes_effect_and_loses_nothing(standin_tiny: Path, tmp_path: Path) -> None:
    """Stopped at the 8th call of `check`, at the 16th after that, and so on to the result."""
    folder, calls, starts = tmp_path / "run", 0, 0
    config = quick(evaluation_batch=4)  # the last digits of an encoding depend on its batch

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 8 * starts:
            raise StopError

    result = None
    while result is None:
        calls, starts = 0, starts + 1
        assert starts < 20
        try:
            result = run_unit(config, folder, data_root=standin_tiny, check=check)
        except StopError:
            continue
    assert starts > 4
    assert measured(result) == measured(run_unit(config, tmp_path / "undisturbed", data_root=standin_tiny))
    rows = read_metrics(folder / METRICS)
    assert [row["step"] for row in rows if "lr" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/mAP" in row] == [3, 6]


# --- two commands on one folder --------------------------------------------------------------------------------------


def command(folder: Path, data_root: Path, **settings: object) -> list[str]:
    """`python -m lda.train` of the quick unit, with some settings changed."""
    keys = ("epochs", "steps_per_epoch", "warmup_epochs", "pad", "image_height", "image_width", "ids_per_batch")
    keys += ("images_per_id", "log_every", "bank_warmup_updates", "threads", "wandb", "evaluate_every")
    known = quick().to_dict()
    given = {"milestones": [], **{key: known[key] for key in keys}, **settings}
    arguments = ["--target", "cuhk03", "--data-root", str(data_root), "--preset", "standin", "--output", str(folder)]
    options = [f"{key}={value}" for key, value in given.items()]
    return [sys.executable, "-m", "lda.train", *arguments, "--set", *options]


def wait_for_rows(folder: Path, rows: int, process: subprocess.Popen[str]) -> None:
    while not (folder / METRICS).exists() or (folder / METRICS).read_bytes().count(b"\n") < rows:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, cwd=REPOSITORY, start_new_session=True, **pipes) as run:
        try:
            yield run
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def test_a_folder_in_use_is_refused_and_a_finished_unit_is_not(
    undisturbed: Path, standin_tiny: Path, tmp_path: Path
) -> None:
    with held(tmp_path / "run"), pytest.raises(FolderInUseError, match=rf"in use by process {os.getpid()} on "):
        run_unit(quick(), tmp_path / "run", data_root=standin_tiny)
    with held(undisturbed):
        assert run_unit(quick(), undisturbed, data_root=standin_tiny) == Result.read(undisturbed)


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_commands_and_signals(standin_tiny: Path, tmp_path: Path) -> None:
    """The second command exits with 2. SIGTERM ends the first as Ctrl-C does, whose children get both, with a true line
    about how it goes on: before the first checkpoint and after it. Under nohup it outlives its terminal."""
    folder, other = tmp_path / "run", tmp_path / "other"
    long = command(folder, standin_tiny, steps_per_epoch=2000, loader_workers=1)
    with started(long) as first:
        wait_for_rows(folder, 2, first)
        second = subprocess.run(long, cwd=REPOSITORY, capture_output=True, text=True)
        assert second.returncode == 2
        assert f"{folder} is in use by process {first.pid} on " in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert not (folder / CHECKPOINT).exists()
        os.killpg(first.pid, signal.SIGTERM)
        _, said = first.communicate(timeout=60)
    assert (first.returncode, said) == (130, "interrupted; nothing is kept yet: the same command starts anew\n")
    assert not (folder / LOCK).exists()

    with started(["nohup", *command(other, standin_tiny, epochs=500)]) as run:
        while not (other / CHECKPOINT).exists():
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        run.send_signal(signal.SIGHUP)
        wait_for_rows(other, (other / METRICS).read_bytes().count(b"\n") + 5, run)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    step = read_checkpoint(other / CHECKPOINT).step
    assert f"interrupted; the same command goes on from step {step} of 1500 (" in said


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    code = (
        "import signal, time\n"
        "from lda.command import interruptible\n"
        "with interruptible():\n"
        "    try:\n"
        "        print('here', flush=True)\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        print('cleaning', flush=True)\n"
        "        time.sleep(60)\n"
    )
    with started([sys.executable, "-c", code]) as process:
        assert process.stdout is not None
        for said, number in (("here\n", signal.SIGHUP), ("cleaning\n", signal.SIGTERM)):
            assert process.stdout.readline() == said
            process.send_signal(number)
        assert process.wait(10) == -signal.SIGTERM


def test_a_checkpoint_that_cannot_be_written_says_what_the_disk_said(stopped: Path, tmp_path: Path) -> None:
    """torch.save makes a RuntimeError of it that says nothing."""
    saved, before = read_checkpoint(stopped / CHECKPOINT), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"^\[Errno 27\] File too large$"):
            saved.save(tmp_path / CHECKPOINT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
