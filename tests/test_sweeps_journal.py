"""The journal storage: torn anywhere, no finished trial before the tear is lost, and the study goes on."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lda.errors import UsageError
from sweeps.list.journal import JournalError
from sweeps.list.storage import OUTAGE, StorageError, open_storage, opened, patiently


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Of a study with six finished trials."""
    path = tmp_path / "study.log"
    with opened(f"journal:{path}") as storage:
        study = optuna.create_study(storage=storage, study_name="s", direction="maximize")
        for value in range(6):
            tell(study, value)
    return path


def tell(study: optuna.Study, value: float) -> None:
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("é\r", [value])
    study.tell(trial, value)


def values(path: Path, reads_only: bool = False) -> list[float | None]:
    """Of the finished trials."""
    with opened(f"journal:{path}", reads_only=reads_only) as storage:
        return [trial.value for trial in optuna.load_study(storage=storage, study_name="s").trials if trial.values]


def finished_within(text: bytes) -> int:
    """Trials whose end is recorded in whole lines of the text."""
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    return sum(json.loads(line)["op_code"] == 6 for line in lines)


def torn(text: bytes, draw: random.Random) -> tuple[bytes, bytes]:
    """(a torn journal, what of it is untouched)."""
    kept = text[: draw.randrange(text.index(b"\n") + 1, len(text) + 1)]
    garbage = draw.choice([b"", bytes(draw.randrange(1, 9000)), draw.randbytes(50), b"\0\0}\n", b'{"op_code":6\n\n'])
    return kept + garbage, kept


@pytest.mark.parametrize("seed", range(40))
def test_torn_anywhere_it_goes_on(journal: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    text, kept = torn(journal.read_bytes(), random.Random(seed))
    journal.write_bytes(text)
    before = list(range(finished_within(kept)))
    assert values(journal, reads_only=True) == before
    assert journal.read_bytes() == text  # who only looks changes nothing
    found = values(journal)  # a record that lacked no more than the end of its line counts
    assert found in (before, [*before, len(before)])
    said = capsys.readouterr().err
    assert said.count("its last record was torn") == said.count("\n") <= 1
    with opened(f"journal:{journal}") as storage:
        tell(optuna.load_study(storage=storage, study_name="s"), 100)
    assert values(journal) == [*found, 100]
    assert capsys.readouterr().err == ""  # told once
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())  # and others can read it again


def test_torn_while_others_have_it_open(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker was killed in the middle of a line; those that live write on."""
    with opened(f"journal:{journal}") as one, opened(f"journal:{journal}") as two:
        first, second = (optuna.load_study(storage=storage, study_name="s") for storage in (one, two))
        for value in range(6, 10):
            with journal.open("ab") as file:
                file.write(b'{"op_code":6,"worker_id":"de')
            tell(first if value % 2 else second, value)
        assert [trial.value for trial in first.trials] == [trial.value for trial in second.trials] == list(range(10))
    assert capsys.readouterr().err.count("its last record was torn") == 4
    assert (journal.parent / "study.log.torn").read_bytes().count(b"\n") == 4


def test_what_optuna_wrote_into_a_torn_line_counts(journal: Path) -> None:
    """Studies of before: Optuna's backend appends to half a line, and nobody could read the file from then on."""
    with journal.open("ab") as file:
        file.write(bytes(300) + b'{"op_code":6,"worker_id":"de')
    backend = JournalFileBackend(str(journal))
    record = {"op_code": 4, "worker_id": "w", "study_id": 0, "datetime_start": None}
    backend.append_logs([record])
    backend.append_logs([{"op_code": 6, "worker_id": "w", "trial_id": 6, "state": TrialState.COMPLETE, "values": [6.0],
                          "datetime_complete": "2026-01-01T00:00:00+00:00"}])  # fmt: skip
    assert values(journal) == list(range(7))


def test_damage_in_the_middle_is_named_and_refused(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    before = b"".join([*lines[:7], b'{"op_code":6,"wor\n', *lines[8:]])
    journal.write_bytes(before)
    with pytest.raises(JournalError) as error:
        open_storage(f"journal:{journal}", 1, 3)
    assert f"{journal}: line 8 is damaged (18 bytes, no record)" in str(error.value)
    assert journal.read_bytes() == before
    advice = str(error.value)[str(error.value).index("head -n") :]
    subprocess.run(advice, shell=True, check=True, cwd=journal.parent)  # what it advises works
    assert values(journal) == list(range(finished_within(b"".join(lines[:7]))))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "is a folder; expected a file in it"),
        (lambda path: path.write_text("my notes\n"), "is no journal of Optuna's"),
        (lambda path: path.write_text("{}\n{}\n"), "is no journal of Optuna's"),
        (lambda path: path.symlink_to("/nowhere/x"), "No such file or directory"),
    ],
)
def test_a_path_that_is_no_journal(tmp_path: Path, make: object, said: str) -> None:
    path = tmp_path / "x.log"
    make(path)  # type: ignore[operator]
    content = path.read_bytes() if path.is_file() else None
    with pytest.raises(UsageError, match=said):
        open_storage(f"journal:{path}", 1, 3)
    assert content is None or path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]  # no lock beside somebody's notes
    with pytest.raises(StorageError, match=f"there is no folder {tmp_path}/nothing; make it"):
        open_storage(f"journal:{tmp_path}/nothing/x.log", 1, 3)
    with pytest.raises(StorageError, match="there is no file"):
        open_storage(f"journal:{tmp_path}/y.log", 1, 3, reads_only=True)
    assert not (tmp_path / "y.log").exists()


