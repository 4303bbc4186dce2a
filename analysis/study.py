"""What lies in a study's folder, as tables. Nothing here knows how the files came to be, and nothing is written.

A study: study.json, trial-*/trial.json. A unit (one trial on one target with one seed): the folder trial-*/<unit>/.
Formats: sweeps/study_folder.py, sweeps/views/trial_files.py and lda/runs.py. What cannot be read: records.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pandas as pd

from analysis.records import (
    STUDY,
    TRIAL,
    Code,
    Flaw,
    StudyRecord,
    TrialRecord,
    flaw_of,
    read_code,
    read_named,
    read_result,
    read_study,
    read_trial,
)
from lda.data.catalogue import title
from lda.errors import UsageError
from lda.protocols import Protocol, get_protocol
from lda.runs import CONFIG, METRICS, RESULT, Cost, Result, UnitFolder, is_unit, unit_folders

PARAMETER = "param/"
"""Prefix of the columns of `Study.trials` that hold swept settings."""

RULE = "rule/"
"""Prefix of the columns of `Study.units` that hold what each selection rule says of a unit."""

METRIC_NAMES = {"mAP": "mAP", "mINP": "mINP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
"""Metric of a result -> its name in print; fractions in files, percent in print."""


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
            seed the search never saw), finished, code and torch (see `records.Code`); and of its `lda.runs.Result`,
            missing where the unit is unfinished: score and selection (the rule), `rule/<name>` of every rule known,
            train_passes, test_forwards and test (the cost), and every entry that is a number or a word, under its own
            name; times that no clock can have measured are missing. By trial, then target in table order, then seed.
        flaws: what cannot be read or is not there.
    """

    folder: Path
    record: StudyRecord
    trials: pd.DataFrame
    units: pd.DataFrame
    flaws: tuple[Flaw, ...] = ()

    @property
    def name(self) -> str:
        """The study's name."""
        return self.record.study

    @property
    def protocol(self) -> Protocol:
        """The protocol it ran."""
        return get_protocol(self.record.protocol)

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

    def title_of(self, trial: str) -> str | None:
        """A row's name in print by its trial's name; None where no row is compared under it."""
        row = self.record.rows.get(trial.removeprefix("trial-"))
        return None if row is None else row.title

    def trials_of(self, method: str) -> pd.DataFrame:
        """The trials of a method, or of a row, where several are compared."""
        if self.record.rows:
            return self.trials[self.trials["name"] == f"trial-{method}"]
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
    """Read a study's folder; trials and units that cannot be read are left out and named among its flaws.

    Raises UsageError when it is none, naming what is near, and for a study.json that is damaged or of another format.
    """
    if not (folder / STUDY).is_file():
        raise UsageError(_no_study(folder))
    record, protocol = read_study(folder / STUDY)
    trials, units = [], []
    flaws: list[Flaw] = []
    for path in sorted(folder.glob("trial-*")):
        trial = _trial(path, flaws)
        if trial is not None:
            rows = [row for name in _unit_names(path, trial) if (row := _unit_row(path / name, trial, flaws))]
            flaws += _absent(record, path, trial, rows, flaws)
            trials.append(_trial_row(path.name, trial))
            units += rows
    _name_codes(units, (folder.name, record.study))
    order = {target: position for position, target in enumerate(protocol.targets)}
    units.sort(key=lambda row: (row["trial"], order.get(row["target"], len(order)), row["seed"]))
    trials.sort(key=lambda row: (row["origin"] == "baseline", _place(row["number"]), row["name"]))
    return Study(
        folder, record, _frame(trials, _trial_columns()), _frame(units, _unit_columns()), tuple(dict.fromkeys(flaws))
    )


def _trial(path: Path, flaws: list[Flaw]) -> TrialRecord | None:
    """The record of a trial's folder; None for one that cannot be shown, or is no trial's yet."""
    if path.is_symlink() and not path.exists():
        flaws.append(Flaw(path.name, "a link to nowhere", f"{path} -> {path.readlink()}"))
        return None
    if not (path / TRIAL).exists() and not unit_folders(path):
        return None
    trial = read_trial(path)
    if isinstance(trial, Flaw):
        flaws.append(trial)
        return None
    return trial


def _unit_names(trial: Path, record: TrialRecord) -> list[str]:
    """Folders of a trial's units: those that are here, and those that trial.json names."""
    here = {path.parent.name for file in (CONFIG, RESULT) for path in trial.glob(f"*/{file}")}
    return sorted(here.union(record.units, record.confirm_units))


