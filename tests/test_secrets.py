"""A password is nowhere but where it was given: not in files, on the screen, in lists of processes or W&B records."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from postgres import Server
from studies import REPOSITORY, Command, no_leftovers

from lda.errors import UsageError
from sweeps.list.addresses import cleaned, has_password, masked, storage_url, without_secrets
from sweeps.list.storage import open_storage
from sweeps.run import split_storage

__all__ = ["no_leftovers"]

SECRET = "s3#c?r/e[t]@%41 {x}'y"
FORMS = {SECRET, quote(SECRET, safe=""), quote(SECRET, safe=" +"), quote_plus(SECRET), json.dumps(SECRET)[1:-1]}
FORMS |= {form.replace("'", "'\"'\"'") for form in FORMS}  # as shlex writes it
AS_TYPED = SECRET.replace("%", "%25").replace("@", "%40")  # the only two that must be written so


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="PostgreSQL needs psycopg, install lda-reid[postgresql]")
    server = Server(SECRET)
    yield server
    server.remove()


def url_of(server: Server) -> str:
    return f"postgresql://lab:{AS_TYPED}@127.0.0.1:{server.port}/postgres"


def leaks(text: bytes) -> bool:
    return any(form.encode() in text for form in (*FORMS, AS_TYPED))


def leaking_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and leaks(path.read_bytes())]


class ListOfProcesses:
    """Looks 20 times a second at every command line; `shown` are those with the secret.

    Args:
        typed: the command that was started with it in its arguments: nobody can hide those before it runs.
    """

    def __init__(self) -> None:
        self.typed = 0
        self.looks = 0
        self.shown: set[str] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> ListOfProcesses:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        hidden = False
        while not self._done.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    text = path.read_bytes()
                    if int(path.parent.name) == self.typed and not hidden:
                        hidden = b"run.py" in text and not leaks(text)
                    elif leaks(text):
                        self.shown.add(text.decode())
            self.looks += hidden


def study(server: Server, folder: Path, data_root: Path, how: str, wandb: str) -> Command:
    """Run a small study to its end, however its URL and password are given."""
    given: dict[str, tuple[list[str], dict[str, str]]] = {
        "option": (["--storage", url_of(server)], {}),
        "equals": ([f"--storage={url_of(server)}"], {}),
        "variable": ([], {"LDA_STORAGE": url_of(server)}),
        "PGPASSWORD": (["--storage", f"postgresql://lab@127.0.0.1:{server.port}/postgres"], {"PGPASSWORD": SECRET}),
        "query": ([f"--storage=postgresql://127.0.0.1:{server.port}/postgres?user=lab&password={quote(SECRET)}"], {}),
    }
    options, environment = given[how]
    command = Command(
        folder,
        data_root,
        spec={"targets": ["market1501"]},
        search={"trials": 1},
        base={"wandb": wandb},
        environment=environment,
    )
    (folder / "mine.yaml").rename(folder / f"{how}.yaml")  # one study each in the one database
    with ListOfProcesses() as processes:
        process = command.start(*options, "--study", str(folder / f"{how}.yaml"))
        processes.typed = process.pid
        assert process.wait(240) == 0, command.output
    assert processes.looks > 5
    assert processes.shown == set()
    return command


def check(command: Command, name: str) -> None:
    made = command.folder / "runs" / name
    report = [sys.executable, "-m", "analysis.report", str(made), "--output", str(command.folder / "report")]
    subprocess.run(report, check=True, capture_output=True)
    assert (made / "trial-0000/market1501-s0/result.json").exists()
    assert list(command.folder.rglob("*.html"))
    assert leaking_files(command.folder) == []
    for log in command.folder.rglob("*.wandb"):
        inspect = [Path(sys.executable).parent / "wandb", "leet", "inspect", str(log), "--json"]
        said = subprocess.run(inspect, check=True, capture_output=True).stdout
        assert b'"type":"exit"' in said
        assert not leaks(said)


@pytest.mark.slow
def test_a_study_tells_its_password_to_nobody(server: Server, tmp_path: Path, standin_tiny: Path) -> None:
    command = study(server, tmp_path, standin_tiny, "option", "disabled")
    told = json.loads((tmp_path / "runs/option/study.json").read_text())
    assert told["storage"] == f"postgresql+psycopg://lab:***@127.0.0.1:{server.port}/postgres"
    assert told["command"].startswith(f"LDA_STORAGE='postgresql://lab:***@127.0.0.1:{server.port}/postgres' python ")
    check(command, "option")
    (tmp_path / "a.txt").write_text(told["command"].replace("***", AS_TYPED))  # and this test can fail
    assert leaking_files(tmp_path) == [tmp_path / "a.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["equals", "variable", "PGPASSWORD", "query"])
def test_nor_however_it_is_given_and_logged(how: str, server: Server, tmp_path: Path, standin_tiny: Path) -> None:
    command = study(server, tmp_path, standin_tiny, how, "offline")
    assert list(tmp_path.rglob("*.wandb"))
    check(command, how)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda url: url.replace("lab:", "lob:"),
        lambda url: url.replace("lab:", "lab:no-"),
        lambda url: url.replace("/postgres", "/nothing"),
        lambda url: url + "?PASSWORD=" + quote(SECRET),
        lambda url: url + "?sslpassword=" + quote(SECRET) + "&sslmode=wrong",
        lambda url: url.replace("%40", "@"),  # what follows it is taken for the host
        lambda url: url.replace("lab:", "").replace("@127", ":127"),
        lambda url: url.replace("postgresql", "mysql"),
        lambda url: url.replace("postgresql://", ""),
        lambda url: url.replace("//", "/"),
    ],
)
def test_a_mistake_in_the_url_is_one_line_without_it(server: Server, tmp_path: Path, wrong: object) -> None:
    url = wrong(url_of(server))  # type: ignore[operator]
    assert has_password(url)
    assert not leaks(masked(url).encode())
    with pytest.raises(UsageError) as error:
        open_storage(storage_url(url, tmp_path), 1, 3)
    assert len(str(error.value).splitlines()) == 1
    for part in ("s3#c", "s3%23c", "r/e[t", "41 {x}", "%7Bx%7D"):
        assert part not in str(error.value)


def test_a_mistake_on_the_command_line_does_not_repeat_it(tmp_path: Path) -> None:
    for program in (["sweeps/run.py"], ["-m", "sweeps.slurm", "--"]):
        command = [sys.executable, *program, "--study", "smoke", "--storrage", f"postgresql://u:{AS_TYPED}@h/d"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 2
        assert "did you mean '--storage'?" in done.stderr
        assert not leaks((done.stdout + done.stderr).encode())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:s3cret@host:5432/lab", "postgresql://u:***@host:5432/lab"),
        ("postgresql://u:s#c?r/e[t]@host/lab", "postgresql://u:***@host/lab"),
        ("postgresql://u:s%40c@[::1]:5432/lab", "postgresql://u:***@[::1]:5432/lab"),
        ("postgresql://host/lab?PASSWORD=s3c&user=u", "postgresql://host/lab?PASSWORD=***&user=u"),
        ("postgresql://host/lab?SslPassword=s%26c&x=1", "postgresql://host/lab?SslPassword=***&x=1"),
        ("postgresql://host/lab?password=a&password=b", "postgresql://host/lab?password=***"),
        ("postgresql://host/lab?passfile=/home/u/.pgpass", "postgresql://host/lab?passfile=/home/u/.pgpass"),
        ("postgresql://u@host/lab", "postgresql://u@host/lab"),
        ("mysql://u:s3cret@host/lab", "mysql://u:***@host/lab"),
        ("postgresql://u:s3:c@ret@host/lab", "postgresql://***"),  # SQLAlchemy's host would be ret@host
        ("postgresql://u/x:s3cret@host/lab", "postgresql://***"),
        ("postgresql://u:s3cret", "postgresql://***"),
        ("u:s3cret@host/lab", "u:***"),
        ("sqlite:///a/b@c.db", "sqlite:///a/b@c.db"),
        ("journal:/a/b@c?d=e", "journal:/a/b@c?d=e"),
        ("postgresq", "postgresq"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert masked(url) == shown
    assert has_password(url) == (shown != url)
    assert masked(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("LDA_STORAGE=postgresql://u:s c@h/d python x", "LDA_STORAGE=postgresql://u:***@h/d python x"),
        ("x --storage 'postgresql://u:s#/?c@h/d' --y", "x --storage 'postgresql://u:***@h/d' --y"),
        (
            "x --storage 'postgresql://h/d?SSLPASSWORD=s3c&a=1' --y",
            "x --storage 'postgresql://h/d?SSLPASSWORD=***&a=1' --y",
        ),
        ("x --storage 'postgresql://h/d?password=s3c' --y", "x --storage 'postgresql://h/d?password=***' --y"),
        ("u is at postgresql://u:s@c@h:1/d, and", "u is at postgresql://u:***@h:1/d, and"),
        ("bad host=h password='s c' dbname=d", "bad host=h password=*** dbname=d"),
        (
            "python sweeps/run.py --study protocol3 --set gem_p=2",
            "python sweeps/run.py --study protocol3 --set gem_p=2",
        ),
        ('FATAL: password authentication failed for user "u"', 'FATAL: password authentication failed for user "u"'),
        ("passfile=/home/u/.pgpass http://h:80/x", "passfile=/home/u/.pgpass http://h:80/x"),
    ],
)
def test_what_is_shown_of_a_text(text: str, shown: str) -> None:
    assert cleaned(text) == shown
    assert cleaned(shown) == shown


def test_what_is_shown_of_what_a_driver_says() -> None:
    url = "postgresql://u:s%23cr@h/d?sslpassword=a"
    assert without_secrets("invalid: 's#cr', s%23cr, a; at last", url) == "invalid: '***', ***, ***; at last"


def test_a_command_line_without_its_storage() -> None:
    given = ["--study", "s", "--storage", "a", "--set", "x=1", "--storage=b", "--join"]
    assert split_storage(given) == (["--study", "s", "--set", "x=1", "--join"], ["a", "b"])
