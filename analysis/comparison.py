"""A study's numbers: the means, spreads and gains that its tables show.

Once the search was confirmed on fresh seeds, only the fresh runs count: the search's own scores are what it chose by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.records import listed
from analysis.study import METRIC_NAMES, Study, load_study, print_name
from lda.errors import FailedError, UsageError
from lda.runs import print_method

METRICS = {metric: METRIC_NAMES[metric] for metric in ("mAP", "rank1")}
"""Metric of a table -> its name in print."""

AVERAGE = "average"
"""The target that stands for the mean over targets."""

CONTROL = "baseline"
"""The method that the others' gains are measured against, where a study compares several."""

BASELINE = "trial-baseline"
"""Folder of the baseline, where a study is of one method."""

CONDITIONS = (
    *("data", "target_data", "selection", "inference", "average_precision", "flip_test", "reranking"),
    *("cuhk03_boxes", "cuhk03_protocol", "code", "torch"),
)
"""What must agree between numbers that are compared."""

BETWEEN = " | "
"""Stands between the values of a condition where the runs of one row differ in it."""


def protocol_table(study: Study | Path) -> pd.DataFrame:
    """The study's results, one row per configuration and target and one for its average over targets.

    Columns:
        configuration (baseline, default, best; confirmed for further trials that were rerun), label, method (in print,
        marked as in `lda.runs.print_method`), reconstructed (what of the method is), reference (its paper),
        trial, target, seeds (how many), confirmed (fresh seeds, not the search's own), score (selection score,
        percent);
        mAP, rank1: percent, mean over seeds, with mAP_std, rank1_std their sample standard deviation, and mAP_low,
        mAP_high and so on the ends of their 95% bootstrap interval;
        splits: test splits behind each run, with mAP_split_std, rank1_split_std the standard deviation over them, mean
        over seeds; missing for the average and for targets with one official query and gallery;
        mAP_gain, rank1_gain: points above the baseline, mean of the differences paired by seed, with
        mAP_gain_low, mAP_gain_high and so on the ends of the 95% bootstrap interval; missing without a baseline;
        mAP_gain_p and so on: two-sided p of these differences by `sign_flip_p`, of studies of rows Holm-corrected over
        them; mAP_step, mAP_step_low, mAP_step_high, mAP_step_p and so on: the same against the row above, of studies
        of rows alone;
        train_passes, test_forwards: passes through the plain network per image, mean over runs; see `lda.runs.Cost`;
        steps, images_per_second, seconds (of a run, wall clock), parameters, pair_cost (missing where vectors are
        compared): mean over runs;
        test: how images are compared, and `CONDITIONS`: the conditions of the runs.
    Spreads and intervals are missing with one seed.

    Raises UsageError when no configuration is complete yet, FailedError when none is left of a damaged study.
    """
    study = study if isinstance(study, Study) else load_study(study)
    configurations = _configurations(study)
    baseline = next((c for c in configurations if c.kind == "baseline"), None)
    rows = []
    above = None
    for configuration in configurations:
        paired = baseline if configuration.kind != "baseline" else None
        about = {key: getattr(configuration, key) for key in _ABOUT}
        about["configuration"] = configuration.kind
        seeds = {"seeds": configuration.runs["seed"].nunique(), "confirmed": configuration.confirmed}
        for target in [*study.targets, AVERAGE]:
            targets = study.targets if target == AVERAGE else [target]
            statistics = {
                "score": configuration.percent("score", targets).mean(),
                "splits": configuration.splits(targets),
                **configuration.costs(targets),
            }
            for metric in METRICS:
                own = configuration.percent(metric, targets)
                statistics |= _statistics(metric, own)
                if paired is not None:
                    statistics |= _difference(f"{metric}_gain", own - paired.percent(metric, targets))
                if above is not None:
                    statistics |= _difference(f"{metric}_step", own - above.percent(metric, targets))
                if target != AVERAGE:
                    statistics[f"{metric}_split_std"] = configuration.percent(f"{metric}_std", targets).mean()
            rows.append({**about, "target": target, **seeds, **statistics, **configuration.conditions()})
        above = configuration if study.record.rows else None
    table = pd.DataFrame(rows, columns=list(_COLUMNS))
    return _holm_corrected(table) if study.record.rows else table