def _absent(
    study: StudyRecord, path: Path, trial: TrialRecord, rows: list[dict[str, Any]], known: list[Flaw]
) -> list[Flaw]:
    """Runs that a complete trial finished, by its trial.json, and that are not here."""
    if trial.state != "complete":
        return []
    if trial.number is None:
        expected = trial.confirm_units
    else:
        expected = tuple(f"{target}-s{study.seed}" for target in study.targets)
    finished = {row["unit"] for row in rows if row["finished"]}
    lost = [name for name in expected if name not in finished]
    if lost and not rows:
        return [Flaw(path.name, "none of its runs is here", f"{path / TRIAL} says that it is complete")]
    told = {flaw.where for flaw in known if flaw.left_out}
    why = f"{path / TRIAL} says that the trial is complete"
    return [
        Flaw(where, f"{RESULT} missing" if (path / name).exists() else "missing", f"{path / name}; {why}")
        for name in lost
        if (where := f"{path.name}/{name}") not in told
    ]


def _place(number: int | None) -> float:
    return math.inf if number is None else number


def _trial_row(name: str, trial: TrialRecord) -> dict[str, Any]:
    row = {"name": name, **vars(trial), **{f"{PARAMETER}{key}": trial.params[key] for key in sorted(trial.params)}}
    return {key: value for key, value in row.items() if key not in _NOT_COLUMNS}


_NOT_COLUMNS = ("params", "units", "confirm_units")


def _trial_columns() -> list[str]:
    return ["name", *(f.name for f in dataclasses.fields(TrialRecord) if f.name not in _NOT_COLUMNS)]


def _unit_row(folder: Path, trial: TrialRecord, flaws: list[Flaw]) -> dict[str, Any] | None:
    """The row of a unit; None where it is not known which unit it is."""
    name, where = folder.name, f"{folder.parent.name}/{folder.name}"
    if not folder.exists():
        flaws.append(Flaw(where, "a link to nowhere" if folder.is_symlink() else "missing", str(folder)))
        return None
    named = read_named(folder, where)
    if not isinstance(named, Flaw) and name != f"{named.target}-s{named.seed}":
        named = Flaw(where, f"holds {named.target}-s{named.seed}", f"{folder / CONFIG}: that run's folder is another")
    if isinstance(named, Flaw):
        flaws.append(named)
        return None
    result = read_result(folder, where)
    if isinstance(result, Flaw):
        flaws.append(result)
        result = None
    row = {"trial": folder.parent.name, "unit": name, "path": folder, **vars(named)}
    row |= {"confirms": name in trial.confirm_units, "finished": result is not None, "code": Code()}
    if result is None:
        return {**dict.fromkeys(_unit_columns()), **row}
    code = read_code(folder, where)
    if isinstance(code, Flaw):
        flaws.append(code)
        code = Code()
    measured = {"score": result.selection.score, "selection": result.selection.rule, **vars(result.cost)}
    measured |= {key: getattr(result, key) for key in _plain_entries()}
    measured |= {f"{RULE}{rule}": score for rule, score in result.selection.scores.items()}
    for clocked in ("seconds", "images_per_second"):  # a clock that was set back in the middle of a run
        measured[clocked] = measured[clocked] if 0 <= measured[clocked] < math.inf else math.nan
    return {**row, "code": code, **measured}


def _name_codes(units: list[dict[str, Any]], studies: tuple[str, ...]) -> None:
    """The columns code and torch, in place of a `Code`.

    Commits that share all source files are one code, the first one's; a unit that took over another's training, as
    its `trained_in` says, is of both codes.
    """
    labels: dict[str, str] = {}
    for row in units:
        code = row["code"]
        row["code"] = labels.setdefault(code.hash, code.label) if code.hash else code.label
        row["torch"] = code.torch
    own = {f"{study}/{row['trial']}/{row['unit']}": row["code"] for study in studies for row in units}
    for row in units:
        trainer = own.get(row["trained_in"] or "", row["code"])
        if trainer != row["code"]:
            row["code"] = f"{row['code']}, trained by {trainer}"


_OF_FOLDER = ("trial", "unit", "path", "target", "seed", "method", "confirms", "finished", "code", "torch")


@functools.cache
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
    """The logged rows of a unit, one column per scalar; empty where nothing was logged. Damaged lines are left out."""
    try:
        rows = UnitFolder(unit).rows()
    except (UsageError, UnicodeDecodeError):
        return pd.DataFrame()
    return pd.DataFrame([row for row in rows if isinstance(row, dict) and {"step", "epoch"} <= row.keys()])


def metrics_flaws(study: Study) -> list[Flaw]:
    """What is missing of the finished units' training curves."""
    flaws = []
    for unit in study.units[study.units["finished"].astype(bool)].itertuples():
        where, path, metrics = f"{unit.trial}/{unit.unit}", unit.path / METRICS, load_metrics(unit.path)
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        last = 0 if metrics.empty else metrics["step"].max()
        if metrics.empty:
            flaws.append(flaw_of(where, path, f"{path}: no step can be read"))
        elif len(metrics) < lines:
            bad = lines - len(metrics)
            flaws.append(Flaw(where, f"{METRICS} damaged", f"{path}: {bad} of {lines} lines cannot be read"))
        elif last < unit.steps:
            flaws.append(Flaw(where, f"{METRICS} cut short", f"{path}: ends at step {last} of {unit.steps}"))
    return flaws


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
