"""The files of a study as records, and what is wrong with them.

A file may be missing, empty, torn by a full disk or a power cut, or of another version: what cannot be read becomes a
`Flaw`, and everything else is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lda.errors import UsageError, warn
from lda.files import read_json
from lda.protocols import Protocol, get_protocol
from lda.runs import CONFIG, ENVIRONMENT, FORMAT, RESULT, Named, Result, checked_record, read_record

STUDY = "study.json"
TRIAL = "trial.json"

UNKNOWN = "unknown"
"""The code of a unit whose env.json cannot be read."""

_NAMED = 6  # more flaws than a line holds are counted


# --- what is wrong ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flaw:
    """Something of a study that cannot be read, or is not there.

    Attributes:
        where: trial-0003, or trial-0003/market1501-s0.
        what: in two or three words, such as "result.json damaged".
        detail: the file with its path, and what is wrong in it.
        left_out: whether numbers or curves are missing for it; an env.json only says which code ran.
    """

    where: str
    what: str
    detail: str = ""
    left_out: bool = True

    def __str__(self) -> str:
        return f"{self.where} ({self.what})"


def flaw_of(where: str, path: Path, detail: object, left_out: bool = True) -> Flaw:
    """The flaw of a file that should be there and be whole."""
    return Flaw(where, f"{path.name} {_state(path)}", str(detail), left_out)


def _state(path: Path) -> str:
    if not path.exists():
        return "missing"
    try:
        versioned = path.suffix == ".json" and path.name not in (TRIAL, ENVIRONMENT)
        return "of another version" if versioned and read_json(path).get("format") != FORMAT else "damaged"
    except UsageError:
        return "damaged"


def listed(flaws: Sequence[Flaw]) -> str:
    """What is left out, in one line; the first few by name."""
    named = [str(flaw) for flaw in flaws if flaw.left_out]
    more = [f"and {len(named) - _NAMED} more"] if len(named) > _NAMED else []
    return ", ".join(named[:_NAMED] + more)


def tell(flaws: Iterable[Flaw]) -> None:
    """One line each on stderr."""
    for flaw in flaws:
        text = f"{flaw}: {flaw.detail}" if flaw.detail else str(flaw)
        warn(f"{'left out: ' if flaw.left_out else ''}{text}")


# --- a study and its trials ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Where a setting was searched: from `low` to `high`, or among `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Confirm:
    """What is run again on fresh seeds: the `top` best, beside defaults and baseline."""

    top: int = 1


@dataclass(frozen=True)
class Row:
    """A row of a comparison, by its name in print."""

    title: str


@dataclass(frozen=True)
class StudyRecord:
    """What study.json says, as far as it is read here.

    Attributes:
        study: name.
        title: one line for people.
        protocol: see lda/protocols.py.
        targets: those of its units.
        data: "stand-in" or "real".
        space: swept setting -> where it was searched.
        base: settings that every trial was given.
        seed: of the search's units.
        confirm, confirm_seeds: what is rerun, on which fresh seeds; no seeds: nothing.
        compare: methods, or rows, that it compares, the control first; empty where it is of one method.
        rows: name -> row; empty where methods are compared as they are.
        compute: what all runs have as many of, steps or passes.
        preset: recipe that every run began with.
        command: as typed.
        commit, dirty, versions: of the code, whether it had local changes, and of the packages.
    """

    study: str
    title: str
    protocol: str
    targets: tuple[str, ...]
    data: str
    space: dict[str, Axis]
    base: dict[str, Any]
    command: str
    commit: str
    dirty: bool
    versions: dict[str, str]
    seed: int = 0
    confirm: Confirm = Confirm()
    confirm_seeds: tuple[int, ...] = ()
    compare: tuple[str, ...] = ()
    rows: dict[str, Row] = field(default_factory=dict)
    compute: str = "steps"
    preset: str = ""


@dataclass(frozen=True)
class TrialRecord:
    """What trial.json says, as far as it is read here.

    Attributes:
        number: of the search; None for what is no trial of it: the baseline, or a method compared without a search.
        params: swept setting -> value.
        score: selection score, None unless complete.
        reason: why it ended early, where it did.
        units: folders of its runs in the search.
        confirm_units: folders of its reruns on seeds that the search never saw.
    """

    number: int | None
    origin: Literal["default", "search", "baseline"]
    state: Literal["running", "complete", "pruned", "failed"]
    score: float | None
    reason: str | None
    params: dict[str, Any]
    units: tuple[str, ...]
    confirm_units: tuple[str, ...]


def read_study(path: Path) -> tuple[StudyRecord, Protocol]:
    """study.json. Raises UsageError that says how it is made again; nothing can be shown without it."""
    try:
        record = read_record(path, StudyRecord)
    except UsageError as error:
        again = "; the study's own command writes it again" if _state(path) == "damaged" else ""
        raise UsageError(f"{error}{again}") from None
    try:
        return record, get_protocol(record.protocol)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def read_trial(folder: Path) -> TrialRecord | Flaw:
    """trial.json of a trial's folder."""
    path = folder / TRIAL
    try:
        record = checked_record(read_json(path), TrialRecord, f"{path}: ")
    except UsageError as error:
        return flaw_of(folder.name, path, error)
    if record.number is not None and folder.name != f"trial-{record.number:04d}":
        return Flaw(folder.name, f"holds trial {record.number}", f"{path}: that trial's folder has another name")
    return record


# --- a unit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ConfigRecord:
    """What config.json says, as far as it is read here."""

    config: Named


@dataclass(frozen=True)
class _EnvironmentRecord:
    """What env.json says, as far as it is read here. `code`: a hash of the source files, where it was taken."""

    commit: str
    dirty: bool
    versions: dict[str, str]
    code: str = ""


@dataclass(frozen=True)
class Code:
    """What a unit was made by.

    Attributes:
        label: short commit, and whether the tree had local changes; `UNKNOWN` where env.json cannot be read.
        hash: of the source files; "" where it was not taken.
        torch: its version.
    """

    label: str = UNKNOWN
    hash: str = ""
    torch: str = UNKNOWN


def read_named(folder: Path, where: str) -> Named | Flaw:
    """config.json of a unit's folder."""
    try:
        return read_record(folder / CONFIG, _ConfigRecord).config
    except UsageError as error:
        return flaw_of(where, folder / CONFIG, error)


def read_result(folder: Path, where: str) -> Result | Flaw | None:
    """result.json of a unit's folder; None while the unit is unfinished."""
    if not (folder / RESULT).exists():
        return None
    try:
        return Result.read(folder)
    except UsageError as error:
        return flaw_of(where, folder / RESULT, error)


def read_code(folder: Path, where: str) -> Code | Flaw:
    """env.json of a unit's folder."""
    path = folder / ENVIRONMENT
    try:
        found = checked_record(read_json(path), _EnvironmentRecord, f"{path}: ")
    except UsageError as error:
        return flaw_of(where, path, f"{error}; which code ran is unknown", left_out=False)
    label = found.commit[:7] or "no commit"
    if found.dirty:
        label += " + local changes" + (f" (code {found.code[:7]})" if found.code else "")
    return Code(label, found.code, found.versions.get("torch", UNKNOWN))
