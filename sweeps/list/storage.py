"""Where the trials of a study are kept: opening and closing a storage, and going on while it is away.

One factory for SQLite (default), PostgreSQL and a journal file; `addresses` says what names them. A journal has no
heartbeats: a dead worker is found by its lock in the study's folder, so that folder must lie on the shared disk too.
Whoever opens a storage closes it, by `close_storage` or by leaving `opened`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import Pool

from lda.errors import UsageError
from sweeps.list.addresses import VARIABLE, cleaned, file_of, has_password, masked, storage_url, without_secrets
from sweeps.list.journal import Journal

__all__ = ["VARIABLE", "has_password", "masked", "storage_url"]  # of addresses, for whoever opens one

T = TypeVar("T")

_COLLISIONS = 9
_CREATION_SECONDS = 3.0  # a dozen tables; SQLite shows them one by one
_TABLES = {"studies", "study_directions", "trials", "alembic_version"}  # some of Optuna's; version_info is there last
_DENIED = "42501"  # SQLSTATE: this user may not create tables

OUTAGE: tuple[type[Exception], ...] = (StorageInternalError, DBAPIError, PoolTimeoutError, PendingRollbackError)
"""What Optuna, SQLAlchemy and our journal raise while a storage is away, full, read-only or out of connections."""

_UNREACHED: tuple[type[Exception], ...] = (*OUTAGE, SQLAlchemyError, OSError)


class StorageError(UsageError):
    """The storage cannot be reached or used: a wrong URL when a study begins, an outage later."""


class EmptyStorageError(StorageError):
    """A database in which no study was ever begun."""


# --- opening ---------------------------------------------------------------------------------------------------------


def open_storage(url: str, heartbeat_seconds: int, grace_seconds: int, *, reads_only: bool = False) -> BaseStorage:
    """Connect, creating the tables where there are none. To be closed, see `close_storage`.

    Args:
        url: from `storage_url`.
        reads_only: nothing will be written: a standby is good enough.

    Raises StorageError where the storage cannot be reached or is no good: one line, no secrets in it.
    """
    # Heartbeats outside Study.optimize are ours to keep (see worker.py), and experimental in name only.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna.storages._rdb.storage").addFilter(_worth_telling)
    file = file_of(url)
    with reached(url):
        if file is not None:
            _check_place(file, must_exist=reads_only)
        if file is not None and url.startswith("journal"):
            return optuna.storages.JournalStorage(Journal(file, reads_only))
        pool = _checked(url, file, grace_seconds, reads_only)
        return optuna.storages.get_storage(_created_by_one(url, pool, heartbeat_seconds, grace_seconds))


@contextlib.contextmanager
def opened(
    url: str, heartbeat_seconds: int = 60, grace_seconds: int = 180, *, reads_only: bool = False
) -> Iterator[BaseStorage]:
    """`open_storage` for a while."""
    storage = open_storage(url, heartbeat_seconds, grace_seconds, reads_only=reads_only)
    try:
        yield storage
    finally:
        close_storage(storage)


def close_storage(storage: BaseStorage) -> None:
    """Close its connections; what is still to be asked of it opens new ones."""
    storage.remove_session()
    if (engine := engine_of(storage)) is not None:
        engine.dispose()


@contextlib.contextmanager
def reached(url: str) -> Iterator[None]:
    """What a storage answers with while a study begins, as one StorageError without secrets."""
    try:
        yield
    except ImportError:
        raise StorageError("--storage: PostgreSQL needs psycopg, install lda-reid[postgresql]") from None
    except _UNREACHED as error:
        raise StorageError(f"--storage {masked(url)}: {without_secrets(reason(error), url)}") from None


def reason(error: BaseException) -> str:
    """Why a storage does not answer, in one line without secrets: what the database's own driver said."""
    while (cause := getattr(error, "orig", None) or error.__cause__) is not None:
        error = cause
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return cleaned(lines[0] if lines else type(error).__name__)


def _worth_telling(record: logging.LogRecord) -> bool:
    """A cut connection, told with twenty lines of SQL before Optuna tries again: if that fails too, it raises."""
    return "Falling back to a slower alternative" not in record.getMessage()


