"""The storage factory: URLs, masked passwords, and a fresh database that several open at once."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import optuna
import pytest
from filelock import FileLock
from optuna.exceptions import StorageInternalError

from lda.errors import UsageError
from lda.files import write_json
from sweeps.list.storage import has_password, masked, open_storage, patiently, storage_url, turn
from sweeps.list.study import create_or_load, open_search, running_study, search_budget
from sweeps.plan.images import Data
from sweeps.plan.spec import to_dict
from sweeps.plan.study_files import load, resolve, study_file
from sweeps.study_folder import StudyFolder


def test_urls(tmp_path: Path) -> None:
    assert storage_url(None, tmp_path) == f"sqlite:///{tmp_path}/optuna.db"
    assert storage_url("journal", tmp_path) == f"journal:{tmp_path}/optuna-journal.log"
    assert storage_url("postgresql://u@h/d", tmp_path) == "postgresql+psycopg://u@h/d"
    assert storage_url("postgres://u@h/d", tmp_path) == "postgresql+psycopg://u@h/d"
    with pytest.raises(UsageError, match="did you mean 'postgresql'"):
        storage_url("postgresq://u:secret@h/d", tmp_path)
    with pytest.raises(UsageError, match="unknown kind of storage 'redis'"):
        storage_url("redis://h", tmp_path)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:s3cret@host:5432/lab", "postgresql://u:***@host:5432/lab"),
        ("postgresql://u:s3:c@ret@host/lab", "postgresql://u:***@host/lab"),
        ("postgresql://host/lab?user=u&password=s3cret&x=1", "postgresql://host/lab?user=u&password=***&x=1"),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
        ("postgresql://u@host/lab", "postgresql://u@host/lab"),
    ],
)
def test_passwords_are_masked(url: str, expected: str) -> None:
    assert masked(url) == expected
    assert has_password(url) == (url != expected)


def test_a_message_about_a_bad_url_hides_the_password(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        storage_url("mysql://u:s3cret@h/d", tmp_path)
    assert "s3cret" not in str(error.value)


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unable to open database file"):
        open_storage(f"sqlite:///{tmp_path}/missing/optuna.db", 1, 3)


def test_patience_ends() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise StorageInternalError("away")

    with pytest.raises(StorageInternalError):
        patiently(fails, 0.5)
    assert len(calls) > 1


def test_what_is_no_outage_is_raised_at_once() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        patiently(fails, 60)
    assert calls == [1]


def test_only_sqlite_needs_turns(tmp_path: Path) -> None:
    """The database behind an Optuna storage is found by private names (`_backend.engine`): other ones, and this fails.

    Two processes would then start the same trial now and then.
    """
    found = turn(open_storage(storage_url(None, tmp_path), 1, 3))
    assert isinstance(found, FileLock)
    assert Path(found.lock_file) == tmp_path / "optuna.db.turn"
    assert isinstance(turn(open_storage(storage_url("journal", tmp_path), 1, 3)), nullcontext)


def test_prepared_once_and_completed_after_a_dead_creator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(storage_url(None, tmp_path), 1, 3)
    prepared: list[str] = []
    for _ in range(2):
        create_or_load(storage, "s", lambda study: prepared.append(study.study_name))
    assert prepared == ["s"]
    assert optuna.study.get_all_study_names(storage) == ["s"]

    class KilledError(Exception):
        pass

    def dies(study: object) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        create_or_load(storage, "t", dies)
    monkeypatch.setattr("sweeps.list.study._CREATION_SECONDS", 0.3)
    create_or_load(storage, "t", lambda study: prepared.append(study.study_name))
    assert prepared == ["s", "t"]


_OPEN = """
import sys
from sweeps.list.storage import open_storage
from sweeps.list.study import create_or_load
storage = open_storage(sys.argv[1], 1, 3)
sys.stdin.readline()
create_or_load(storage, "s", lambda study: print("prepared"))
"""


def test_a_fresh_database_opened_by_four_processes_at_once(tmp_path: Path) -> None:
    url = storage_url(None, tmp_path)
    processes = [
        subprocess.Popen([sys.executable, "-c", _OPEN, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    printed = [process.communicate("\n")[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(printed) == ["", "", "", "prepared\n"]


def test_a_study_of_an_older_version_is_refused(tmp_path: Path) -> None:
    spec = resolve(load(study_file("smoke")), study_file("smoke"))
    url, data = storage_url(None, tmp_path), Data(tmp_path, {}, "stand-in")
    study = create_or_load(open_storage(url, 1, 3), "s", lambda study: study.set_user_attr("spec", to_dict(spec)))[0]
    with pytest.raises(UsageError, match=r"study 's' in sqlite:.* was made by an older version of this project"):
        running_study("s", url, tmp_path)
    with pytest.raises(UsageError, match="study 's' in its storage was made by an older version"):
        open_search(open_storage(url, 1, 3), "s", spec, search_budget(spec), data, tmp_path)
    study.set_user_attr("format", 3)
    with pytest.raises(UsageError, match=r"was made by another version \(format 3, this one's is 2\)"):
        running_study("s", url, tmp_path)
    assert study.get_trials() == []


def test_a_study_that_is_being_set_up_is_no_older_one(tmp_path: Path) -> None:
    url = storage_url(None, tmp_path)
    create_or_load(open_storage(url, 1, 3), "s", lambda study: None)
    with pytest.raises(UsageError, match="study 's' is still being set up, try again in a moment"):
        running_study("s", url, tmp_path)


def test_a_folder_of_an_older_version_is_refused(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "s")
    assert folder.read_study() is None
    folder.write_study({"study": "s"})
    assert folder.read_study() == {"format": 2, "study": "s"}
    write_json(tmp_path / "s" / "study.json", {"study": "s", "spec": {}})
    with pytest.raises(UsageError) as error:
        folder.read_study()
    assert str(error.value).startswith(f"{tmp_path}/s/study.json was made by an older version of this project")
