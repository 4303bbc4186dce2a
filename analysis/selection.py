"""Does a selection rule order runs rightly? Each rule's scores beside the target's mAP, over the runs of a study.

    python analysis/selection.py runs/selection [--output reports/selection]

Every unit records what every affordable rule says of it, so one study measures them all: Spearman's rho between rule
and target over configurations, and what the rule's pick costs. The target is looked at here and nowhere else: to judge
rules, never to choose a run.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from analysis.house_style import new_figure, save, style
from analysis.records import tell
from analysis.study import RULE, Study, load_study
from analysis.tables import data_line
from analysis.text_tables import Grid, as_csv, as_markdown, as_text
from lda.arguments import Parser, existing_folder, output_folder
from lda.command import exit_code
from lda.errors import UsageError
from lda.files import atomic

DEFAULTS = "trial-defaults"
"""Folder of the row that has the defaults, in a study of rows."""

_DRAWS = 2000
_FEWEST = 3  # configurations that a rank correlation is computed of


@dataclass(frozen=True)
class Runs:
    """What is compared: C configurations, each on T targets with the same S seeds.

    Attributes:
        names: folders of the configurations.
        labels: in print.
        methods: of each.
        seeds: S numbers.
        mAP: (C, T, S), of the target, percent.
        scores: rule -> (C, T, S), percent; a rule that some unit has no number of is left out.
    """

    names: list[str]
    labels: list[str]
    methods: list[str]
    seeds: list[int]
    mAP: NDArray[np.float64]  # noqa: N815 - the field's spelling
    scores: dict[str, NDArray[np.float64]]

    def of(self, chosen: Sequence[int]) -> Runs:
        """Some of the configurations, any of them several times."""
        own = list(chosen)
        return Runs(
            [self.names[i] for i in own],
            [self.labels[i] for i in own],
            [self.methods[i] for i in own],
            self.seeds,
            self.mAP[own],
            {rule: scores[own] for rule, scores in self.scores.items()},
        )


def read_runs(study: Study) -> Runs:
    """The configurations that are finished on every target and with as many seeds as the most complete of them.

    Raises UsageError for fewer than three.
    """
    finished = study.units[study.units["finished"].astype(bool) & study.units["target"].isin(study.targets)]
    wide = {
        str(name): own.pivot_table(index="target", columns="seed", aggfunc="first").reindex(study.targets)
        for name, own in finished.groupby("trial")
    }
    seeds = {name: set(own["mAP"].dropna(axis="columns").columns) for name, own in wide.items()}
    most = max(map(len, seeds.values()), default=0)
    names = [name for name, own in seeds.items() if own and len(own) == most]
    common = sorted(set.intersection(*(seeds[name] for name in names))) if names else []
    if len(names) < _FEWEST or not common:
        raise UsageError(f"{study.folder}: {len(names)} configurations are finished, {_FEWEST} or more are needed")

    def cube(column: str) -> NDArray[np.float64]:
        return np.stack([100 * wide[name][column].reindex(columns=common).to_numpy(float) for name in names])

    rules = [str(column) for column in finished if str(column).startswith(RULE)]
    scores = {rule.removeprefix(RULE): cube(rule) for rule in rules}
    methods = [str(finished.loc[finished["trial"] == name, "method"].iloc[0]) for name in names]
    whole = {rule: values for rule, values in scores.items() if not np.isnan(values).any()}
    return Runs(names, [study.title_of(name) or name for name in names], methods, common, cube("mAP"), whole)


# --- how good a rule is ----------------------------------------------------------------------------------------------


def rho(runs: Runs, rule: str) -> float:
    """Spearman's rho of a rule and the target's mAP over configurations, seeds averaged; mean over targets."""
    ranks = [stats.rankdata(values.mean(2), axis=0) for values in (runs.scores[rule], runs.mAP)]
    a, b = (rank - rank.mean(0) for rank in ranks)
    scale = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    # One configuration that is drawn again and again, or a rule that says the same of all, orders nothing.
    return float(np.mean(np.divide((a * b).sum(0), scale, out=np.zeros_like(scale), where=scale > 0)))


def picked(runs: Runs, rule: str) -> NDArray[np.float64]:
    """(S,): the target mAP of what the rule picks by each seed, mean over targets, on the other seeds: what the
    confirmation would find. With one seed it is that one's."""
    scores, found = runs.scores[rule].mean(1), runs.mAP.mean(1)
    choices = scores.argmax(0)
    seeds = found.shape[1]
    others = [[s for s in range(seeds) if s != seed] or [seed] for seed in range(seeds)]
    return np.array([found[choice, own].mean() for choice, own in zip(choices, others, strict=True)])


def regret(runs: Runs, rule: str) -> float:
    """How far the pick is below the configuration that is best on all seeds, in points of mAP; seeds averaged."""
    return float(runs.mAP.mean((1, 2)).max() - picked(runs, rule).mean())


def gain(runs: Runs, rule: str, defaults: float) -> float:
    """How far the pick is above the defaults, whose mAP over targets and seeds is given."""
    return float(picked(runs, rule).mean() - defaults)


def interval(values: Sequence[float]) -> str:
    """The middle 95%."""
    low, high = np.percentile(values, [2.5, 97.5])
    return f"[{low:+.2f}, {high:+.2f}]" if max(abs(low), abs(high)) <= 1 else f"[{low:+.1f}, {high:+.1f}]"


