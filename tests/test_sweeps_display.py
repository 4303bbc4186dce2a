"""What a study shows: computed from storage and files, drawn for a terminal and for a log."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from lda.files import write_json
from sweeps.list.attempts import UNIT, configurations
from sweeps.list.ledger import Budget, Ledger
from sweeps.list.storage import open_storage, storage_url
from sweeps.list.study import create_or_load, enqueue_first_points
from sweeps.plan.space import distributions
from sweeps.plan.spec import StudySpec
from sweeps.plan.study_files import load, resolve, study_file
from sweeps.study_folder import Event, StudyFolder
from sweeps.views.display import Display, duration, live_view, print_status, standing, status_line
from sweeps.views.snapshot import Snapshot, snapshot


@pytest.fixture
def spec() -> StudySpec:
    return resolve(load(study_file("smoke")), study_file("smoke"), trials=4, confirm_seeds=1)


def look(spec: StudySpec, folder: Path) -> Snapshot:
    """A study of four trials: the defaults complete, one better, one given up, one running its second unit."""
    storage = open_storage(storage_url(None, folder), 20, 60)
    budget = Budget(trials=4, retries=0)
    ledger = Ledger(storage, create_or_load(storage, "s", lambda study: None)[0], budget)
    enqueue_first_points(spec, ledger)
    space = distributions(spec.search.space, spec.method)
    for score in (0.5, 0.625, None):
        trial = ledger.ask(space, "w-done")
        assert trial is not None
        if score is None:
            ledger.release(trial.number, "error", "ValueError: bad luck")
            continue
        for target in spec.targets:
            trial.set_user_attr(UNIT + target, {"seconds": 30.0, "score": score})
        ledger.study.tell(trial, score)
    trial = ledger.ask(space, "w-busy")
    assert trial is not None
    trial.set_user_attr(UNIT + spec.targets[0], {"seconds": 30.0, "score": 0.4})
    return snapshot("s", spec, StudyFolder(folder), budget, ledger.configurations(), [])


def test_counts_and_expectations(spec: StudySpec, tmp_path: Path) -> None:
    now = look(spec, tmp_path)
    assert (now.complete, now.failed, now.running, now.budget) == (2, 1, 1, 4)
    assert now.device_seconds == 7 * 30
    assert now.remaining == 30.0 * (2 + 3 * 3)  # two units of the running trial, three runs to confirm; one worker
    assert now.default == 0.5
    assert now.best is not None
    assert now.best[:2] == ("trial-0001", 0.625)
    assert now.failures == ("trial-0002: ValueError: bad luck",)
    assert status_line(now).startswith("3 of 4 trials (0 pruned, 1 failed, 0 retried), 1 running, confirmed 0 of 3, ")
    assert "about 6 min to go, 0.06 device-hours" in status_line(now)
    assert standing(now).endswith("defaults 50.0% (+12.5%)")


def test_a_worker_of_another_machine_is_known_from_the_storage_alone(spec: StudySpec, tmp_path: Path) -> None:
    (row,) = look(spec, tmp_path).workers
    assert (row.worker, row.trial, row.target, row.age) == ("w-busy", "trial-0003", spec.targets[1], None)


def test_the_view_of_a_terminal(spec: StudySpec, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    status = {"worker": "w-busy", "device": "cpu", "state": "running", "trial": "trial-0003", "target": "msmt17"}
    status |= {"seed": 0, "epoch": 3, "epochs": 10, "score": 0.375, "images_per_second": 123.4}
    write_json(folder.workers / "w-busy.json", status)
    os.utime(folder.workers / "w-busy.json", (time.time() - 90, time.time() - 90))
    folder.event("complete", "nothing has failed or died here")
    folder.event("failed", "something went wrong")
    console = Console(record=True, width=140, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(live_view(look(spec, tmp_path), grace_seconds=60))
    shown = console.export_text(styles=True)
    assert re.search(r"\x1b\[1;31m\s*9\d s", shown)  # red: silent for longer than the grace period
    fine, wrong = [line for line in shown.splitlines() if "nothing has failed" in line or "went wrong" in line]
    assert "\x1b[2m" in fine  # by what an event is, whatever words it has
    assert "\x1b[31m" in wrong
    plain = " ".join(word for word in Console(width=140).render_str(shown).plain.split())
    for text in ("trial-0003", "MSMT17", "3/10", "37.5%", "123", "went wrong", "given up: trial-0002"):
        assert text in plain


def test_events_are_read_as_they_were_written_and_a_half_written_one_later(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert folder.events() == ([], 0)
    folder.event("started", "before")
    _, start = folder.events()
    folder.event("retry", "one", "w")
    two = Event(datetime(2026, 1, 1, tzinfo=UTC), "pruned", "two")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(two.line()[:-5])
    (one,), middle = folder.events(start)
    assert (one.kind, one.text, one.worker) == ("retry", "one", "w")
    assert folder.events(middle) == ([], middle)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(two.line()[-5:])
    assert folder.events(middle)[0] == [two]
    assert folder.events(folder.events()[1])[0] == []


def test_a_pipe_gets_plain_lines(spec: StudySpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = StudyFolder(tmp_path)
    with Display(folder, 60, lambda: look(spec, tmp_path)) as display:
        folder.event("started", "one")
        display.refresh()
        folder.event("started", "two")
    printed = capsys.readouterr().out
    assert [line.split("  ")[1] for line in printed.splitlines()] == ["one", "two"]
    assert "\x1b" not in printed


_SHOWS = """
import sys
from pathlib import Path
from sweeps.views.display import Display
from sweeps.views.snapshot import snapshot
from sweeps.study_folder import StudyFolder
from sweeps.list.ledger import Budget
from sweeps.plan.study_files import load, resolve, study_file
spec, folder = resolve(load(study_file("smoke")), study_file("smoke")), StudyFolder(Path(sys.argv[1]))
with Display(folder, 60, lambda: snapshot("smoke", spec, folder, Budget(4, 2), [], [])) as display:
    folder.event("started", "one")
    display.refresh()
    folder.event("started", "two")
