"""The poster's figure: Buffer Bank statistics of every source domain, and how far the domains are apart.

    python analysis/buffer_bank.py runs/protocol3

Writes buffer_bank.png and .pdf (curves of some channels), buffer_bank.csv (all statistics),
buffer_bank_distances.png, .pdf and .csv (2-Wasserstein distance of every pair of domains), and of three domains or more
buffer_bank_pairs.png, .pdf and .csv (the domains as a tree, their distances over layers and over training).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.bank_numbers import (
    STATISTICS,
    Bank,
    channel_curves,
    choose_layers,
    closest_pairs,
    domain_distances,
    read_bank,
)
from analysis.bank_pairs import closeness, named_pair, pairs_figure, pairs_of_layers
from analysis.house_style import colour, marker, new_figure, save, style
from analysis.records import tell
from analysis.study import Study, load_study, print_name
from analysis.text_tables import as_csv
from lda.arguments import Parser, checked, existing_folder, output_folder, whole
from lda.command import exit_code
from lda.errors import FailedError, UsageError, unknown, warn
from lda.files import atomic, damage_of_zip
from lda.runs import BUFFER_BANK, UnitFolder, is_unit, read_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# --- what to draw ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The bank of one unit and where it is from."""

    bank: Bank
    unit: Path
    title: str


def open_source(run_or_study: Path, unit: str | None = None) -> Source:
    """The bank of a run's folder, or of one unit of a study.

    Of a study, by default the best trial's first target (the defaults' while nothing is complete, any unit's where
    these keep no bank); `unit` names another, as `trial-0003/cuhk03-s0`. Raises UsageError for a folder that is
    neither, an unknown unit, or a unit without a bank.
    """
    if is_unit(run_or_study):
        if unit is not None:
            raise UsageError(f"--unit {unit}: {run_or_study} is a single run already; --unit chooses from a study")
        return _opened(run_or_study, f"run {run_or_study.resolve().name}")
    study = load_study(run_or_study)
    tell(study.flaws)
    if unit is not None:
        return _opened(run_or_study / _named_unit(study, unit), f"study {study.name}, {Path(unit).parent.name}")
    left_out = ""
    for name in _by_preference(study):
        folder = run_or_study / name
        if not (damage := damage_of_zip(_bank_of(folder))):
            return _opened(folder, f"study {study.name}, {folder.parent.name}{left_out}")
        warn(f"left out: {_bank_of(folder)}: {damage}")
        left_out = ", banks that are damaged left out"
    raise FailedError(f"{run_or_study}: every {_bank_of(run_or_study).name} in it is damaged")


def _opened(folder: Path, where: str) -> Source:
    unit, bank = read_unit(folder), _bank_of(folder)
    if not bank.is_file():
        why = "the run is not finished" if unit.result is None else "this run's method keeps no bank"
        raise UsageError(f"{folder} holds no {bank.name}: {why}")
    data = "data unknown, unfinished run" if unit.result is None else f"{unit.result.data} data"
    return Source(read_bank(bank), folder, f"{where}, unseen target {print_name(unit.target)} ({data})")


def _bank_of(unit: Path) -> Path:
    return UnitFolder(unit).kept(BUFFER_BANK)


def units_with_bank(study: Study) -> dict[str, str]:
    """`trial/unit` -> trial of every unit that keeps a bank, in the order of the study's units."""
    return {f"{row.trial}/{row.unit}": row.trial for row in study.units.itertuples() if _bank_of(row.path).is_file()}


def _by_preference(study: Study) -> list[str]:
    """The units with a bank: the best trial's, the defaults', the others'. Raises UsageError where there is none."""
    banks = units_with_bank(study)
    if not banks:
        name, methods = _bank_of(study.folder).name, sorted(study.units["title"].dropna().unique())
        why = f": a run of {' or '.join(methods)} keeps no bank" if methods else " yet; a unit writes it when it ends"
        raise UsageError(f"{study.folder} holds no {name}{why}")
    first = [trial["name"] for trial in (study.best_trial(), study.default_trial()) if trial is not None]
    return sorted(banks, key=lambda unit: first.index(banks[unit]) if banks[unit] in first else len(first))


