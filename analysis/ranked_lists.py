"""Ranked lists: what several runs of one target find first in the gallery, for the same queries, one above the other.

    python analysis/ranked_lists.py runs/a runs/b --output lists.html

One page that needs nothing but itself. Which queries: `analysis.ranked_data`. For another page, `ranked_lists` there
gives the content as data, and `analysis.ranked_page.fragment` a piece of HTML.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from analysis.ranked_data import ranked_lists
from analysis.ranked_page import page
from lda.arguments import Parser, existing_folder, output_file, whole
from lda.command import exit_code, openmp_threads
from lda.files import atomic


def main(arguments: Sequence[str] | None = None) -> int:
    """`python analysis/ranked_lists.py RUN ...`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _write(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python analysis/ranked_lists.py",
        description="Write a page of ranked lists: what runs of one target find first, for the same queries.",
    )
    parser.add_argument("runs", nargs="+", type=existing_folder, metavar="RUN", help="run folder with a checkpoint")
    parser.add_argument("--output", type=output_file, required=True, help="page to write, for example lists.html")
    parser.add_argument("--data-root", type=existing_folder, help="folder with the data sets; without it, the stand-in")
    parser.add_argument("--split", type=whole(0, 1000), help="of a target with several (default: the runs' own, or 0)")
    options = parser.parse_args(arguments)
    openmp_threads()
    return options


def _write(options: argparse.Namespace) -> None:
    from lda.retrieval import open_retrievals

    folders = list(dict.fromkeys(options.runs))
    lists = ranked_lists(open_retrievals(folders, options.data_root, options.split))
    with atomic(options.output) as file:
        file.write(page(lists))
    print(options.output)


if __name__ == "__main__":
    sys.exit(main())
