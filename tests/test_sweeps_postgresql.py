"""Several machines on one PostgreSQL: a study that is joined, a fresh database that four open at once, secrecy."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from postgres import PASSWORD, Server
from studies import Command, no_leftovers, wait_for

from lda.errors import UsageError
from sweeps.list.addresses import storage_url
from sweeps.list.storage import OUTAGE, StorageError, close_storage, open_storage, opened, patiently, reached, reason
from sweeps.list.study import create_or_load

pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg, install lda-reid[postgresql]")


__all__ = ["no_leftovers"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.remove()


_OPEN = """
import sys
from sweeps.list.storage import opened
from sweeps.list.study import create_or_load
sys.stdin.readline()
with opened(sys.argv[1]) as storage:
    create_or_load(storage, "race", lambda study: print("prepared"))
"""


def test_a_fresh_database_opened_by_four_processes_at_once(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _OPEN, storage_url(server.url, tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = [process.communicate("\n")[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(printed) == ["", "", "", "prepared\n"]


def test_a_wrong_password_is_one_line_without_it(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        open_storage(storage_url(server.url.replace(PASSWORD, "gu3ss"), tmp_path), 1, 3)
    assert "password authentication failed" in str(error.value)
    assert "gu3ss" not in str(error.value)


@pytest.fixture(scope="module")
def ordinary(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of a user whom limits hold for, with a study."""
    url = storage_url(server.ordinary(), tmp_path_factory.getbasetemp())
    with opened(url) as storage:
        create_or_load(storage, "s", lambda study: None)
    return url


def test_whatever_opens_a_storage_closes_it(server: Server, ordinary: str) -> None:
    """psycopg warns of a connection that is left to the garbage collector, and a warning is an error here."""
    close_storage(open_storage(ordinary, 1, 3))
    with opened(ordinary, reads_only=True) as storage:
        optuna.load_study(study_name="s", storage=storage)
    server.sql("DROP DATABASE IF EXISTS empty", "CREATE DATABASE empty OWNER study")
    with (
        pytest.raises(StorageError, match="there is no study in this database yet"),
        opened(beside(ordinary, "empty"), reads_only=True),
    ):
        pass
    gc.collect()
    assert connections(server) == 0


def beside(url: str, database: str) -> str:
    """URL of another database of the same user."""
    return f"{url.removesuffix('/study')}/{database}"


def connections(server: Server) -> int:
    """Of the ordinary user."""
    import psycopg

    with psycopg.connect(server.url) as own:
        row = own.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'study'").fetchone()
    assert row is not None
    return int(row[0])


def test_a_database_of_another_program_is_told(server: Server, ordinary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    monkeypatch.setattr("sweeps.list.storage._CREATION_SECONDS", 0.2)
    server.sql("DROP DATABASE IF EXISTS other", "CREATE DATABASE other OWNER study")
    other = beside(ordinary, "other")
    with psycopg.connect(other.replace("+psycopg", ""), autocommit=True) as own:
        own.execute("CREATE TABLE alembic_version (version_num TEXT)")
        with pytest.raises(StorageError, match=r"another program's \(it holds alembic_version\)"):
            open_storage(other, 1, 3)
        own.execute("DROP TABLE alembic_version")
        own.execute("CREATE TABLE bills (id INTEGER)")
    with opened(other) as storage:  # a server's database may hold other tables
        create_or_load(storage, "s", lambda study: None)


def test_a_read_only_database_is_one_line_and_can_be_read(server: Server, ordinary: str) -> None:
    with opened(ordinary) as storage:
        study = optuna.load_study(study_name="s", storage=storage)
        server.sql("ALTER ROLE study SET default_transaction_read_only = on")
        server.cut()
        try:
            with pytest.raises(StorageError, match=r"study:\*\*\*@.*: the database is read-only \(a standby"):
                open_storage(ordinary, 1, 3)
            with opened(ordinary, reads_only=True) as other:
                assert optuna.study.get_all_study_names(other) == ["s"]
            with pytest.raises(OUTAGE):
                patiently(lambda: study.set_user_attr("a", 1), 0.5)
            with pytest.raises(StorageError, match=r"in a read-only transaction$"), reached(ordinary):
                study.set_user_attr("a", 1)
        finally:
            server.sql("ALTER ROLE study RESET default_transaction_read_only")
            server.cut()
        patiently(study.ask, 5)


def test_a_limit_of_connections_is_an_outage(server: Server, ordinary: str) -> None:
    with opened(ordinary) as storage:
        study = optuna.load_study(study_name="s", storage=storage)
        server.sql("ALTER ROLE study CONNECTION LIMIT 0")
        server.cut()
        try:
            with pytest.raises(StorageError, match=r'too many connections for role "study"$'):
                open_storage(ordinary, 1, 3)
            with pytest.raises(OUTAGE) as error:
                patiently(lambda: study.set_user_attr("a", 1), 0.5)
            assert 'too many connections for role "study"' in reason(error.value)
        finally:
            server.sql("ALTER ROLE study CONNECTION LIMIT -1")
        patiently(study.ask, 5)


def test_a_user_who_may_make_no_tables_is_told_at_once(server: Server, ordinary: str) -> None:
    server.sql("DROP DATABASE IF EXISTS hers", "CREATE DATABASE hers")
    with pytest.raises(StorageError, match="permission denied for schema public"):
        open_storage(beside(ordinary, "hers"), 1, 3)


@pytest.mark.slow
def test_a_second_machine_joins_and_the_first_dies(server: Server, tmp_path: Path, standin_tiny: Path) -> None:
    """Each machine has a folder of its own, as without a shared disk; the URL comes by environment on one of them."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = Command(
        tmp_path / "a",
        standin_tiny,
        search={"trials": 6, "sampler": "gp"},
        base={"steps_per_epoch": 60, "log_every": 20},
    )
    b = Command(tmp_path / "b", standin_tiny, environment={"LDA_STORAGE": server.url})
    first = a.start("--storage", server.url)
    wait_for(lambda: (a.study / "trial-0000/market1501-s0/config.json").exists(), process=first)
    second = b.start("--join")
    wait_for(lambda: bool(list(b.study.glob("trial-*/*/config.json"))), process=second)
    a.kill_everything(first)
    assert second.wait(180) == 0, b.output
    assert "6 of 6 trials (0 pruned, 0 failed" in b.output

    assert len(b.results()) == 12
    assert a.results()
    for unit in a.results():  # run once, there, and copied through the database
        assert (b.study / unit / "result.json").read_bytes() == (a.study / unit / "result.json").read_bytes()
    for command in (a, b):
        for path in command.folder.rglob("*"):
            if path.is_file() and path.suffix not in (".npz", ".pt", ".png", ".pdf"):
                assert PASSWORD.encode() not in path.read_bytes(), path
