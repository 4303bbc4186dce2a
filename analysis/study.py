"""What lies in a study's folder, as tables. Nothing here knows how the files came to be, and nothing is written.

A study: study.json, trial-*/trial.json. A unit (one trial on one target with one seed): the folder trial-*/<unit>/.
Formats: sweeps/study_folder.py, sweeps/views/trial_files.py and lda/runs.py.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pandas as pd

from lda.data.catalogue import title
from lda.errors import UsageError
from lda.files import read_json
from lda.protocols import PROTOCOLS, Protocol, get_protocol
from lda.runs import (
    Cost,
    Result,
    Unit,
    UnitFolder,
    checked_record,
    is_unit,
    read_record,
    read_unit,
    unit_folders,
)

PARAMETER = "param/"
"""Prefix of the columns of `Study.trials` that hold swept settings."""

METRIC_NAMES = {"mAP": "mAP", "mINP": "mINP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
"""Metric of a result -> its name in print; fractions in files, percent in print."""


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Where a setting was searched: from `low` to `high`, or among `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()


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
        compare: methods that it compares, the control first; empty where it is of one method.
        compute: what all runs have as many of, steps or passes.
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
    compare: tuple[str, ...] = ()
    compute: str = "steps"


@dataclass(frozen=True)
class TrialRecord:
    """What trial.json says, as far as it is read here.

    Attributes:
        number: of the search; None for what is no trial of it: the baseline, or a method compared without a search.
        params: swept setting -> value.
        score: selection score, None unless complete.
        reason: why it ended early, where it did.
        confirm_units: folders of its reruns on seeds that the search never saw.
    """

    number: int | None
    origin: Literal["default", "search", "baseline"]
    state: Literal["running", "complete", "pruned", "failed"]
    score: float | None
    reason: str | None
    params: dict[str, Any]
    confirm_units: tuple[str, ...]


def _read_study(path: Path) -> tuple[StudyRecord, Protocol]:
    record = read_record(path, StudyRecord)
    try:
        return record, get_protocol(record.protocol)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _read_trial(path: Path) -> TrialRecord:
    return checked_record(read_json(path), TrialRecord, f"{path}: ")


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """A study's folder, read.

    Attributes:
        folder: where it lies.
        record: the content of study.json.
        trials: one row per trial: name (its folder), number, origin (default, search, baseline), state, score, reason,
            and a column `param/<setting>` for every swept setting. By number, the baseline last.
        units: one row per unit: trial (name), unit (folder name), path, target, seed, method, confirms (a rerun on a
            seed the search never saw), finished; and of its `lda.runs.Result`, missing where the unit is unfinished:
            score and selection (the rule), train_passes, test_forwards and test (the cost), and every entry that is a
            number or a word, under its own name. By trial, then target in table order, then seed.
    """

    folder: Path
    record: StudyRecord
    trials: pd.DataFrame
    units: pd.DataFrame

    @property
    def name(self) -> str:
        """The study's name."""
        return self.record.study

    @property
    def protocol(self) -> Protocol:
        """The protocol it ran."""
        return PROTOCOLS[self.record.protocol]

    @property
    def targets(self) -> list[str]:
        """Its targets, in table order."""
        return [target for target in self.protocol.targets if target in self.record.targets]

    @property
    def data(self) -> str:
        """ "stand-in" or "real", as the finished units say, else as the study says."""
        return " and ".join(sorted(self.units["data"].dropna().unique())) or self.record.data

    def default_trial(self) -> pd.Series | None:
        """The trial of the default settings, None before it was started."""
        return _first(self.trials[self.trials["origin"] == "default"])

    def baseline_trial(self) -> pd.Series | None:
        """The baseline, None where the study has none."""
        return _first(self.trials[self.trials["origin"] == "baseline"])

    def best_trial(self) -> pd.Series | None:
        """The complete trial with the highest selection score (the first of equals); the baseline does not compete."""
        return self._best(self.trials[self.trials["origin"] != "baseline"])

    def best_searched_trial(self) -> pd.Series | None:
        """The best of the complete trials other than the defaults, whether or not it is better than they are."""
        return self._best(self.trials[self.trials["origin"] == "search"])

    def trials_of(self, method: str) -> pd.DataFrame:
        """The trials that ran a method, where several are compared."""
        return self.trials[self.trials["name"].isin(self.units.loc[self.units["method"] == method, "trial"])]

    @staticmethod
    def _best(trials: pd.DataFrame) -> pd.Series | None:
        complete = trials[trials["state"] == "complete"]
        return _first(complete.sort_values("score", ascending=False, kind="stable"))