"""


def test_a_terminal_is_redrawn_in_place(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _SHOWS, str(tmp_path)], stdout=end, env={**os.environ, "TERM": "xterm"}
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # what the end of a terminal looks like
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    assert process.wait() == 0
    assert shown.count(b"0 of 4 trials") >= 2
    assert b"\x1b[1A\x1b[2K" in shown  # up a line and clear it
    assert b"two" in shown


def test_an_empty_study(spec: StudySpec, tmp_path: Path) -> None:
    now = snapshot("s", spec, StudyFolder(tmp_path), Budget(4, 2), [], [])
    assert now.remaining is None
    assert standing(now) == "no score of the defaults yet"
    assert status_line(now).startswith("0 of 4 trials")


def test_pruned_trials_are_never_the_best(spec: StudySpec, tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    for score, state in ((0.9, TrialState.PRUNED), (0.6, TrialState.COMPLETE)):
        trial = study.ask(distributions(spec.search.space, spec.method))
        trial.report(score, 1)
        study.tell(trial, score if state == TrialState.COMPLETE else None, state=state)
    now = snapshot("s", spec, StudyFolder(tmp_path), Budget(2, 2), configurations(study.get_trials()), [])
    assert (now.complete, now.pruned) == (1, 1)
    assert now.best is not None
    assert now.best[0] == "trial-0001"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (120, "2 min"), (7200, "2.0 h"), (4e5, "4.6 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_status_in_a_pipe_keeps_names_whole(
    spec: StudySpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = look(spec, tmp_path)
    print_status(now, 60)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("w-busy")]
    assert "trial-0003" in row
    assert "Market-1501" in row or "MSMT17" in row or "CUHK03" in row
    assert "…" not in row
