"""What lies in a study's folder, as tables. Nothing here knows how the files came to be, and nothing is written.

A study: study.json, trial-*/trial.json. A unit (one trial on one target with one seed): trial-*/<unit>/config.json,
metrics.jsonl, buffer_bank.npz, result.json. Formats: sweeps/folders.py and lda/runs.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lda.data.catalogue import title
from lda.errors import UsageError
from lda.files import read_json
from lda.protocols import PROTOCOLS, Protocol
from lda.runs import read_metrics

PARAMETER = "param/"
"""Prefix of the columns of `Study.trials` that hold swept settings."""

_RESULT_KEYS = (
    "mAP", "rank1", "rank5", "rank10", "mINP", "num_splits", "mAP_std", "rank1_std", "inference", "flip_test",
    "average_precision", "data", "seconds", "images_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A study's folder, read.

    Attributes:
        folder: where it lies.
        spec: the content of study.json.
        trials: one row per trial: name (its folder), number, origin (default, search, baseline), state, score, reason,
            and a column `param/<setting>` for every swept setting. By number, the baseline last.
        units: one row per unit: trial (name), unit (folder name), path, target, seed, method, the settings
            cuhk03_boxes, cuhk03_protocol and baseline_norm, confirms (a rerun on a seed the search never saw),
            finished, score (selection score), selection (rule), and the entries of result.json, missing where the unit
            is unfinished. By trial, then target in table order, then seed.
    """

    folder: Path
    spec: dict[str, Any]
    trials: pd.DataFrame
    units: pd.DataFrame

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.spec.get("study", self.folder.name))

    @property
    def protocol(self) -> Protocol:
        """The protocol it ran."""
        return PROTOCOLS[self.spec["protocol"]]

    @property
    def targets(self) -> list[str]:
        """Its targets, in table order."""
        chosen = self.spec.get("targets") or self.protocol.targets
        return [target for target in self.protocol.targets if target in chosen]

    @property
    def data(self) -> str:
        """ "stand-in" or "real", as the finished units say, else as the study says."""
        seen = sorted(self.units["data"].dropna().unique())
        return " and ".join(seen) or str(self.spec.get("data", "unknown"))

    def default_trial(self) -> pd.Series | None:
        """The trial of the default settings, None before it was started."""
        return _first(self.trials[self.trials["origin"] == "default"])

    def baseline_trial(self) -> pd.Series | None:
        """The plain baseline, None where the study has none."""
        return _first(self.trials[self.trials["origin"] == "baseline"])

    def best_trial(self) -> pd.Series | None:
        """The complete trial with the highest selection score (the first of equals); the baseline does not compete."""
        return self._best(self.trials[self.trials["origin"] != "baseline"])

    def best_searched_trial(self) -> pd.Series | None:
        """The best of the complete trials other than the defaults, whether or not it is better than they are."""
        return self._best(self.trials[self.trials["origin"] == "search"])

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
    """Read a study's folder. Raises UsageError when it is none, naming what is near."""
    if not (folder / "study.json").is_file():
        raise UsageError(_no_study(folder))
    spec = read_json(folder / "study.json")
    protocol = PROTOCOLS.get(spec.get("protocol", ""))
    if protocol is None:
        raise UsageError(f"{folder / 'study.json'}: protocol {spec.get('protocol')!r} is not one of lda/protocols.py")
    trials, units = [], []
    for path in sorted(folder.glob("trial-*/trial.json")):
        trial = read_json(path)
        trial["name"] = path.parent.name
        trials.append(_trial_row(trial))
        units += [_unit_row(trial, config.parent) for config in path.parent.glob("*/config.json")]
    order = {target: position for position, target in enumerate(protocol.targets)}
    units.sort(key=lambda row: (row["trial"], order.get(row["target"], len(order)), row["seed"]))
    trials.sort(key=lambda row: (row["origin"] == "baseline", row["number"], row["name"]))
    return Study(folder, spec, _frame(trials, _TRIAL_KEYS), _frame(units, _UNIT_COLUMNS))


_TRIAL_KEYS = ("name", "number", "origin", "state", "score", "reason")


def _trial_row(trial: Mapping[str, Any]) -> dict[str, Any]:
    parameters = {f"{PARAMETER}{key}": value for key, value in sorted(trial.get("params", {}).items())}
    return {**{key: trial.get(key) for key in _TRIAL_KEYS}, **parameters}


_CONFIG_KEYS = ("target", "seed", "method", "cuhk03_boxes", "cuhk03_protocol", "baseline_norm")
_UNIT_COLUMNS = (
    "trial", "unit", "path", *_CONFIG_KEYS, "confirms", "finished", "score", "selection", *_RESULT_KEYS,
)  # fmt: skip


def _unit_row(trial: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")["config"]
    finished = (folder / "result.json").is_file()
    result = read_json(folder / "result.json") if finished else {}
    selection = result.get("selection", {})
    return {
        "trial": trial["name"],
        "unit": folder.name,
        "path": folder,
        **{key: config[key] for key in _CONFIG_KEYS},
        "confirms": folder.name in trial.get("confirm_units", ()),
        "finished": finished,
        "score": selection.get("score"),
        "selection": selection.get("rule"),
        **{key: result.get(key) for key in _RESULT_KEYS},
    }


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(columns))


def load_metrics(unit: Path) -> pd.DataFrame:
    """The logged rows of a unit, one column per scalar; empty where nothing was logged.

    A half-written last line (a killed run) is left out; any other bad line raises UsageError.
    """
    path = unit / "metrics.jsonl"
    return pd.DataFrame(read_metrics(path) if path.is_file() else [])


def _no_study(folder: Path) -> str:
    """Why a path is not a study's folder, and which one may be meant."""
    if (folder / "config.json").is_file():
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