def _first(rows: pd.DataFrame) -> pd.Series | None:
    return None if rows.empty else rows.iloc[0]


def print_name(dataset: str) -> str:
    """A data set's name in print; a name that is not ours stays as it is."""
    return title(dataset)


def load_study(folder: Path) -> Study:
    """Read a study's folder.

    Raises UsageError when it is none, naming what is near, and for files that are damaged or of another format.
    """
    if not (folder / "study.json").is_file():
        raise UsageError(_no_study(folder))
    record, protocol = _read_study(folder / "study.json")
    trials, units = [], []
    for path in sorted(folder.glob("trial-*/trial.json")):
        trial = _read_trial(path)
        trials.append(_trial_row(path.parent.name, trial))
        units += [_unit_row(path.parent.name, trial, read_unit(unit)) for unit in unit_folders(path.parent)]
    order = {target: position for position, target in enumerate(protocol.targets)}
    units.sort(key=lambda row: (row["trial"], order.get(row["target"], len(order)), row["seed"]))
    trials.sort(key=lambda row: (row["origin"] == "baseline", row["number"], row["name"]))
    return Study(folder, record, _frame(trials, _trial_columns()), _frame(units, _unit_columns()))


def _trial_row(name: str, trial: TrialRecord) -> dict[str, Any]:
    row = {"name": name, **vars(trial), **{f"{PARAMETER}{key}": trial.params[key] for key in sorted(trial.params)}}
    del row["params"], row["confirm_units"]
    return row


def _trial_columns() -> list[str]:
    return ["name", *(f.name for f in dataclasses.fields(TrialRecord) if f.name not in ("params", "confirm_units"))]


def _unit_row(trial: str, record: TrialRecord, unit: Unit) -> dict[str, Any]:
    name, result = unit.folder.path.name, unit.result
    row = {"trial": trial, "unit": name, "path": unit.folder.path}
    row |= {"target": unit.target, "seed": unit.seed, "method": unit.method}
    row |= {"confirms": name in record.confirm_units, "finished": result is not None}
    if result is None:
        return {**dict.fromkeys(_unit_columns()), **row}
    measured = {"score": result.selection.score, "selection": result.selection.rule, **vars(result.cost)}
    return {**row, **measured, **{key: getattr(result, key) for key in _plain_entries()}}


_OF_FOLDER = ("trial", "unit", "path", "target", "seed", "method", "confirms", "finished")


def _plain_entries() -> list[str]:
    """The entries of a result that are a number or a word, and not known of an unfinished unit already."""
    nested = (dict, tuple)
    kinds = {key: kind for key, kind in get_type_hints(Result).items() if key not in _OF_FOLDER}
    return [key for key, kind in kinds.items() if not dataclasses.is_dataclass(kind) and get_origin(kind) not in nested]


def _unit_columns() -> list[str]:
    return [*_OF_FOLDER, "score", "selection", *(f.name for f in dataclasses.fields(Cost)), *_plain_entries()]


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(columns))


def load_metrics(unit: Path) -> pd.DataFrame:
    """The logged rows of a unit, one column per scalar; empty where nothing was logged.

    A half-written last line (a killed run) is left out; any other bad line raises UsageError.
    """
    return pd.DataFrame(UnitFolder(unit).rows())


def _no_study(folder: Path) -> str:
    """Why a path is not a study's folder, and which one may be meant."""
    if is_unit(folder):
        return f"{folder} is a single run; expected a study's folder (it holds study.json), such as runs/protocol3"
    what = "holds no study.json" if folder.is_dir() else "does not exist"
    line = f"{folder} {what}; expected a study's folder, as python sweeps/run.py makes it"
    parent = folder if folder.is_dir() else folder.parent
    studies = sorted(path.parent.name for path in parent.glob("*/study.json"))
    if studies:
        near = difflib.get_close_matches(folder.name, studies, n=1, cutoff=0.4)
        line += f" (did you mean {parent / near[0]}?)" if near else ""
        line += f"; in {parent}: {', '.join(studies)}"
    return line
