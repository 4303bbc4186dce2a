"""Where the trials of a study are kept: one factory for sqlite (default), PostgreSQL and a journal file.

sqlite:      runs/<study>/optuna.db; one machine, any number of workers.
PostgreSQL:  `--storage postgresql://user@host/database` or LDA_STORAGE; several machines. Passwords are best left to
             PGPASSWORD or ~/.pgpass; one inside the URL is masked wherever the URL is written.
journal:     `--storage journal` or `journal:PATH`; machines that share a disk but no database. It has no heartbeats: a
             dead worker is found by its lock in the study's folder, so that folder must lie on the shared disk too.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock

from lda.errors import UsageError, unknown

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import Engine

T = TypeVar("T")

VARIABLE = "LDA_STORAGE"
_COLLISIONS = 9
_JOURNAL = "journal:"
_SCHEMES = ("sqlite", "postgresql", "journal")


def storage_url(requested: str | None, folder: Path) -> str:
    """The URL of a study's storage. Raises UsageError for a kind that is not supported."""
    if requested is None:
        return f"sqlite:///{folder.resolve() / 'optuna.db'}"
    if requested == "journal":
        return f"{_JOURNAL}{folder.resolve() / 'optuna-journal.log'}"
    scheme = requested.split(":")[0].split("+")[0]
    if scheme == "postgres":  # the common alias, which SQLAlchemy does not take
        requested, scheme = requested.replace("postgres", "postgresql", 1), "postgresql"
    if ":" not in requested or scheme not in _SCHEMES:
        raise UsageError(f"--storage {masked(requested)}: {unknown('kind of storage', scheme, _SCHEMES)}")
    if scheme == "postgresql":
        return "postgresql+psycopg:" + requested.split(":", 1)[1]
    return requested


def has_password(url: str) -> bool:
    """Whether the URL itself holds a password."""
    return urlsplit(url).password is not None or "password=" in urlsplit(url).query


def masked(url: str) -> str:
    """The URL without its password: what may be printed and written."""
    if not has_password(url):
        return url
    parts = urlsplit(url)
    user, host = parts.netloc.rpartition("@")[0].split(":")[0], parts.netloc.rpartition("@")[2]
    query = "&".join("password=***" if part.startswith("password=") else part for part in parts.query.split("&"))
    netloc = f"{user}:***@{host}" if parts.password is not None else parts.netloc
    return urlunsplit(parts._replace(netloc=netloc, query=query))


class StorageError(UsageError):
    """The storage cannot be reached: a wrong URL when a study begins, an outage later."""


def open_storage(url: str, heartbeat_seconds: int, grace_seconds: int) -> BaseStorage:
    """Connect, creating the tables where there are none. Raises StorageError when that is not possible."""
    import optuna
    from sqlalchemy.exc import DBAPIError

    # Heartbeats outside Study.optimize are ours to keep (see worker.py), and experimental in name only.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url.startswith(_JOURNAL):
        from optuna.storages.journal import JournalFileBackend

        backend = JournalFileBackend(url.removeprefix(_JOURNAL))
        return optuna.storages.JournalStorage(backend)
    if url.startswith("sqlite"):
        arguments: dict[str, Any] = {"connect_args": {"timeout": 60}}
    else:
        # One connection for the work, one for the heartbeat. A cut link must not hold either for TCP's quarter hour.
        limits = {"connect_timeout": 10, "tcp_user_timeout": 1000 * max(1, grace_seconds // 2)}
        arguments = {"pool_pre_ping": True, "pool_size": 2, "connect_args": limits}
    try:
        rdb = created_by_one(
            lambda: optuna.storages.RDBStorage(
                url, engine_kwargs=arguments, heartbeat_interval=heartbeat_seconds, grace_period=grace_seconds
            )
        )
    except ImportError:
        raise StorageError("--storage: PostgreSQL needs psycopg, install lda-reid[postgresql]") from None
    except DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0]
        raise StorageError(f"--storage {masked(url)}: {reason}") from None
    return optuna.storages.get_storage(rdb)


def turn(storage: BaseStorage) -> AbstractContextManager[object]:
    """Held while an attempt is taken off the list, by one process at a time where the database cannot see to it.

    Optuna locks the row of a waiting trial before it starts it; SQLite knows no row locks, so two processes would now
    and then start the same one.
    """
    engine = engine_of(storage)
    if engine is None or engine.url.get_backend_name() != "sqlite" or not engine.url.database:
        return nullcontext()
    return FileLock(f"{engine.url.database}.turn", timeout=600)


def engine_of(storage: BaseStorage) -> Engine | None:
    """The database behind a storage, None for a journal. Optuna's names for it are private; a test watches them."""
    engine: Engine | None = getattr(getattr(storage, "_backend", storage), "engine", None)
    return engine


def created_by_one(open_tables: Callable[[], T]) -> T:
    """Open, and again when another process is creating the same tables at this moment: all but one collide."""
    from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError

    for _ in range(_COLLISIONS):
        try:
            return open_tables()
        except DBAPIError as error:
            if not isinstance(error, (IntegrityError, ProgrammingError)) and "already exists" not in str(error):
                raise
            time.sleep(random.random())
    return open_tables()


def patiently(action: Callable[[], T], seconds: float) -> T:
    """Do it, and again with growing pauses while the database is away, for so many seconds at most."""
    import optuna
    from sqlalchemy.exc import DBAPIError

    end, pause = time.monotonic() + seconds, 0.1
    while True:
        try:
            return action()
        except (optuna.exceptions.StorageInternalError, DBAPIError):
            if time.monotonic() + pause > end:
                raise
            time.sleep(pause * (0.5 + random.random()))
            pause = min(2 * pause, 5.0)
