"""What the storage says is finished, beside what lies here: units are restored, run again, or named where they lie.

A study on several machines with disks of their own ends with its whole table on each; nothing is drawn from less than
the storage knows without saying so.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lda.errors import UsageError, warn
from lda.runs import UnitFolder, is_whole
from sweeps.list.archive import Archive
from sweeps.list.attempts import Configuration
from sweeps.list.jobs import configuration_job
from sweeps.plan.spec import StudySpec
from sweeps.study_folder import StudyFolder


@dataclass(frozen=True)
class Recorded:
    """A finished unit as the storage tells of it.

    Attributes:
        place: its folder below the study's, trial-0003/market1501-s0.
        target: its target.
        unit: its hash.
        host, folder: where it was run; folder is that of the study there.
    """

    place: str
    target: str
    unit: str
    host: str
    folder: str

    def __str__(self) -> str:
        return f"{self.place} (on {self.host}: {self.folder})"


def recorded(spec: StudySpec, configuration: Configuration) -> list[Recorded]:
    """The finished units of a configuration."""
    job = configuration_job(spec, configuration)
    return [
        Recorded(job.place(target), target, row["unit"], row["host"], row.get("folder", ""))
        for target, row in configuration.units.items()
    ]


def missing(spec: StudySpec, folder: StudyFolder, known: Sequence[Configuration]) -> list[Recorded]:
    """The units that are recorded and not here, or damaged."""
    return [
        unit
        for configuration in known
        for unit in recorded(spec, configuration)
        if not is_whole(folder.path / unit.place, unit.unit)
    ]


def restore(folder: StudyFolder, archive: Archive | None, units: Sequence[Recorded]) -> list[Recorded]:
    """Write what the archive has of these units into their folders. Returns those that it has not."""
    kept = {(found.place, found.unit) for found in archive.units()} if archive is not None and units else set()
    left = []
    for unit in units:
        if archive is None or (unit.place, unit.unit) not in kept:
            left.append(unit)
            continue
        try:
            archive.restore(unit.place, folder.path / unit.place)
        except UsageError as error:
            warn(str(error))
            left.append(unit)
    return left


def is_lost(unit: Recorded, folder: StudyFolder, shared: bool) -> bool:
    """Whether a unit that is missing is nowhere: it was run in this folder, or all machines share it."""
    return shared or (unit.host, unit.folder) == (platform.node(), str(folder.path))


@dataclass(frozen=True)
class Gathered:
    """What came of bringing a study's units to this machine.

    Attributes:
        copied: units that were written from the storage.
        left: units that are neither here nor in the storage.
        weights: where checkpoints lie that this machine has not -> how many; they stay where they were made.
    """

    copied: int
    left: tuple[Recorded, ...]
    weights: dict[str, int]


def gather(spec: StudySpec, folder: StudyFolder, archive: Archive | None, known: Sequence[Configuration]) -> Gathered:
    """Bring every finished unit of a study here."""
    absent = missing(spec, folder, known)
    left = restore(folder, archive, absent)
    units = [unit for configuration in known for unit in recorded(spec, configuration)]
    away = [
        u for u in units if not is_lost(u, folder, False) and not UnitFolder(folder.path / u.place).checkpoint.exists()
    ]
    return Gathered(len(absent) - len(left), tuple(left), dict(Counter(f"{u.host}:{u.folder}" for u in away)))