def counted_runs(study: Study) -> pd.DataFrame:
    """The runs behind `protocol_table`: rows of `Study.units` with configuration and label, in the table's order.

    Raises as `protocol_table` does.
    """
    parts = [c.runs.assign(configuration=c.kind, label=c.label) for c in _configurations(study)]
    return pd.concat(parts, ignore_index=True)


def seed_table(study: Study) -> pd.DataFrame:
    """One row per configuration, target (or average over them) and seed: configuration, label, target, seed; mAP,
    rank1 in percent. Raises as `protocol_table` does."""
    keys, metrics = ["configuration", "label"], list(METRICS)
    runs = counted_runs(study)
    runs = runs.assign(**{metric: 100 * runs[metric].astype(float) for metric in metrics})
    average = runs.groupby([*keys, "seed"], sort=False, as_index=False)[metrics].mean().assign(target=AVERAGE)
    return pd.concat([runs, average], ignore_index=True)[[*keys, "target", "seed", *metrics]]


def _holm_corrected(table: pd.DataFrame) -> pd.DataFrame:
    """The p of every kind of difference, corrected over the rows of each target."""
    for column in (f"{metric}_{kind}_p" for metric in METRICS for kind in ("gain", "step")):
        table[column] = table.groupby("target")[column].transform(lambda ps: holm(ps.to_numpy(float)))
    return table


_ABOUT = ("label", "method", "reconstructed", "reference", "trial")
_COSTS = ("train_passes", "test_forwards", "steps", "images_per_second", "seconds", "parameters", "pair_cost")
_KINDS = (
    *("", "_std", "_low", "_high", "_split_std"),
    *(f"_{kind}{end}" for kind in ("gain", "step") for end in ("", "_low", "_high", "_p")),
)
_COLUMNS = (
    *("configuration", *_ABOUT, "target", "seeds", "confirmed", "score", "splits"),
    *(f"{m}{kind}" for m in METRICS for kind in _KINDS),
    *(*_COSTS, "test"),
    *CONDITIONS,
)


def _statistics(metric: str, own: NDArray[np.float64]) -> dict[str, float]:
    """Mean and spread of (T, S) runs; the spread is that of the seeds' means over targets."""
    per_seed = own.mean(axis=0)
    found = {metric: per_seed.mean(), f"{metric}_std": per_seed.std(ddof=1) if len(per_seed) > 1 else np.nan}
    found[f"{metric}_low"], found[f"{metric}_high"] = bootstrap_interval(own)
    return found


def _difference(name: str, pairs: NDArray[np.float64]) -> dict[str, float]:
    """Mean of (T, S) differences paired by target and seed, its interval, and p."""
    low, high = bootstrap_interval(pairs)
    return {name: pairs.mean(), f"{name}_low": low, f"{name}_high": high, f"{name}_p": sign_flip_p(pairs)}