@pytest.mark.parametrize("content", [b"", b'{"op_co', bytes(4096)])
def test_one_that_was_hardly_begun(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.log").write_bytes(content)
    with opened(f"journal:{tmp_path}/x.log") as storage:
        tell(optuna.create_study(storage=storage, study_name="s"), 0)
    assert values(tmp_path / "x.log") == [0]


@pytest.fixture
def size_limit() -> Iterator[None]:
    """No file may grow: what a full disk and a quota do, without being root."""
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_outage_and_tears_nothing(journal: Path, size_limit: None) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = journal.read_bytes()
    with opened(f"journal:{journal}") as storage:
        study = optuna.load_study(storage=storage, study_name="s")
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, unlimited[1]))  # room for part of a record
        with pytest.raises(OUTAGE, match=r"the journal does not answer: .*File too large"):
            patiently(study.ask, 0.3)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert journal.read_bytes() == before
        tell(study, 6)
    assert values(journal) == list(range(7))


def test_one_that_vanished_is_an_outage_and_not_made_anew(journal: Path) -> None:
    with opened(f"journal:{journal}") as storage:
        study = optuna.load_study(storage=storage, study_name="s")
        journal.rename(journal.parent / "away")
        for _ in range(2):
            with pytest.raises(StorageInternalError, match="No such file"):
                study.ask()
        assert not journal.exists()
        (journal.parent / "away").rename(journal)
        tell(study, 6)
        journal.write_bytes(journal.read_bytes()[:500])
        with pytest.raises(JournalError, match="became shorter while it was in use"):
            study.ask()


_HOLD = """
import sys, time
from pathlib import Path
from sweeps.list.journal import Journal
with Journal(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_lock_of_a_killed_process_holds_nobody_up(journal: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(journal)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    assert os.readlink(f"{journal}.lock") == str(journal)  # Optuna's lock outlives its holder
    assert values(journal) == list(range(6))
    assert not os.path.lexists(f"{journal}.lock")


_WRITE = """
import sys, optuna
from sweeps.list.storage import opened
with opened(sys.argv[1]) as storage:
    study = optuna.load_study(storage=storage, study_name="s")
    sys.stdin.readline()
    for value in range(40):
        study.add_trial(optuna.trial.create_trial(value=value))
"""


def test_four_processes_write_at_once(journal: Path) -> None:
    command = [sys.executable, "-c", _WRITE, f"journal:{journal}"]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in range(4)]
    for writer in writers:
        writer.communicate("\n")
    assert [writer.returncode for writer in writers] == [0] * 4
    assert sorted(value or 0 for value in values(journal)) == sorted([*range(6), *(list(range(40)) * 4)])