def _named_unit(study: Study, unit: str) -> str:
    banks = units_with_bank(study)
    if unit not in banks:
        raise UsageError(f"--unit: {unknown('unit', unit, banks)}")
    return unit


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw_curves(axes: Axes, curves: pd.DataFrame) -> Axes:
    """One line per domain over the channels of one layer and statistic: rows of `channel_curves`."""
    for position, (domain, line) in enumerate(curves.groupby("domain", sort=False)):
        ordered = line.sort_values("position")
        axes.plot(
            ordered["position"],
            ordered["value"],
            color=colour(str(domain), position),
            marker=marker(str(domain), position),
            markersize=2.5,
            linewidth=max(2.2 - 0.4 * position, 1.0),  # two domains that coincide still show both colours
            label=print_name(str(domain)),
        )
    axes.margins(x=0.02)
    return axes


def bank_figure(bank: Bank, layers: Sequence[str], title: str, channels: int = 32, relative: bool = False) -> Figure:
    """Means above, standard deviations below, a column per layer; see `channel_curves` for `channels`, `relative`."""
    curves = channel_curves(bank, layers, channels, relative)
    figure, panels = new_figure(len(STATISTICS), len(layers), width=max(3.1 * len(layers), 6.2), height=5.0)
    with style():
        for (row, column), axes in np.ndenumerate(panels):
            layer, statistic = layers[column], STATISTICS[row]
            draw_curves(axes, curves[(curves["layer"] == layer) & (curves["statistic"] == statistic)])
            if row == 0:
                total = bank.mean[layer].shape[1]
                axes.set_title(f"{layer}, {min(channels, total)} of {total} channels")
            if column == 0:
                axes.set_ylabel(f"{statistic}{', relative' if relative else ''}")
        panels[-1, len(layers) // 2].set_xlabel("channels that differ most between domains, sorted by average")
        figure.suptitle(title)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def draw_distances(axes: Axes, distances: pd.DataFrame) -> Axes:
    """Annotated heat map of `domain_distances`; the closest pair is framed."""
    import seaborn as sns  # late, as all of matplotlib: analysis/__init__.py comes first
    from matplotlib.patches import Rectangle

    names = [print_name(domain) for domain in distances.index]
    shown = pd.DataFrame(distances.to_numpy(), index=names, columns=names)
    sns.heatmap(
        shown,
        mask=np.eye(len(names), dtype=bool),
        annot=True,
        fmt=".3f",
        cmap="crest",
        square=True,
        linewidths=1,
        cbar_kws={"label": "distance, root mean square over channels", "shrink": 0.8},
        ax=axes,
    )
    axes.grid(visible=False)
    axes.set(xlabel="", ylabel="")
    axes.tick_params(axis="y", rotation=0)
    if len(names) > 1:
        first, second, _ = closest_pairs(distances)[0]
        a, b = list(distances.index).index(first), list(distances.index).index(second)
        for row, column in ((a, b), (b, a)):
            axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False))
    return axes


def distance_figure(distances: pd.DataFrame, title: str) -> Figure:
    """The distance matrix, with its closest pair in the title."""
    figure, panels = new_figure(1, 1, width=5.4, height=4.6)
    with style():
        first, second, distance = closest_pairs(distances)[0]
        draw_distances(panels[0, 0], distances)
        panels[0, 0].set_title(f"closest: {print_name(first)} and {print_name(second)}, {distance:.3f}")
        figure.suptitle(title)
    return figure


# --- command ---------------------------------------------------------------------------------------------------------


