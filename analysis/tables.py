"""The protocol table of a study: mAP and Rank-1 on every unseen target, in percent.

    python analysis/tables.py runs/protocol3 --format markdown

Rows: the baseline, the defaults (trial 0) and the best other trial of the search; see analysis/comparison.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.comparison import (
    AVERAGE,
    BETWEEN,
    CONDITIONS,
    METRICS,
    confirmation,
    main_trials,
    metric_columns,
    print_target,
    protocol_table,
)
from analysis.published import POSTER, newer_table, published_grids, published_table
from analysis.records import UNKNOWN, Flaw, listed, tell
from analysis.study import Study, load_study
from analysis.text_tables import FORMATS, WRITERS, Grid, Marks, as_csv, best_marks
from lda.arguments import Parser, existing_folder, output_file
from lda.command import exit_code
from lda.errors import UsageError
from lda.files import atomic

_FEW_SEEDS = 5  # below so many, a bootstrap over seeds knows too few values to mean its 95%

SELECTION_RULES = {
    "source_validation": "source_validation (held-out source identities; the target is never looked at)",
    "leave_one_source_out": "leave_one_source_out (trainings without each source, tested on it; the target is not)",
    "proxy_domain": "proxy_domain (another data set that is neither source nor target; the target is not looked at)",
    "oracle": "ORACLE (chosen by looking at the target; not a generalisation result)",
}
"""Selection rule -> how a table names it."""


def render(study: Study | Path, format: str = "text", published: bool = False) -> str:
    """The study's table with its conditions, as text, Markdown, LaTeX (booktabs) or CSV.

    `published` adds the poster's rows, as a table of their own that says so. Raises UsageError for a study without a
    finished trial, and for a protocol that the poster has no table for; FailedError where damage left no trial.
    """
    study = study if isinstance(study, Study) else load_study(study)
    table = protocol_table(study)
    poster = published_table(study.protocol.name) if published else None
    if poster is not None and poster.empty:
        raise UsageError(f"--published: the poster has no table for {study.protocol.title}")
    if format == "csv":
        return _csv(study, table, None if poster is None else pd.concat([poster, newer_table(study.protocol.name)]))
    grids = study_grids(study, table)
    if poster is not None:
        warning = "" if study.data == "real" else "; OTHER DATA than above, which is stand-in: do not compare"
        grids += published_grids(study.protocol, warning)
    title = f"{study.protocol.title}, study {study.name}"
    return WRITERS[format](title, conditions(study, table), grids)


def conditions(study: Study, table: pd.DataFrame) -> list[tuple[str, str]]:
    """What a reader must know before comparing numbers: (name, value) lines."""
    seeds, splits = int(table["seeds"].max()), int(table["splits"].max())
    usual = study.protocol.num_splits
    each = {key: sorted({word for words in table[key] for word in words.split(BETWEEN)} - {""}) for key in CONDITIONS}
    flip = {"True": "flip test", "False": "no flip test"}
    again = [{"none": "no re-ranking"}.get(word, word) for word in each["reranking"]]
    tested = [
        *each["inference"],
        *(flip[word] for word in each["flip_test"]),
        *(again if again != ["no re-ranking"] else []),
    ]
    rules = [SELECTION_RULES.get(rule, rule) for rule in each["selection"]]
    return [
        ("data", data_line(study.data)),
        *([("target images", _target_images_line(table))] if "True" in each["target_data"] else []),
        ("selection", "; ".join(rules)),
        ("seeds", f"{seeds} per target ({_seeds_words(study, table)})"),
        *_incomplete(study, table),
        *([("test splits", _splits_line(splits, usual))] if max(splits, usual) > 1 else []),
        ("inference", ", ".join(tested)),
        ("CUHK03 images", f"{', '.join(each['cuhk03_boxes'])} boxes, {', '.join(each['cuhk03_protocol'])} protocol"),
        ("numbers", "percent" + (_spread_line(study) if seeds > 1 and splits == 1 else "")),
        ("budget", budget_line(study, table)),
        ("mAP", f"average precision by {', '.join(each['average_precision'])}"),
        *mixed_code(each["code"], each["torch"]),
        *what_is_missing(study.flaws),
    ]


def budget_line(study: Study, table: pd.DataFrame) -> str:
    """How long the runs trained: numbers of different budgets do not compare."""
    steps, passes = (_span(values) for values in (table["steps"], table["steps"] * table["train_passes"]))
    preset = f"preset {study.record.preset}: " if study.record.preset else ""
    equal = f"; equal {study.record.compute} for all" if study.record.compare else ""
    return f"{preset}{steps} steps a run, {passes} training passes{equal}"


def _span(values: pd.Series) -> str:
    low, high = f"{values.min():.0f}", f"{values.max():.0f}"
    return low if low == high else f"{low} to {high}"


def what_is_missing(flaws: Sequence[Flaw]) -> list[tuple[str, str]]:
    """The line of what is left out; none for a study that is whole."""
    line = listed(flaws)
    if any(flaw.left_out and "/" not in flaw.where for flaw in flaws):
        line += "; the best configuration may be among them"
    return [("left out", line)] if line else []


def mixed_code(codes: Sequence[str], torch: Sequence[str]) -> list[tuple[str, str]]:
    """The lines of what ran, where that was not the same for all units."""
    lines = []
    if len(codes) > 1 or UNKNOWN in codes:
        lines.append(("code", f"units from commits {', '.join(codes)}: not of one code"))
    if len(torch) > 1:
        lines.append(("torch", f"units from versions {', '.join(torch)}"))
    return lines


def _seeds_words(study: Study, table: pd.DataFrame) -> str:
    if table["confirmed"].all():
        return "fresh, never used by the search"
    begun = any(here for here, _ in confirmation(study).values())
    return f"the search's own, {'the confirmation is incomplete' if begun else 'nothing is confirmed'}"


def _incomplete(study: Study, table: pd.DataFrame) -> list[tuple[str, str]]:
    """What a reader would take for complete: the confirmation, and rows."""
    lines = []
    runs = confirmation(study)
    here, planned = (sum(column) for column in zip(*runs.values(), strict=True)) if runs else (0, 0)
    if here < planned:
        short = ", ".join(f"{name} {own} of {each}" for name, (own, each) in runs.items() if own < each)
        lines.append(("confirmation", f"{here} of {planned} confirmation runs are here" + f" ({short})" * (here > 0)))
    shown = set(table["trial"])
    lost = [
        f"{kind} ({trial['name']})"
        for kind, trial in main_trials(study)
        if trial["state"] == "complete" and trial["number"] is not None and trial["name"] not in shown
    ]
    return lines + ([("no row", f"{', '.join(lost)}: not every target is here")] if lost else [])


def _spread_line(study: Study) -> str:
    average = "; the average with its 95% bootstrap interval" if study.record.compare else ""
    return f", mean ± standard deviation over seeds{average}"


def data_line(data: str) -> str:
    """What the numbers were measured on, in words."""
    words = {
        "real": "real data sets",
        "stand-in": "STAND-IN (drawn pedestrians, no real data set: not comparable with published numbers)",
    }
    return words.get(data, data)


def _target_images_line(table: pd.DataFrame) -> str:
    looked = table["target_data"] != "False"
    if looked.all():
        return "every method LOOKED AT unlabelled images of the target: not domain generalisation"
    methods = ", ".join(dict.fromkeys(table.loc[looked, "method"]))
    return f"{methods} LOOKED AT unlabelled images of the target, the other rows did not: do not compare the two kinds"


def _splits_line(splits: int, usual: int) -> str:
    return f"{splits} per target" + (f", of the protocol's {usual}" if splits < usual else "")


def study_grids(study: Study, table: pd.DataFrame) -> list[Grid]:
    """The results, and the gains over the baseline where there is one; `table` is the study's `protocol_table`.

    Where targets are tested on several splits, the spread over these comes first, that over seeds in a second table.
    """
    scores = table[table["target"] == AVERAGE]
    notes = [f"Selection score: {'; '.join(f'{row.label} {row.score:.1f}' for row in scores.itertuples())}"]
    notes += _reconstruction_notes(scores)
    splits = int(table["splits"].max())
    if splits == 1:
        grids = [_results_grid(study, table, "_std", "", notes)]
    else:
        title = f"Mean ± standard deviation over the {splits} test splits of a target"
        grids = [_results_grid(study, table, "_split_std", title, notes)]
        if table["mAP_std"].notna().any():
            grids.append(_results_grid(study, table, "_std", "Mean ± standard deviation over seeds", []))
    if table["mAP_gain"].notna().any():
        grids.append(_gain_grid(study, table, "gain", "Points above the baseline"))
    if table["mAP_step"].notna().any():
        grids.append(_gain_grid(study, table, "step", "Points above the row before"))
    if study.record.compare:
        grids.append(cost_grid(study, scores))
    else:
        grids[-1].notes.extend(_cost_notes(scores))
    return grids


def _reconstruction_notes(rows: pd.DataFrame) -> list[str]:
    methods = rows[rows["reconstructed"] != ""].drop_duplicates("method").itertuples()
    return [f"{row.method}, our reading of what is not published: {row.reconstructed}" for row in methods]


def _cost_notes(rows: pd.DataFrame) -> list[str]:
    """What a training image costs, where that differs."""
    if rows["train_passes"].nunique() == 1:
        return []
    # A method whose rows differ among themselves is told apart by their labels.
    name = "method" if (rows.groupby("method")["train_passes"].nunique() == 1).all() else "label"
    passes = rows.drop_duplicates([name, "train_passes"]).sort_values("train_passes", ascending=False, kind="stable")
    listed = ", ".join(f"{row['train_passes']:g} ({row[name]})" for _, row in passes.iterrows())
    return [f"Equal steps, not equal compute: training passes per image {listed}"]


def cost_grid(study: Study, rows: pd.DataFrame) -> Grid:
    """What was compared: whose a method is, and what it costs."""
    plain = rows.loc[rows["configuration"] == "baseline", "parameters"]
    cells = []
    for _, row in rows.iterrows():
        added = len(plain) and row["configuration"] != "baseline"
        parameters = row["parameters"] - (plain.iloc[0] if added else 0)
        cells.append(
            [
                str(row["label"]),
                _venue(row["reference"]),
                f"{row['steps']:.0f}",
                f"{row['train_passes']:.3g}",
                f"{row['steps'] * row['train_passes']:.0f}",
                f"{row['test_forwards']:.3g}",
                "cosine" if np.isnan(row["pair_cost"]) else f"pairs, {row['pair_cost'] / 1e6:.2g} M",
                f"{parameters / 1e6:{'+' if added else ''}.3f} M",
                f"{row['images_per_second']:.0f}",
                f"{row['seconds']:.0f}",
                "looked at" if "True" in row["target_data"] else "no",
            ]
        )
    equal = {"steps": "Equal steps, not equal compute", "passes": "Equal compute"}[study.record.compute]
    notes = [
        f"{equal}. A pass: one forward and backward pass of a batch through the plain network, by the multiply-adds of "
        "convolutions; an epoch has a whole number of steps, so passes agree as far as that allows",
    ]
    if rows["pair_cost"].notna().any():
        notes.append("pairs: images are compared by a matcher on both encodings, at so many multiply-adds a pair")
    shown = set(rows["trial"])
    left_out = [name for name in study.record.compare if not shown & set(study.trials_of(name)["name"])]
    if left_out:
        notes.append(f"Left out, no seed is finished on every target yet: {', '.join(left_out)}")
    return Grid("What a method is and costs", list(_COST_HEADS), cells, notes)


_COST_HEADS = (
    ("", "paper"),
    *(("training", head) for head in ("steps", "passes/image", "passes")),
    *(("test", head) for head in ("forwards", "compared by")),
    ("", "parameters"),
    *(("on this machine", head) for head in ("images/s", "s/run")),
    ("", "target images"),
)


def _venue(reference: str) -> str:
    """Where a paper appeared: what follows the last comma of its reference, or stands in brackets at the end."""
    if reference.endswith(")"):
        return reference.rpartition("(")[2].rstrip(")")
    return reference.rpartition(", ")[2] if reference[-4:].isdigit() else ""


def _results_grid(study: Study, table: pd.DataFrame, spread: str, title: str, notes: list[str]) -> Grid:
    rows = []
    for label, group in table.groupby("label", sort=False):
        cells = []
        for _, row in group.iterrows():
            interval = study.record.compare and row["target"] == AVERAGE and spread == "_std"
            for metric in METRICS:
                wide, narrow = _with_interval(row, metric), _cell(row[metric], row[f"{metric}{spread}"])
                cells.append(wide if interval else narrow)
        rows.append([str(label), *cells])
    marks, among = _places(table)
    return Grid(title, metric_columns(study.targets), rows, notes, marks, among)


def _places(table: pd.DataFrame) -> tuple[Marks, str]:
    """The best means of every column, and among which rows: one that looked at the target competes with its like."""
    apart = (table["target_data"] != "False") & (table["target_data"] == "False").any()
    means = table[[*METRICS]].mask(apart)
    values = [own.to_numpy(float).ravel().tolist() for _, own in means.groupby(table["label"], sort=False)]
    return best_marks(values), "among rows that did not look at target images" if apart.any() else ""


def _gain_grid(study: Study, table: pd.DataFrame, kind: str, title: str) -> Grid:
    """Differences of one kind, `gain` or `step`; of rows with p, which says whether a part does anything."""
    rows = []
    for label, group in table[table[f"mAP_{kind}"].notna()].groupby("label", sort=False):
        for metric, name in METRICS.items():
            cells = (_gain(row, f"{metric}_{kind}", bool(study.record.rows)) for _, row in group.iterrows())
            rows.append([f"{label}, {name}", *cells])
    seeds = int(table["seeds"].max())
    interval = " [95% bootstrap interval]" if seeds > 1 else ""
    notes = []
    if 1 < seeds < _FEW_SEEDS:
        notes.append(f"An interval from {seeds} seeds is hardly more than their range: too few to call a gain certain")
    if study.record.rows and seeds > 1:
        notes.append("p: two-sided sign-flip test over the paired runs, Holm-corrected over the rows of a column")
    return Grid(
        f"{title}, paired by seed{interval}",
        [("", print_target(target)) for target in [*study.targets, AVERAGE]],
        rows,
        notes,
    )


def _cell(value: float, spread: float) -> str:
    return f"{value:.1f}" if np.isnan(spread) else f"{value:.1f}±{spread:.1f}"


def _with_interval(row: pd.Series, metric: str) -> str:
    mean, low, high = row[metric], row[f"{metric}_low"], row[f"{metric}_high"]
    return _cell(mean, np.nan) if np.isnan(low) else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _gain(row: pd.Series, column: str, tested: bool) -> str:
    mean, low, high, p = (row[f"{column}{end}"] for end in ("", "_low", "_high", "_p"))
    shown = f"{mean:+.1f}" if np.isnan(low) else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"{shown} p {p:.2g}" if tested and not np.isnan(p) else shown


def _csv(study: Study, table: pd.DataFrame, published: pd.DataFrame | None) -> str:
    """Every row carries its conditions, so that none can be taken for another kind of number."""
    incomplete = "; ".join(line for _, line in _incomplete(study, table))
    table = rows = table.assign(incomplete=incomplete, left_out=listed(study.flaws))
    if published is not None:
        where = published["source"].replace({POSTER: "the poster"})
        printed = published.assign(
            configuration="published", label=published["method"], data="real (printed on " + where + ")"
        )
        columns = ["configuration", "label", "target", "mAP", "rank1", "data", "note"]
        rows = pd.concat([table.astype({"seeds": "Int64"}), printed[columns]])
    return as_csv(rows, "%.3f")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/tables.py STUDY`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _tabulate(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python analysis/tables.py",
        description="Print a study's protocol table: mAP and Rank-1 per unseen target.",
    )
    parser.add_argument("study", type=existing_folder, help="folder of the study, for example runs/protocol3")
    parser.add_argument("--format", choices=FORMATS, default="text", help="how it is written (default: %(default)s)")
    parser.add_argument("--output", type=output_file, help="file to write (default: print it)")
    parser.add_argument("--published", action="store_true", help="add the poster's table, labelled as other data")
    return parser.parse_args(arguments)


def _tabulate(options: argparse.Namespace) -> None:
    study = load_study(options.study)
    tell(study.flaws)
    text = render(study, options.format, options.published)
    if options.output is None:
        print(text, end="")
    else:
        with atomic(options.output) as file:
            file.write(text)
        print(options.output)


if __name__ == "__main__":
    sys.exit(main())
