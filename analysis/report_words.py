"""What a report says in words: its headline, what went wrong, where the numbers came from, and how to be anonymous."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparison import AVERAGE, protocol_table
from analysis.records import Axis
from analysis.study import Study
from analysis.tables import SELECTION_RULES, budget_line
from lda.errors import FailedError, UsageError

_CERTAIN = 0.05


def headline(study: Study) -> list[str]:
    """Sentences: what was found, how sure it is, by which rule and at what cost. Empty before anything is complete."""
    try:
        table = protocol_table(study)
    except (UsageError, FailedError):
        return []
    rows = table[table["target"] == AVERAGE]
    found = _of_comparison(rows) if study.record.compare else [_of_row(row) for _, row in rows.iterrows()]
    seeds, fresh = int(table["seeds"].max()), " fresh" if table["confirmed"].all() else ""
    targets = f"{len(study.targets)} unseen target{'s' * (len(study.targets) > 1)}"
    rules = ", ".join(sorted({rule for words in table["selection"] for rule in words.split(" | ")}))
    chosen = "" if study.record.compare else f" Chosen by {rules}{' (the target!)' * ('oracle' in rules)}."
    hours = study.units["seconds"].astype(float).sum() / 3600
    return [
        *found,
        f"Average of {targets}, n = {seeds}{fresh} seed{'s' * (seeds > 1)} each.{chosen}",
        f"Budget: {budget_line(study, table)}; {hours:.1f} hours of runs in all.",
    ]


def _of_row(row: pd.Series) -> str:
    return f"{row['label']}: {_with_interval(row, 'mAP', '.1f')} mAP{_gain(row)}."


def _of_comparison(rows: pd.DataFrame) -> list[str]:
    others = rows[rows["configuration"] != "baseline"]
    ranked = others.sort_values("mAP", ascending=False, kind="stable")
    lines = [
        _of_row(row) for _, row in [*rows[rows["configuration"] == "baseline"].iterrows(), *ranked.head(1).iterrows()]
    ]
    gains = others["mAP_gain"].dropna()
    if len(gains):
        above = f"{int((gains > 0).sum())} of {len(gains)} are above the baseline"
        sure = others[(others["mAP_gain_p"] < _CERTAIN) & (others["mAP_gain"] > 0)]
        lines.append(f"{above}, {len(sure)} of them at p < {_CERTAIN} (paired sign-flip test, as in the table).")
    return lines


def _with_interval(row: pd.Series, column: str, style: str) -> str:
    mean, low, high = (row[f"{column}{end}"] for end in ("", "_low", "_high"))
    return f"{mean:{style}}" + ("" if np.isnan(low) else f" [{low:{style}}, {high:{style}}]")


def _gain(row: pd.Series) -> str:
    return "" if np.isnan(row["mAP_gain"]) else f", {_with_interval(row, 'mAP_gain', '+.1f')} above plain BN"


def failures(study: Study) -> pd.DataFrame:
    """trial, what, why: trials that ended early, and files that cannot be read."""
    ended = study.trials[study.trials["state"].isin(("failed", "pruned"))]
    rows = [(row["name"], row["state"], row["reason"] or "") for _, row in ended.iterrows()]
    rows += [(flaw.where, flaw.what, flaw.detail) for flaw in study.flaws]
    return pd.DataFrame(rows, columns=["trial", "what", "why"])


def provenance(study: Study, anonymous: bool) -> list[tuple[str, str]]:
    """What study.json knows about where the numbers came from; nothing that tells who made them, if `anonymous`."""
    record = study.record
    commit = record.commit + (" with local changes" if record.dirty else "")
    lines = [
        ("swept", ", ".join(f"{name} ({_axis(axis)})" for name, axis in record.space.items())),
        ("fixed", _listed(record.base)),
        *([] if anonymous else [("command", record.command), ("commit", commit)]),
        ("versions", _listed(record.versions)),
    ]
    return [(name, text) for name, text in lines if text]


def _axis(axis: Axis) -> str:
    if axis.choices:
        return ", ".join(map(str, axis.choices))
    step = f", step {axis.step:g}" if axis.step else ""
    return f"{axis.low} to {axis.high}{', log scale' if axis.log else ''}{step}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?/(?:[^\s/:,;<>'\"()]+/)+")
_HOST = re.compile(r"\bon [\w.-]+(?=: |:/)")


def unnamed(text: str) -> str:
    """A text without the folders above a file and without hosts: paths and machines name people."""
    return _HOST.sub("on a machine", _PATH.sub(".../", text))


def rules_in_words(study: Study) -> str:
    """The selection rules of the study's units."""
    rules = sorted(set(study.units["selection"].dropna()))
    return "; ".join(SELECTION_RULES.get(rule, rule) for rule in rules)
