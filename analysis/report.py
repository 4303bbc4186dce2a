"""A study's report: one HTML page that needs nothing but itself, beside its figures and tables as files.

    python analysis/report.py runs/protocol3
    python analysis/report.py runs/              all studies, and a page that leads to them

Writes reports/<date>-<study>/: index.html, table.md, table.csv, table.tex, and every figure as PNG and PDF with the
numbers behind it as CSV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from analysis.comparison import counted_runs
from analysis.house_style import save
from analysis.query_figures import shown_configurations
from analysis.records import STUDY, listed, tell
from analysis.report_figures import pictures
from analysis.report_page import Fragment, index_page, index_row, page
from analysis.study import Study, load_study, metrics_flaws, print_name
from analysis.tables import render
from analysis.text_tables import as_csv
from lda.arguments import Parser, checked, existing_folder, output_folder
from lda.command import exit_code, openmp_threads
from lda.errors import FailedError, UsageError, warn
from lda.files import atomic

TABLES = {"table.md": "markdown", "table.csv": "csv", "table.tex": "latex"}
"""Files of the protocol table -> format."""


def write_report(
    study: Study, output: Path, today: date, anonymous: bool = False, fragments: Sequence[Fragment] = ()
) -> Path:
    """Write the page, its figures and its tables into `output`. Returns the page."""
    figures = pictures(study)
    for picture in (picture for section in figures.values() for picture in section):
        for kind in ("png", "pdf"):
            save(picture.figure, output / f"{picture.name}.{kind}")
        _write(output / f"{picture.name}.csv", as_csv(picture.numbers, "%.6g"))
    try:
        texts = {name: render(study, format) for name, format in TABLES.items()}
    except (UsageError, FailedError):  # nothing to tabulate yet; the page says so
        texts = {}
    texts["index.html"] = page(study, figures, today, anonymous, fragments)
    for name, text in texts.items():
        _write(output / name, text)
    return output / "index.html"


def ranked(study: Study, data_root: Path | None) -> list[Fragment]:
    """Ranked lists of the configurations that figures show, one part a target, by the first seed of each.

    Raises UsageError for a study without finished runs, and where a checkpoint is not here.
    """
    from analysis.ranked_data import ranked_lists  # torch: only who asks for lists waits for it
    from analysis.ranked_page import fragment
    from lda.retrieval import open_retrievals

    runs = counted_runs(study)
    runs = runs[(runs["seed"] == runs["seed"].min()) & runs["label"].isin(shown_configurations(study))]
    return [
        Fragment(
            f"Ranked lists, {print_name(target)}", fragment(ranked_lists(open_retrievals(list(own), data_root, None)))
        )
        for target, own in runs.groupby("target", sort=False)["path"]
    ]


def write_index(folder: Path, output: Path, today: date, anonymous: bool = False) -> Path:
    """Write the reports of all studies in a folder, each into a folder of its own, and the page that leads to them.

    A study that cannot be read is named there. Raises UsageError where none can.
    """
    rows, wrong = [], []
    for path in sorted(folder.glob(f"*/{STUDY}")):
        try:
            study = load_study(path.parent)
        except (UsageError, FailedError) as error:
            warn(f"left out: {error}")
            wrong.append(f"Left out: {error}")
            continue
        write_report(study, output / path.parent.name, today, anonymous)
        rows.append(index_row(study, f"{path.parent.name}/index.html"))
    if not rows:
        raise UsageError(wrong[0] if wrong else f"{folder} holds no study; expected folders with {STUDY} in it")
    _write(output / "index.html", index_page(rows, wrong, today, anonymous))
    return output / "index.html"


def _write(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/report.py STUDY`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _report(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python analysis/report.py", description="Write a study's report: one HTML page, figures and tables."
    )
    parser.add_argument(
        "study", type=existing_folder, help="folder of the study, for example runs/protocol3, or of several: runs"
    )
    parser.add_argument("--output", type=output_folder, help="folder of the report (default: reports/<date>-<study>)")
    parser.add_argument(
        "--ranked-lists",
        action="store_true",
        help="show what baseline, defaults and best find first (tests them again)",
    )
    parser.add_argument("--data-root", type=existing_folder, help="for --ranked-lists; without it, the stand-in")
    parser.add_argument("--anonymous", action="store_true", help="leave out command, commit, folders and hosts")
    options = parser.parse_args(arguments)
    openmp_threads()
    return options


def _report(options: argparse.Namespace) -> int:
    today, name = date.today(), options.study.resolve().name
    several = not (options.study / STUDY).is_file() and any(options.study.glob(f"*/{STUDY}"))
    output = checked("--output", output_folder, options.output or Path("reports", f"{today.isoformat()}-{name}"))
    if several:
        if options.ranked_lists:
            raise UsageError("--ranked-lists: is for one study; name its folder")
        print(write_index(options.study, output, today, options.anonymous))
        return 0
    study = load_study(options.study)
    tell([*study.flaws, *metrics_flaws(study)])
    fragments = ranked(study, options.data_root) if options.ranked_lists else []
    print(write_report(study, output, today, options.anonymous, fragments))
    if listed(study.flaws) and not study.units["finished"].astype(bool).any():
        warn("no unit of this study is whole; the page shows none")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
