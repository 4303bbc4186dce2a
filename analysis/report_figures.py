"""The figures of a report by section, each with the numbers behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd

from analysis import buffer_bank, study_figures
from analysis.bank_numbers import choose_layers, closest_pairs, domain_distances
from analysis.comparison import seed_table
from analysis.cost_figure import cost_figure, cost_table, differing
from analysis.importance import importance_figure, importances
from analysis.methods_figure import methods_figure
from analysis.query_figures import cmc_figure, cmc_table, differences, differences_figure
from analysis.records import listed
from analysis.rule_figure import rule_figure, scored
from analysis.study import Study, metrics_flaws, print_name
from lda.errors import FailedError, UsageError, warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: of its files, <name>.png, .pdf and .csv.
        figure: it.
        caption: what to see, and what not to.
        numbers: what is drawn.
        command: what makes figure and numbers again, with the study's folder behind it.
    """

    name: str
    figure: Figure
    caption: str
    numbers: pd.DataFrame
    command: str = "python analysis/report.py"


SECTIONS = {
    "results": "Results",
    "queries": "Query by query",
    "selection": "Can the selection score be trusted?",
    "search": "The search",
    "training": "Training",
    "bank": "Buffer Bank",
}
"""Section of a report that has figures -> its title, in their order."""


def pictures(study: Study) -> dict[str, list[Picture]]:
    """Section -> every figure that the study has the files for; captions say what is left out."""
    left_out = listed([*study.flaws, *metrics_flaws(study)])
    more = f" Left out: {left_out}." if left_out else ""
    makers = {
        "results": _results,
        "queries": _queries,
        "selection": _selection,
        "search": _search,
        "training": _training,
        "bank": _bank,
    }
    return {
        section: [replace(picture, caption=picture.caption + more) for picture in makers[section](study)]
        for section in SECTIONS
    }


def _results(study: Study) -> Iterator[Picture]:
    try:
        figure = methods_figure(study)
    except (UsageError, FailedError):  # nothing is complete yet; the page says so where its tables would be
        return
    caption = (
        "mAP of every configuration, its 95% interval and its seeds as dots; dashed: the plain baseline. A hollow "
        "mark: the method looked at target images."
    )
    yield Picture("results", figure, caption, seed_table(study))
    costs = cost_table(study)
    if differing(costs):
        caption = "mAP on the average of the targets against what it cost, where configurations differ in that."
        yield Picture("cost", cost_figure(study), caption, costs, "python analysis/cost_figure.py")


def _queries(study: Study) -> Iterator[Picture]:
    try:
        curves, gaps = cmc_figure(study), differences_figure(study)
    except (UsageError, FailedError):
        return
    if curves is not None:
        caption = "Share of queries with a match among the first ranks; bands go from the least seed to the most."
        yield Picture("cmc", curves, caption, cmc_table(study))
    if gaps is not None:
        caption = (
            "AP of a query minus that of the same query with the baseline, same seed: how many gained and lost how "
            "much, which two means do not say."
        )
        yield Picture("queries", gaps, caption, differences(study))


def _selection(study: Study) -> Iterator[Picture]:
    figure = rule_figure(study)
    if figure is not None:
        caption = (
            "Every configuration by its selection score and its mAP on the unseen targets, which chose nothing. A rule "
            "that orders runs rightly has a rho near 1."
        )
        yield Picture("selection", figure, caption, scored(study))


def _search(study: Study) -> Iterator[Picture]:
    if study.record.compare:
        return
    if study.trials["state"].eq("complete").any():
        caption = "Selection score of the search's trials, in the order they were begun; some end early, without one."
        yield Picture("history", study_figures.history_figure(study), caption, study_figures.history(study))
    if (figure := study_figures.parameter_figure(study)) is not None:
        caption = "Selection score over the value of each swept setting. Settings vary together: a trend is no proof."
        numbers = pd.concat(
            study_figures.parameter_scores(study, name).assign(setting=name) for name in study_figures.parameters(study)
        )
        yield Picture("parameters", figure, caption, numbers)
    if (importance := importance_figure(study)) is not None:
        caption = (
            "Share of each swept setting in the spread of the selection score, by two evaluators of Optuna. From few "
            "trials, and where the two disagree, it says little."
        )
        yield Picture("importance", importance, caption, importances(study))


def _training(study: Study) -> Iterator[Picture]:
    captions = {
        "training": (study_figures.CURVES, "Training: the mean over runs, in a band from the least to the most."),
        "features": (
            study_figures.FEATURES,
            "What features do in training: statistics also match when features shrink, and features may collapse.",
        ),
    }
    for name, (curves, caption) in captions.items():
        if (figure := study_figures.training_figure(study, curves, name)) is not None:
            numbers = study_figures.training_curves(study)
            yield Picture(name, figure, caption, numbers[numbers["curve"].isin(curves)])


def _bank(study: Study) -> Iterator[Picture]:
    if not buffer_bank.units_with_bank(study):  # its methods keep none, or no unit is finished
        return
    try:
        source = buffer_bank.open_source(study.folder)
    except FailedError as error:  # all are damaged
        warn(str(error))
        return
    captions = {"buffer_bank": f"Buffer Bank statistics of the source domains: {source.title}."}
    if len(source.bank.domains) > 1:
        first, second, _ = closest_pairs(domain_distances(source.bank))[0]
        closest = f"{print_name(first)} and {print_name(second)} are closest"
        captions["buffer_bank_distances"] = f"Distances between the source domains; {closest}."
        captions["buffer_bank_pairs"] = "Which domains are alike: as a tree, layer by layer, and over training."
    numbers = buffer_bank.bank_numbers(source.bank)
    for name, figure in buffer_bank.bank_figures(source, choose_layers(source.bank)).items():
        yield Picture(name, figure, captions[name], numbers[name], "python analysis/buffer_bank.py")
