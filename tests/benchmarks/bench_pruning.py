"""What pruning saves and what it loses: a recorded study replayed in many orders under several rules.

    python sweeps/run.py --study tests/benchmarks/pruning.yaml
    python tests/benchmarks/bench_pruning.py runs/pruning [--orders 200] [--output reports/pruning.md]

Every complete trial of the study is one recorded search: its source validations within each unit (metrics.jsonl), its
units' scores and seconds. An order is the defaults first and the rest shuffled; the replay reports to Optuna what the
worker would report, in one worker's order, and ends a trial where the rule says so. Three searches are compared:

    no pruning        every trial to its end
    pruning           the rule of the row
    random, cut off   no pruning, ended when it has spent what pruning spent: the honest rival at equal budget

"Lost" is the best score of all trials minus the best complete trial's, in points.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from sweeps.plan.pruning import build_pruner, running_mean
from sweeps.plan.spec import Pruning

RULES = [
    Pruning(rule="percentile", percentile=percentile, startup_trials=startup, warmup_units=warmup)
    for percentile in (25.0, 50.0, 75.0)
    for startup in (4,)
    for warmup in (0, 1, 2)
]


@dataclass(frozen=True)
class Unit:
    """One recorded unit: source validations (epoch, score) before its end, its score, its seconds."""

    curve: tuple[tuple[int, float], ...]
    score: float
    seconds: float


@dataclass(frozen=True)
class Recorded:
    """One complete trial: target -> unit, in the study's order."""

    default: bool
    units: dict[str, Unit]

    @property
    def score(self) -> float:
        """What the search compares."""
        return statistics.fmean(unit.score for unit in self.units.values())

    @property
    def seconds(self) -> float:
        """What it cost."""
        return sum(unit.seconds for unit in self.units.values())


def read_study(folder: Path) -> tuple[list[Recorded], int]:
    """(complete trials, epochs of a unit)."""
    study = json.loads((folder / "study.json").read_text())
    trials, epochs = [], 0
    for path in sorted(folder.glob("trial-*/trial.json")):
        trial = json.loads(path.read_text())
        if trial["state"] != "complete" or trial["origin"] == "baseline":
            continue
        units = {}
        for target in study["targets"]:
            unit = path.parent / f"{target}-s{study['seed']}"
            epochs = json.loads((unit / "config.json").read_text())["config"]["epochs"]
            units[target] = _unit(unit, epochs)
        trials.append(Recorded(trial["origin"] == "default", units))
    if not any(trial.default for trial in trials):
        raise SystemExit(f"{folder}: the trial of the defaults is not complete")
    return trials, epochs


def _unit(folder: Path, epochs: int) -> Unit:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = tuple((row["epoch"], row["val/mAP"]) for row in rows if "val/mAP" in row and row["epoch"] < epochs)
    result = json.loads((folder / "result.json").read_text())
    return Unit(curve, result["selection"]["score"], result["seconds"])


def replay(order: Sequence[Recorded], epochs: int, rule: Pruning) -> tuple[float, float, int]:
    """(best score of a complete trial, seconds spent, trials pruned) of a search in this order under a rule."""
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.RandomSampler(0), pruner=build_pruner(rule, epochs)
    )
    defaults = {target: unit.score for target, unit in order[0].units.items()}
    best, spent, pruned = 0.0, 0.0, 0
    for recorded in order:
        trial = study.ask()
        seconds, complete = _replay_trial(trial, recorded, epochs, defaults)
        spent += seconds
        if complete:
            study.tell(trial, recorded.score)
            best = max(best, recorded.score)
        else:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            pruned += 1
    return best, spent, pruned


def _replay_trial(
    trial: optuna.Trial, recorded: Recorded, epochs: int, defaults: dict[str, float]
) -> tuple[float, bool]:
    """(seconds until its end or until it was pruned, whether it was complete)."""
    targets, scores, spent = list(recorded.units), dict[str, float](), 0.0
    for index, (target, unit) in enumerate(recorded.units.items()):
        for epoch, score in (*unit.curve, (epochs, unit.score)):
            value = running_mean(targets, {**scores, target: score}, defaults)
            assert value is not None
            trial.report(value, index * epochs + epoch)
            if trial.should_prune():
                return spent + unit.seconds * epoch / epochs, False
        scores[target] = unit.score
        spent += unit.seconds
    return spent, True


def cut_off(order: Sequence[Recorded], seconds: float) -> float:
    """Best score of the trials that fit into `seconds`, without pruning."""
    best, spent = 0.0, 0.0
    for recorded in order:
        spent += recorded.seconds
        if spent > seconds and best:
            break
        best = max(best, recorded.score)
    return best


def compare(trials: list[Recorded], epochs: int, orders: int, seed: int = 0) -> list[str]:
    """Rows of the table: the mean over orders, and the share of orders in which the best trial was lost."""
    draw = random.Random(seed)
    first, rest = [t for t in trials if t.default], [t for t in trials if not t.default]
    shuffled = [first + draw.sample(rest, len(rest)) for _ in range(orders)]
    top, everything = max(trial.score for trial in trials), sum(trial.seconds for trial in trials)
    lines = []
    for rule in RULES:
        found = [replay(order, epochs, rule) for order in shuffled]
        rival = [top - cut_off(order, spent) for order, (_, spent, _) in zip(shuffled, found, strict=True)]
        lost = [top - best for best, _, _ in found]
        saved = [1 - spent / everything for _, spent, _ in found]
        cells = [
            f"{rule.percentile:.0f}%",
            str(rule.warmup_units),
            f"{statistics.fmean(pruned for *_, pruned in found):.1f} of {len(trials)}",
            f"{statistics.fmean(saved):.0%}",
            f"{100 * statistics.fmean(lost):.2f}",
            f"{statistics.fmean(value > 0 for value in lost):.0%}",
            f"{100 * statistics.fmean(rival):.2f}",
            f"{statistics.fmean(value > 0 for value in rival):.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the recorded study")
    parser.add_argument("--orders", type=int, default=200, help="shuffles (default: %(default)s)")
    parser.add_argument("--best", type=int, metavar="N", help="replay the defaults and the best N only: a harder space")
    parser.add_argument("--output", type=Path, help="file of the table (default: print it)")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials, epochs = read_study(given.study)
    if given.best is not None:
        ranked = sorted(trials, key=lambda trial: -trial.score)[: given.best]
        trials = [trial for trial in trials if trial.default or trial in ranked]
    scores, seconds = sorted(trial.score for trial in trials), sum(trial.seconds for trial in trials)
    lines = [
        f"{len(trials)} complete trials of {given.study.name}, {given.orders} orders. Scores from {scores[0]:.2%} to "
        f"{scores[-1]:.2%}, median {statistics.median(scores):.2%}; all of them took {seconds:.0f} s.",
        "",
        "| keep the top | warm-up units | pruned | compute saved | points lost | orders that lost the best "
        "| random at equal budget: points lost | orders that lost the best |",
        "|---|---|---|---|---|---|---|---|",
        *compare(trials, epochs, given.orders),
    ]
    text = "\n".join(lines) + "\n"
    if given.output:
        given.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
