"""The files of finished units in the study's database: every machine of a study can have its whole result.

A unit is trained where a worker happens to run; tables, figures and the report are made from folders. So a worker puts
what they read (settings, environment, metrics, result, what the method kept: a few kilobytes, a megabyte with the
Buffer Bank of a ResNet-50) into one table beside Optuna's before the storage learns that the unit is done. Checkpoints
stay where they were made. A journal file has no such table: its machines share the study's folder.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sql
from optuna.storages import BaseStorage
from sqlalchemy.engine import Engine

from lda.errors import UsageError
from lda.files import atomic
from lda.runs import RESULT, record_files
from sweeps.list.storage import engine_of, patiently

_CREATING_SECONDS = 20.0


def open_archive(storage: BaseStorage, study: str) -> Archive | None:
    """The archive of a study, None where its storage has none. `study` is the token of the study, not its name."""
    engine = engine_of(storage)
    if engine is None:
        return None
    archive = Archive(engine, study)
    patiently(archive.create, _CREATING_SECONDS)  # another process may be making it
    return archive


@dataclass(frozen=True)
class Kept:
    """A unit in the archive: its folder below that of the study, and its hash."""

    place: str
    unit: str


class Archive:
    """One table; every method is one transaction, and safe to repeat."""

    def __init__(self, engine: Engine, study: str) -> None:
        self._engine, self._study = engine, study
        self._table = sql.Table(
            "lda_unit_files",
            sql.MetaData(),
            sql.Column("study", sql.String(64), primary_key=True),
            sql.Column("place", sql.String(256), primary_key=True),  # trial-0003/market1501-s0
            sql.Column("name", sql.String(128), primary_key=True),  # result.json
            sql.Column("unit", sql.String(64), nullable=False),
            sql.Column("sha256", sql.String(64), nullable=False),  # of the content before compression
            sql.Column("content", sql.LargeBinary, nullable=False),  # zlib
        )

    def create(self) -> None:
        """Make the table where there is none."""
        self._table.metadata.create_all(self._engine, checkfirst=True)

    def keep(self, place: str, unit: str, folder: Path) -> None:
        """Put a finished unit's files in, in the place of what was there."""
        rows = [
            {
                "study": self._study,
                "place": place,
                "name": path.name,
                "unit": unit,
                "sha256": hashlib.sha256(content).hexdigest(),
                "content": zlib.compress(content),
            }
            for path in record_files(folder)
            for content in [path.read_bytes()]
        ]
        with self._engine.begin() as connection:
            connection.execute(self._table.delete().where(*self._at(place)))
            connection.execute(self._table.insert(), rows)

    def units(self) -> list[Kept]:
        """Everything that is kept."""
        columns = self._table.c
        query = sql.select(columns.place, columns.unit).where(columns.study == self._study, columns.name == RESULT)
        with self._engine.connect() as connection:
            return [Kept(place, unit) for place, unit in connection.execute(query)]

    def holds(self, place: str, unit: str) -> bool:
        """Whether this unit is kept here."""
        return Kept(place, unit) in self.units()

    def restore(self, place: str, folder: Path) -> None:
        """Write a unit's files into its folder, the result last. Raises UsageError for what is damaged or not kept."""
        columns = self._table.c
        with self._engine.connect() as connection:
            query = sql.select(columns.name, columns.sha256, columns.content).where(*self._at(place))
            rows = connection.execute(query).all()
        files = {name: _unpacked(f"{place}/{name}", digest, content) for name, digest, content in rows}
        if RESULT not in files:
            raise UsageError(f"{place} is not in the study's database")
        for name in sorted(files, key=lambda name: name == RESULT):
            with atomic(folder / name, "wb") as file:
                file.write(files[name])

    def _at(self, place: str) -> tuple[sql.ColumnElement[bool], ...]:
        columns = self._table.c
        return columns.study == self._study, columns.place == place


def _unpacked(name: str, digest: str, content: bytes) -> bytes:
    try:
        plain = zlib.decompress(content)
    except zlib.error:
        plain = b""
    if hashlib.sha256(plain).hexdigest() != digest:
        raise UsageError(f"{name} is damaged in the study's database")
    return plain