def bootstrap_interval(pairs: NDArray[np.float64], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `pairs` (T targets, S seeds), resampling seeds within each target.

    (nan, nan) with one seed: one run says nothing about its spread.
    """
    targets, seeds = pairs.shape
    if seeds < 2:
        return np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(seeds, size=(draws, targets, seeds))
    means = np.take_along_axis(pairs[None], drawn, axis=2).mean(axis=(1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def sign_flip_p(pairs: NDArray[np.float64], draws: int = 2**15) -> float:
    """Two-sided p of paired differences: how often their mean is as far from 0 when signs are drawn at random, exactly
    for up to 15 pairs. With n pairs it is never below 2 / 2^n: five seeds of one target cannot reach 0.05."""
    if pairs.size < 2:
        return np.nan
    found = stats.permutation_test(
        (pairs.ravel(),), np.mean, permutation_type="samples", n_resamples=draws, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)


def holm(ps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's correction of p values for asking so many questions at once; nan stays nan and counts as none."""
    asked = np.flatnonzero(~np.isnan(ps))
    order = asked[np.argsort(ps[asked])]
    corrected = np.full(len(ps), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(ps[order] * np.arange(len(order), 0, -1)), 1.0)
    return corrected


def print_target(target: str) -> str:
    """A target in the head of a table."""
    return "Average" if target == AVERAGE else print_name(target)


def metric_columns(targets: Sequence[str]) -> list[tuple[str, str]]:
    """Heads of a table's columns: every metric of every target and of their average."""
    return [(print_target(target), name) for target in [*targets, AVERAGE] for name in METRICS.values()]


@dataclass(frozen=True)
class _Configuration:
    """One row of the table: a trial and those of its runs that count."""

    kind: str
    label: str
    method: str
    reconstructed: str
    reference: str
    trial: str
    confirmed: bool
    runs: pd.DataFrame

    def percent(self, metric: str, targets: Sequence[str]) -> NDArray[np.float64]:
        """Every run's value, (T targets, S seeds)."""
        wide = self.runs.pivot(index="target", columns="seed", values=metric)
        values: NDArray[np.float64] = 100 * wide.loc[list(targets)].to_numpy(float)
        return values

    def splits(self, targets: Sequence[str]) -> int:
        """Test splits of a run, the most among `targets`."""
        return int(self.runs.loc[self.runs["target"].isin(targets), "num_splits"].max())

    def costs(self, targets: Sequence[str]) -> dict[str, float]:
        """What an image and a run cost, mean over runs."""
        runs = self.runs[self.runs["target"].isin(targets)]
        return {key: float(runs[key].mean()) for key in _COSTS}

    def conditions(self) -> dict[str, str]:
        """The value of every condition among the runs; several `BETWEEN` each other where someone mixed them."""
        return {key: BETWEEN.join(sorted({str(value) for value in self.runs[key]})) for key in ("test", *CONDITIONS)}


def _configurations(study: Study) -> list[_Configuration]:
    """The rows, all on the same seeds and on every target.

    Fresh seeds come first: those that baseline, defaults and best have all finished. Without any, the search's own.
    """
    finished = study.units[study.units["finished"].astype(bool) & study.units["target"].isin(study.targets)]
    for fresh in (True, False):
        runs = finished[finished["confirms"].astype(bool) == fresh]
        seeds = {str(name): _complete_seeds(own, study.targets) for name, own in runs.groupby("trial")}
        main = main_trials(study)
        # The baseline takes no part in the search: it may have no run on the search's seed. And where methods are
        # compared, one that has nothing yet does not keep the others waiting.
        if not fresh or study.record.compare:
            main = [(kind, trial) for kind, trial in main if seeds.get(trial["name"])]
        common = set.intersection(*(seeds.get(trial["name"], set()) for _, trial in main)) if main else set()
        if common:
            further = _further_trials(study, seeds, main, common) if fresh and not study.record.compare else []
            chosen = main + further
            counted = runs[runs["seed"].isin(common)]
            return [
                _configuration(study, kind, trial, counted[counted["trial"] == trial["name"]], fresh)
                for kind, trial in chosen
            ]
    states = study.trials["state"].value_counts().sort_index()
    counts = ", ".join(f"{count} {state}" for state, count in states.items()) or "none started"
    line = f"{study.folder}: no trial has finished every target yet (trials: {counts})"
    if left_out := listed(study.flaws):
        raise FailedError(f"{line}; left out: {left_out}")
    raise UsageError(line)


def _complete_seeds(runs: pd.DataFrame, targets: Sequence[str]) -> set[int]:
    """Seeds on which every target is finished."""
    return {seed for seed, own in runs.groupby("seed") if set(own["target"]) == set(targets)}


def main_trials(study: Study) -> list[tuple[str, pd.Series]]:
    """The trials that a table is about, each with its configuration (baseline, default, best)."""
    if study.record.compare:
        return [row for name in study.record.compare for row in _trials_of(study, name)]
    default = study.default_trial()
    if default is not None and default["state"] != "complete":
        default = None
    chosen = [("baseline", study.baseline_trial()), ("default", default), ("best", study.best_searched_trial())]
    return [(kind, trial) for kind, trial in chosen if trial is not None]


def _trials_of(study: Study, method: str) -> list[tuple[str, pd.Series]]:
    """Of a method that is compared: its defaults, then the best of what was searched."""
    trials = study.trials_of(method)
    kind = "baseline" if method == CONTROL else "default"
    found = [(kind, trial) for _, trial in trials[trials["origin"] != "search"].head(1).iterrows()]
    searched = trials[(trials["origin"] == "search") & (trials["state"] == "complete")]
    best = searched.sort_values("score", ascending=False, kind="stable").head(1)
    return found + [("best", trial) for _, trial in best.iterrows()]


def confirmation(study: Study) -> dict[str, tuple[int, int]]:
    """What should be rerun on fresh seeds (a trial's name, or a method's) -> its reruns that are finished, and all.

    Empty for a study that confirms nothing. The best are those of the trials that are complete by now.
    """
    seeds, confirms = study.record.confirm_seeds, study.units["confirms"].astype(bool)
    counted = study.units["finished"].astype(bool) & study.units["target"].isin(study.targets)
    done = study.units[confirms & counted & study.units["seed"].isin(seeds)].groupby("trial").size()
    each = len(seeds) * len(study.targets)
    return {name: (int(done.get(name, 0)), each) for name in _to_confirm(study)} if seeds else {}


def _to_confirm(study: Study) -> list[str]:
    best = {"search": study.record.confirm.top, "default": 1, "baseline": 1}
    if study.record.compare:
        groups = {method: study.trials_of(method) for method in study.record.compare}
        groups = {
            method: trials[(trials["origin"] != "search") | (trials["state"] == "complete")]
            for method, trials in groups.items()
        }
    else:
        control = set(study.units.loc[~study.units["confirms"].astype(bool), "method"]) == {CONTROL}
        groups = {} if control else {BASELINE: study.trials[study.trials["origin"] == "baseline"]}
        groups[""] = study.trials[(study.trials["state"] == "complete") & (study.trials["origin"] != "baseline")]
    names: list[str] = []
    for missing, trials in groups.items():
        ranked = trials.sort_values("score", ascending=False, kind="stable")
        by_origin = [ranked[ranked["origin"] == origin]["name"][:count] for origin, count in best.items()]
        found = [str(name) for names_of_one in by_origin for name in names_of_one]
        names += found or [missing] * bool(missing)
    return names


def _further_trials(
    study: Study, seeds: dict[str, set[int]], main: list[tuple[str, pd.Series]], common: set[int]
) -> list[tuple[str, pd.Series]]:
    """Trials beside the main ones that were confirmed on the same seeds."""
    names = {name for name, own in seeds.items() if common <= own} - {trial["name"] for _, trial in main}
    return [("confirmed", trial) for _, trial in study.trials[study.trials["name"].isin(names)].iterrows()]


def _configuration(study: Study, kind: str, trial: pd.Series, runs: pd.DataFrame, fresh: bool) -> _Configuration:
    first = runs.iloc[0]
    method = print_method(first["title"], first["reconstructed"], bool(runs["target_data"].any()))
    about = (first["reconstructed"], first["reference"], str(trial["name"]))
    return _Configuration(kind, _label(study, kind, trial, method, first["method"]), method, *about, fresh, runs)


def _label(study: Study, kind: str, trial: pd.Series, title: str, method: str) -> str:
    if (row := study.title_of(str(trial["name"]))) is not None:
        return row
    if study.record.compare:
        return f"{title}, best of {len(study.trials_of(method))}" if kind == "best" else title
    searched = int((study.trials["origin"] != "baseline").sum())
    number = "" if kind == "baseline" else f"trial {int(trial['number'])}"
    return {
        "baseline": f"baseline, {title}",
        "default": f"{title}, defaults ({number})",
        "best": f"{title}, best of {searched} ({number})",
        "confirmed": f"{title}, {number}",
    }[kind]
