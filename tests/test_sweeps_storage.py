"""The storage factory: URLs, what is refused, and a fresh database that several open at once."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import optuna
import pytest
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.pool import QueuePool

from lda.errors import UsageError
from lda.files import write_json
from sweeps.list.addresses import asked_for, file_of, storage_url
from sweeps.list.storage import StorageError, close_storage, engine_of, open_storage, opened, patiently, turn
from sweeps.list.study import check_same, create_or_load, is_known, open_search, running_study, search_budget
from sweeps.plan.images import Data
from sweeps.plan.spec import to_dict
from sweeps.plan.study_files import load, resolve, study_file
from sweeps.study_folder import StudyFolder


def test_looking_for_a_study_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    assert not is_known("mine", url)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.db").touch()
    assert not is_known("mine", url)
    assert (tmp_path / "a.db").read_bytes() == b""
    with opened(url) as storage:
        optuna.create_study(storage=storage, study_name="mine")
    assert is_known("mine", url)
    assert not is_known("yours", url)


def test_urls(tmp_path: Path) -> None:
    assert storage_url(None, tmp_path) == f"sqlite:///{tmp_path}/optuna.db"
    assert storage_url("journal", tmp_path) == f"journal:{tmp_path}/optuna-journal.log"
    assert storage_url("postgresql://u@h/d", tmp_path) == "postgresql+psycopg://u@h/d"
    assert storage_url("postgres://u@h/d", tmp_path) == "postgresql+psycopg://u@h/d"
    assert storage_url("POSTGRESQL+psycopg2://u@h/d", tmp_path) == "postgresql+psycopg://u@h/d"
    assert storage_url("postgresql:///d", tmp_path) == "postgresql+psycopg:///d"
    assert storage_url("sqlite:////a/b%3Fc.db", tmp_path) == "sqlite:////a/b%3Fc.db"
    assert storage_url("sqlite:///b.db", tmp_path) == f"sqlite:///{Path.cwd()}/b.db"
    assert storage_url("journal:~/b.log", tmp_path) == f"journal:{Path.home()}/b.log"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresq://u@h/d", "did you mean 'postgresql'"),
        ("redis://h", "unknown kind of storage 'redis'"),
        ("mysql://u@h/d", "expected one of: sqlite, postgresql, journal"),
        ("sqlite+aiosqlite:///a.db", "unknown kind of storage"),
        ("postgresql", "the address is missing; expected postgresql://USER@HOST/DATABASE"),
        ("postgresql:", "the address is missing"),
        ("postgresql://", "the address is missing"),
        ("postgres:///", "the address is missing"),
        ("sqlite", "a database in a file; expected sqlite:///PATH"),
        ("sqlite://", "a database in a file"),
        ("sqlite:///", "a database in a file"),
        ("sqlite:///:memory:", "a database in a file"),
        ("sqlite:///a.db?mode=memory", "a database in a file"),
        ("sqlite:///file:a.db?uri=true", "a database in a file"),
        ("sqlite:a.db", "expected sqlite:///PATH"),
        ("sqlite:///what?/a.db", "a [?] in its path is written %3F"),
        ("journal:", "the path is missing"),
    ],
)
def test_what_is_no_address_is_told(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        storage_url(url, tmp_path)
    assert str(error.value).startswith(f"--storage {url}: ")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", " "):
        monkeypatch.setenv("LDA_STORAGE", value)
        assert asked_for(None) is None
    monkeypatch.setenv("LDA_STORAGE", "journal")
    assert asked_for(None) == "journal"
    assert asked_for("journal:b") == "journal:b"
    with pytest.raises(UsageError, match="--storage is empty"):
        asked_for("")


@pytest.mark.parametrize("name", ["what?x=1", "a#b", "100%41", "a b", "{x}", "é:@", "a;b&c"])
@pytest.mark.parametrize("kind", [None, "journal"])
def test_a_folder_of_any_name_holds_its_storage(tmp_path: Path, name: str, kind: str | None) -> None:
    folder = tmp_path / name
    folder.mkdir()
    url = storage_url(kind, folder)
    file = folder / ("optuna.db" if kind is None else "optuna-journal.log")
    assert file_of(url) == file
    for _ in range(2):
        with opened(url) as storage:
            create_or_load(storage, "s", lambda study: None)
            with turn(storage):
                assert set(tmp_path.rglob("*")) <= {folder, file, Path(f"{file}.turn")}
    assert file.stat().st_size > 0
    if kind is None:
        assert file_of(storage_url(url, tmp_path)) == file  # as given by hand


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"there is no folder {tmp_path}/missing; make it, or give another path"):
        open_storage(f"sqlite:///{tmp_path}/missing/optuna.db", 1, 3)
    with pytest.raises(StorageError, match="is a folder; expected a file in it"):
        open_storage(f"sqlite:///{tmp_path}", 1, 3)
    (tmp_path / "notes.txt").write_text("my notes, and more of them\n" * 100)
    with pytest.raises(StorageError, match="file is not a database"):
        open_storage(f"sqlite:///{tmp_path}/notes.txt", 1, 3)
    with pytest.raises(StorageError, match="there is no file"):
        open_storage(f"sqlite:///{tmp_path}/missing.db", 1, 3, reads_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("table", ["places", "studies", "alembic_version"])
def test_a_database_of_another_program_is_left_alone(
    tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.list.storage._CREATION_SECONDS", 0.2)
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as other:
        other.execute(f"CREATE TABLE {table} (id INTEGER)")
    before = (tmp_path / "x.db").read_bytes()
    with pytest.raises(StorageError, match=f"another program's .it holds {table}.; give one of its own"):
        open_storage(f"sqlite:///{tmp_path}/x.db", 1, 3)
    with pytest.raises(StorageError, match="there is no study in this database yet"):
        open_storage(f"sqlite:///{tmp_path}/x.db", 1, 3, reads_only=True)
    assert (tmp_path / "x.db").read_bytes() == before


@pytest.mark.parametrize(
    ("revision", "advice"), [("v2.6.0.a", "optuna storage upgrade"), ("v99.0.0.a", "updating optuna")]
)
def test_a_database_of_another_optuna_is_told(tmp_path: Path, revision: str, advice: str) -> None:
    url = storage_url(None, tmp_path)
    with opened(url):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "optuna.db")) as other:
        other.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        other.commit()
    with pytest.raises(StorageError, match=f"no longer compatible with the table schema .*{advice}") as error:
        open_storage(url, 1, 3)
    assert str(error.value).startswith(f"--storage {url}: ")


def test_no_study_names_the_database_and_what_it_holds(tmp_path: Path) -> None:
    url = storage_url(None, tmp_path)
    with pytest.raises(UsageError, match=f"no study 's' in {tmp_path} yet; start it first.*no {tmp_path}/optuna.db"):
        running_study("s", url, tmp_path)
    with opened(url) as storage:
        create_or_load(storage, "other", lambda study: None)
    with pytest.raises(UsageError, match=f"no study 's' in {url} yet; start it first.*it holds other"):
        running_study("s", url, tmp_path)


def test_other_settings_name_what_helps(tmp_path: Path) -> None:
    """A second --output has a database of its own where that lies in the folder, and the same one elsewhere."""
    spec = resolve(load(study_file("smoke")), study_file("smoke"))
    other = resolve(load(study_file("smoke")), study_file("smoke"), seed=7)
    (tmp_path / "smoke").mkdir()
    for requested, helps in [
        (None, "another --output"),
        ("journal", "another --output"),
        (f"sqlite:///{tmp_path}/lab.db", "a study file of another name, or another database"),
    ]:
        data = Data(tmp_path, {}, "stand-in")
        with opened(storage_url(requested, tmp_path / "smoke")) as storage:
            open_search(storage, "smoke", spec, search_budget(spec), data, tmp_path)
            with pytest.raises(UsageError, match=f"Give the old ones, or {helps}$"):
                open_search(storage, "smoke", other, search_budget(other), data, tmp_path)
    with pytest.raises(UsageError, match="or another --output"):
        check_same("smoke", spec, other)


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
    with opened(storage_url(None, tmp_path)) as storage:
        found = turn(storage)
    assert isinstance(found, FileLock)
    assert Path(found.lock_file) == tmp_path / "optuna.db.turn"
    with opened(storage_url("journal", tmp_path)) as storage:
        assert isinstance(turn(storage), nullcontext)


def test_what_is_closed_has_no_connections(tmp_path: Path) -> None:
    storage = open_storage(storage_url(None, tmp_path), 1, 3)
    create_or_load(storage, "s", lambda study: None)
    engine = engine_of(storage)
    assert isinstance(engine.pool, QueuePool) if engine else False
    assert engine.pool.checkedin() > 0
    close_storage(storage)
    assert engine.pool.checkedin() == engine.pool.checkedout() == 0
    assert optuna.study.get_all_study_names(storage) == ["s"]  # it may be asked again
    close_storage(storage)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[BaseStorage]:
    with opened(storage_url(None, tmp_path)) as storage:
        yield storage


def test_prepared_once_and_completed_after_a_dead_creator(
    storage: BaseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
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
from sweeps.list.storage import opened
from sweeps.list.study import create_or_load
with opened(sys.argv[1]) as storage:
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


def test_a_study_of_an_older_version_is_refused(storage: BaseStorage, tmp_path: Path) -> None:
    spec = resolve(load(study_file("smoke")), study_file("smoke"))
    url, data = storage_url(None, tmp_path), Data(tmp_path, {}, "stand-in")
    study = create_or_load(storage, "s", lambda study: study.set_user_attr("spec", to_dict(spec)))[0]
    with pytest.raises(UsageError, match=r"study 's' in sqlite:.* was made by an older version of this project"):
        running_study("s", url, tmp_path)
    with pytest.raises(UsageError, match="study 's' in its storage was made by an older version"):
        open_search(storage, "s", spec, search_budget(spec), data, tmp_path)
    study.set_user_attr("format", 3)
    with pytest.raises(UsageError, match=r"was made by another version \(format 3, this one's is 2\)"):
        running_study("s", url, tmp_path)
    assert study.get_trials() == []


def test_a_study_that_is_being_set_up_is_no_older_one(storage: BaseStorage, tmp_path: Path) -> None:
    url = storage_url(None, tmp_path)
    create_or_load(storage, "s", lambda study: None)
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
