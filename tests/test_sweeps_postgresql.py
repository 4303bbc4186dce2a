"""Several machines on one PostgreSQL: a study that is joined, a fresh database that four open at once, secrecy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import PASSWORD, Server
from studies import Command, no_leftovers, wait_for

from lda.errors import UsageError
from sweeps.list.storage import open_storage, storage_url

pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg, install lda-reid[postgresql]")


__all__ = ["no_leftovers"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.remove()


_OPEN = """
import sys
from sweeps.list.storage import open_storage
from sweeps.list.study import create_or_load
storage = None
sys.stdin.readline()
storage = open_storage(sys.argv[1], 1, 3)
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

    ran = [*a.results(), *b.results()]
    assert len(ran) == len(set(ran)) == 12  # every unit once, on one machine or the other
    for command in (a, b):
        for path in command.folder.rglob("*"):
            if path.is_file() and path.suffix not in (".npz", ".pt", ".png", ".pdf"):
                assert PASSWORD.encode() not in path.read_bytes(), path
