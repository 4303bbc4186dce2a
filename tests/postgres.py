"""A PostgreSQL server of one test: its own folder, a free port, a password. Never run as root, which initdb refuses."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest

PASSWORD = "s3cret"


def binaries() -> Path | None:
    """Folder of initdb and pg_ctl: on the PATH, or where Debian's packages put the newest version."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """Started on construction; listens on every address.

    Args:
        password: of its superuser `lab`.
    """

    def __init__(self, password: str = PASSWORD) -> None:
        found = binaries()
        if found is None:
            pytest.skip("no PostgreSQL here: install the package postgresql")
        self._bin, self._password = found, password
        self.port = free_port()
        self.user = getpass.getuser() if os.getuid() else _unprivileged()
        self.folder = Path(tempfile.mkdtemp(prefix="lda-postgres-"))
        (self.folder / "password").write_text(password)
        if os.getuid() == 0:
            shutil.chown(self.folder, self.user)
            shutil.chown(self.folder / "password", self.user)
        where = ["-D", str(self.folder / "data"), "--username=lab", f"--pwfile={self.folder / 'password'}"]
        self._run("initdb", *where, "--auth=scram-sha-256", "--no-sync")
        with (self.folder / "data" / "pg_hba.conf").open("a") as file:
            file.write("host all all 0.0.0.0/0 scram-sha-256\n")
        self.start()

    @property
    def url(self) -> str:
        """URL of the database, with its password."""
        return self._url("lab", "postgres")

    def _url(self, user: str, database: str) -> str:
        return f"postgresql://{user}:{quote(self._password, safe='')}@127.0.0.1:{self.port}/{database}"

    def ordinary(self) -> str:
        """URL of a database of an ordinary user, `study`: limits of connections do not hold for a superuser."""
        escaped = self._password.replace("'", "''")
        self.sql(f"CREATE ROLE study LOGIN PASSWORD '{escaped}'", "CREATE DATABASE study OWNER study")
        return self._url("study", "study")

    def sql(self, *statements: str) -> None:
        """Let the superuser say something."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def cut(self) -> None:
        """Cut every connection but this one's."""
        own = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
        self.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {own}")

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=* -c unix_socket_directories={self.folder} -c fsync=off"
        self._control("start", "-w", "-l", str(self.folder / "log"), "-o", options)

    def stop(self) -> None:
        """Stop at once, connections cut, as a crash of its machine would."""
        self._control("stop", "-w", "-m", "immediate")

    def remove(self) -> None:
        """Stop and delete everything."""
        self.stop()
        shutil.rmtree(self.folder)

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        user = self.user if os.getuid() == 0 else None
        with (self.folder.parent / f"{self.folder.name}.txt").open(
            "w+"
        ) as output:  # a pipe would stay open in the server
            done = subprocess.run(
                [str(self._bin / program), *arguments], stdout=output, stderr=output, user=user, cwd=self.folder
            )
            output.seek(0)
            Path(output.name).unlink()
            assert done.returncode == 0, output.read()


def _unprivileged() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)