def bank_figures(
    source: Source, layers: Sequence[str], channels: int = 32, relative: bool = False
) -> dict[str, Figure]:
    """File name (without suffix) -> figure; a single domain has no distances."""
    bank = source.bank
    figures = {"buffer_bank": bank_figure(bank, layers, f"Buffer Bank, {source.title}", channels, relative)}
    if len(bank.domains) > 1:
        title = f"2-Wasserstein distance of Buffer Bank rows, mean over {len(bank.layers)} layers\n{source.title}"
        figures["buffer_bank_distances"] = distance_figure(domain_distances(bank), title)
    if (pairs := pairs_figure(bank, source.unit, f"Buffer Bank, {source.title}")) is not None:
        figures["buffer_bank_pairs"] = pairs
    return figures


def bank_numbers(bank: Bank) -> dict[str, pd.DataFrame]:
    """File name (without suffix) -> the numbers behind the figure of that name, all channels of all layers."""
    curves = channel_curves(bank, bank.layers, channels=sys.maxsize)
    wide = curves.pivot(index=["layer", "domain", "channel"], columns="statistic", values="value").reset_index()
    numbers = {"buffer_bank": wide}
    if len(bank.domains) > 1:
        numbers["buffer_bank_distances"] = domain_distances(bank).reset_index()
        numbers["buffer_bank_pairs"] = pairs_of_layers(bank)
    return numbers


def write_all(source: Source, output: Path, layers: Sequence[str], channels: int, relative: bool) -> list[Path]:
    """Write figures and numbers into a folder. Returns the files."""
    numbers, written = bank_numbers(source.bank), []
    for name, figure in bank_figures(source, layers, channels, relative).items():
        written += [save(figure, output / f"{name}.{kind}") for kind in ("png", "pdf")]
        written.append(_write_csv(numbers[name], output / f"{name}.csv"))
    return written


def _write_csv(table: pd.DataFrame, path: Path) -> Path:
    with atomic(path) as file:
        file.write(as_csv(table, "%.6g"))
    return path


def describe(source: Source) -> str:
    """What was read, and every pair's distance, for the terminal."""
    lines = [f"Buffer Bank of {source.unit}: {source.title}"]
    if source.bank.unseen:
        lines.append(f"left out, never seen in training: {', '.join(map(print_name, source.bank.unseen))}")
    if len(source.bank.domains) > 1:
        lines.append("2-Wasserstein distance, closest first:")
        for first, second, distance in closest_pairs(domain_distances(source.bank)):
            lines.append(f"  {distance:8.4f}  {print_name(first)} - {print_name(second)}")
    if len(source.bank.domains) > 2:
        distances = domain_distances(source.bank)
        first, second = named_pair(distances)
        share = closeness(distances, first, second)
        lines.append(f"{print_name(first)} - {print_name(second)} over the mean of the other pairs: {share:.3f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/buffer_bank.py RUN_OR_STUDY`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _draw(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python analysis/buffer_bank.py",
        description="Draw the Buffer Bank statistics of every source domain and the distances between domains.",
        epilog="--relative: (value - average over domains) / average standard deviation of the channel.",
    )
    parser.add_argument(
        "run_or_study", type=existing_folder, help="folder of a run, or of a study, for example runs/protocol3"
    )
    parser.add_argument(
        "--unit", help="unit of the study (default: best trial's first), for example trial-0003/cuhk03-s0"
    )
    parser.add_argument("--layers", nargs="+", default=[], help="layers to draw (default: first, middle and last)")
    parser.add_argument(
        "--channels", type=whole(1, 10**6), default=32, help="channels of a layer to draw (default: %(default)s)"
    )
    parser.add_argument("--relative", action="store_true", help="draw differences to the domains' average, see below")
    parser.add_argument("--output", type=output_folder, help="folder for the files (default: RUN_OR_STUDY)")
    options = parser.parse_args(arguments)
    options.output = options.output or checked("--output", output_folder, options.run_or_study)
    return options


def _draw(options: argparse.Namespace) -> None:
    source = open_source(options.run_or_study, options.unit)
    layers = choose_layers(source.bank, options.layers)
    print(describe(source))
    for path in write_all(source, options.output, layers, options.channels, options.relative):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