def _check_place(file: Path, must_exist: bool) -> None:
    if file.is_dir():
        raise StorageError(f"--storage: {file} is a folder; expected a file in it")
    if not file.parent.is_dir():
        raise StorageError(f"--storage: there is no folder {file.parent}; make it, or give another path")
    if must_exist and not file.exists():
        raise StorageError(f"--storage: there is no file {file}")


def _checked(url: str, file: Path | None, grace_seconds: int, reads_only: bool) -> Pool:
    """Fresh connections to a database that is there, Optuna's or empty, and, where that is needed, can be written."""
    if file is not None:
        engine = create_engine(url, connect_args={"timeout": 60})
    else:
        # One connection for the work, one for the heartbeat. A cut link must not hold either for TCP's quarter hour.
        limits = {"connect_timeout": 10, "tcp_user_timeout": 1000 * max(1, grace_seconds // 2)}
        engine = create_engine(url, pool_pre_ping=True, pool_size=2, connect_args=limits)
    try:
        if reads_only and "version_info" not in inspect(engine).get_table_names():
            raise EmptyStorageError(f"--storage {masked(url)}: there is no study in this database yet; start it first")
        _check_owner(url, engine)
        if not reads_only:
            _check_writable(url, engine)
    finally:
        engine.dispose()  # and has new ones then
    return engine.pool


def _check_owner(url: str, engine: Engine) -> None:
    """Raises StorageError for a database of another program. A server's may hold other tables beside Optuna's."""
    end = time.monotonic() + _CREATION_SECONDS
    while True:
        names = set(inspect(engine).get_table_names())
        others = names if engine.dialect.name == "sqlite" else names & _TABLES
        if not others or "version_info" in names:
            return
        if time.monotonic() > end:
            held = ", ".join(sorted(others)[:5])
            raise StorageError(
                f"--storage {masked(url)}: the database is another program's (it holds {held}); give one of its own"
            )
        time.sleep(0.1)


def _check_writable(url: str, engine: Engine) -> None:
    """Raises StorageError for a standby, DBAPIError for a file that cannot be written."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        elif connection.exec_driver_sql("SHOW transaction_read_only").scalar() == "on":
            raise StorageError(
                f"--storage {masked(url)}: the database is read-only (a standby, or default_transaction_read_only)"
            )
        connection.rollback()


def _created_by_one(url: str, pool: Pool, heartbeat_seconds: int, grace_seconds: int) -> RDBStorage:
    """Open, and again when another process is creating the same tables at this moment: all but one collide."""
    for collisions in range(_COLLISIONS + 1):
        try:
            return RDBStorage(
                url.replace("{", "{{").replace("}", "}}"),  # Optuna takes it for a template
                engine_kwargs={"pool": pool},  # ours to close where this fails
                heartbeat_interval=heartbeat_seconds,
                grace_period=grace_seconds,
            )
        except RuntimeError as error:  # tables of an older or a newer Optuna
            pool.dispose()
            raise StorageError(f"--storage {masked(url)}: {error}") from None
        except DBAPIError as error:
            pool.dispose()
            if collisions == _COLLISIONS or not _collision(error):
                raise
            pool = pool.recreate()
            time.sleep(random.random())
    raise AssertionError("the last attempt returns or raises")


def _collision(error: DBAPIError) -> bool:
    if isinstance(error, ProgrammingError):
        return getattr(error.orig, "sqlstate", None) not in (None, _DENIED)  # None: the driver itself refuses
    return isinstance(error, IntegrityError) or "already exists" in str(error)


# --- using -----------------------------------------------------------------------------------------------------------


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


def file_behind(storage: BaseStorage) -> Path | None:
    """The file of a storage that is one; None for a database server."""
    if (engine := engine_of(storage)) is not None:
        return file_of(str(engine.url))
    backend = getattr(storage, "_backend", None)
    return backend.path if isinstance(backend, Journal) else None


def patiently(action: Callable[[], T], seconds: float) -> T:
    """Do it, and again with growing pauses while the storage is away, for so many seconds at most."""
    end, pause = time.monotonic() + seconds, 0.1
    while True:
        try:
            return action()
        except OUTAGE:
            if time.monotonic() + pause > end:
                raise
            time.sleep(pause * (0.5 + random.random()))
            pause = min(2 * pause, 5.0)