def table(study: Study, runs: Runs) -> Grid:
    """A row per rule: rho over all configurations and over one method's, what its pick loses and gains, with 95%
    bootstrap intervals, which draw configurations."""
    main = most_frequent(runs)
    own = [index for index, method in enumerate(runs.methods) if method == main]
    defaults = _defaults(study, runs)
    whole, within = _bootstrapped(runs), _bootstrapped(runs.of(own))

    def cell(sample: list[Runs], measure: Callable[[Runs], float], decimals: str) -> str:
        first, *draws = map(measure, sample)
        return f"{first:{decimals}} {interval(draws)}"

    rows = []
    for rule in runs.scores:
        ordering, losing = functools.partial(rho, rule=rule), functools.partial(regret, rule=rule)
        rows.append(
            [
                rule,
                cell(whole, ordering, "+.2f"),
                cell(within, ordering, "+.2f") if len(own) >= _FEWEST else "-",
                cell(whole, losing, ".1f"),
                "-" if defaults is None else cell(whole, functools.partial(gain, rule=rule, defaults=defaults), "+.1f"),
            ]
        )
    configurations, targets, seeds = runs.mAP.shape
    columns = [
        ("Spearman's rho with the target's mAP", f"all {configurations} configurations"),
        ("Spearman's rho with the target's mAP", f"{len(own)} of {main}"),
        ("mAP of its pick", "below the best"),
        ("mAP of its pick", "above the defaults"),
    ]
    notes = [
        f"{configurations} configurations, {targets} targets, {seeds} seed(s); 95% bootstrap intervals, drawn over "
        "configurations",
        "rho: seeds averaged, per target, mean over targets. A pick is made by one seed and measured on the others",
        "oracle looks at the target: what a rule could reach at most, and what noise of seeds leaves of it",
    ]
    return Grid("How well each selection rule orders runs", columns, rows, notes)


def _bootstrapped(runs: Runs) -> list[Runs]:
    """The runs, then so many draws of their configurations, with replacement."""
    count = len(runs.names)
    draws = np.random.default_rng(0).integers(count, size=(_DRAWS, count)).tolist()
    return [runs, *map(runs.of, draws)]


def _defaults(study: Study, runs: Runs) -> float | None:
    """mAP of the defaults over targets and seeds; None where they are not among the runs."""
    trial = study.default_trial() if not study.record.compare else None
    name = DEFAULTS if trial is None else str(trial["name"])
    return float(runs.mAP[runs.names.index(name)].mean()) if name in runs.names else None


def most_frequent(runs: Runs) -> str:
    """The method that most configurations are of: whose settings a search would choose among."""
    return Counter(runs.methods).most_common(1)[0][0]


def values(study: Study, runs: Runs) -> pd.DataFrame:
    """What everything here is computed of: a line per configuration, target and seed, percent."""
    lines = [
        {
            "configuration": name,
            "label": runs.labels[c],
            "method": runs.methods[c],
            "target": target,
            "seed": seed,
            "mAP": runs.mAP[c, t, s],
            **{rule: scores[c, t, s] for rule, scores in runs.scores.items()},
        }
        for c, name in enumerate(runs.names)
        for t, target in enumerate(study.targets)
        for s, seed in enumerate(runs.seeds)
    ]
    return pd.DataFrame(lines)


# --- the picture -----------------------------------------------------------------------------------------------------


def selection_figure(study: Study, runs: Runs) -> Figure:
    """A panel per rule: its score against the target's mAP, a mark per configuration, targets and seeds averaged."""
    rules = list(runs.scores)
    figure, panels = new_figure(1, len(rules), width=1.0 + 2.6 * len(rules), height=3.0)
    main = most_frequent(runs)
    own = np.array([method == main for method in runs.methods])
    found = runs.mAP.mean((1, 2))
    with style():
        for axes, rule in zip(panels[0], rules, strict=True):
            scores = runs.scores[rule].mean((1, 2))
            if not own.all():
                axes.plot(scores[~own], found[~own], "s", color="#d55e00", markersize=5, label="another method")
            axes.plot(scores[own], found[own], "o", color="#0173b2", markersize=5, label=main)
            axes.set_title(f"{rule}, rho {rho(runs, rule):+.2f}")
            axes.set_xlabel("score, %")
        panels[0][0].set_ylabel("mAP on the unseen target, %")
        panels[0][0].legend(loc="best")
        figure.suptitle(f"Study {study.name} ({study.data} data), means over targets and {len(runs.seeds)} seed(s)")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/selection.py STUDY`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _judge(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python analysis/selection.py",
        description="Judge a study's selection rules by what they say of runs and what the unseen target says.",
    )
    parser.add_argument("study", type=existing_folder, help="folder of the study, for example runs/selection")
    parser.add_argument("--output", type=output_folder, help="folder for selection.md, .csv, .png and .pdf")
    return parser.parse_args(arguments)


def _judge(options: argparse.Namespace) -> None:
    study = load_study(options.study)
    tell(study.flaws)
    runs = read_runs(study)
    grid = table(study, runs)
    title, facts = f"Selection rules, study {study.name}", [("data", data_line(study.data))]
    print(as_text(title, facts, [grid]), end="")
    if options.output is None:
        return
    folder: Path = options.output
    figure = selection_figure(study, runs)
    for kind in ("png", "pdf"):
        save(figure, folder / f"selection.{kind}")
    texts = {"selection.md": as_markdown(title, facts, [grid]), "selection.csv": as_csv(values(study, runs), "%.3f")}
    for name, text in texts.items():
        with atomic(folder / name) as file:
            file.write(text)
        print(folder / name)


if __name__ == "__main__":
    sys.exit(main())
