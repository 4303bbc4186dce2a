"""`python -m lda.evaluate`: trained checkpoints on any targets, under other test settings if wanted.

One checkpoint on one target prints a JSON object. Several of either print a table, whose cells are marked where the
target is one of the checkpoint's sources. `--output STEM` writes STEM.json after every cell and STEM.csv at the end,
and the same command goes on: what is in STEM.json of equal checkpoint (SHA-256), target images (content hash) and test
settings is not tested again. One command at a time per STEM. `python analysis/matrix.py STEM.json` draws it.
A checkpoint that is damaged, or that a setting contradicts, is named and ends the command before anything is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lda import matrix, methods
from lda.arguments import ArgumentError, Parser, existing_file, existing_folder, output_file, whole
from lda.command import exit_code, interruptible, openmp_threads, say
from lda.config import parse_overrides
from lda.data.cache import check_cache
from lda.data.catalogue import facts, names
from lda.errors import UsageError

# What imports torch is imported where it is needed: mistakes answer at once.

EVERY = "all"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `targets` are names, `every` says that they are all."""
    parser = Parser(
        prog="python -m lda.evaluate",
        description="Evaluate checkpoints on targets' query and gallery. One on one prints a JSON object, several a "
        "table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=_checkpoint, nargs="+", required=True, help="checkpoint.pt of run folders")
    parser.add_argument(
        "--target", nargs="+", required=True, metavar="NAME",
        help=f"data sets to evaluate on, or {EVERY}: every one that has a query and gallery, withdrawn ones apart",
    )  # fmt: skip
    parser.add_argument(
        "--split", type=whole(0, 1000), help="one split only, from 0, as single-split papers do (Protocol-1)"
    )
    parser.add_argument("--data-root", type=existing_folder, help="folder with the data sets; without it, the stand-in")
    parser.add_argument(
        "--skip-missing", action="store_true",
        help="go on without the targets that are not below --data-root, and name them",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=_stem, metavar="STEM",
        help="write STEM.json and STEM.csv; the same command goes on from there (one command at a time)",
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="settings of the test, for all checkpoints, for example flip_test=true",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.every = EVERY in options.target
    if options.every and len(options.target) > 1:
        raise UsageError(f"--target {EVERY}: means every target there is; leave the other names out")
    options.targets = _all_targets() if options.every else options.target
    for name in options.targets:
        facts(name)
    for option, given in (("--checkpoint", options.checkpoint), ("--target", options.targets)):
        if twice := next((value for place, value in enumerate(given) if value in given[:place]), None):
            raise UsageError(f"{option} {twice}: is given twice; keep one")
    if options.skip_missing and _is_single(options):
        raise UsageError("--skip-missing: is for several targets; this is one")
    methods.names()  # all folders of methods are there
    openmp_threads()
    check_cache()
    return options


def _checkpoint(given: str) -> Path:
    try:
        return existing_file(given)
    except ArgumentError as mistake:
        raise ArgumentError(f"{mistake}; a run writes it as <run folder>/checkpoint.pt") from None


def _stem(given: str) -> Path:
    stem = given.removesuffix(".json")
    output_file(f"{stem}.csv")
    file = output_file(f"{stem}.json")
    return file.with_name(file.name.removesuffix(".json"))


def _all_targets() -> list[str]:
    return [name for name in names() if facts(name).tested and not facts(name).withdrawn]


def _is_single(options: argparse.Namespace) -> bool:
    """One checkpoint on one target that was named, and no file of a matrix."""
    return len(options.checkpoint) == len(options.targets) == 1 and not options.every and options.output is None


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lda.evaluate`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    with interruptible() as told:
        return exit_code(lambda: _evaluate(parse_arguments(arguments), told))


def _evaluate(options: argparse.Namespace, told: threading.Event) -> int:
    changes = parse_overrides(options.set)
    if options.split is not None:
        changes["test_split"] = options.split

    def check() -> None:
        if told.is_set():  # and what it raised was swallowed
            raise KeyboardInterrupt

    if _is_single(options):
        _evaluate_one(options, changes, check)
        return 0
    return _evaluate_matrix(options, changes, check)


def _evaluate_one(options: argparse.Namespace, changes: dict[str, Any], check: Callable[[], None]) -> None:
    from lda.checkpoint import load_method, read_checkpoint
    from lda.data.sources import evaluation_splits
    from lda.data.standin.tree import ensure_standin
    from lda.device import choose_device
    from lda.testing import Evaluator, check_target, chosen_splits, metrics, test_config

    (path,), (name,) = options.checkpoint, options.targets
    checkpoint = read_checkpoint(path)
    config = test_config(checkpoint.config, name, changes)
    device = choose_device(config.machine)
    target = evaluation_splits(name, options.data_root or ensure_standin(), config.data)
    method = load_method(checkpoint, config).to(device)
    check_target(method, target.splits)
    evaluation = Evaluator(chosen_splits(target.splits, config.test), config, device, check)(method)
    result = {
        "target": name,
        "data": target.kind,
        "method": config.method.name,
        "inference": method.inference,
        "target_data": method.looks_at_target,
        "reconstructed": method.reconstructed,
        "pair_cost": method.scorer().pair_cost,
        "flip_test": config.test.flip_test,
        "average_precision": config.test.average_precision,
        "reranking": config.test.reranked,
        **metrics(evaluation),
    }
    print(json.dumps(result, indent=1))


def _evaluate_matrix(options: argparse.Namespace, changes: dict[str, Any], check: Callable[[], None]) -> int:
    from lda import cross_evaluation
    from lda.data.standin.tree import ensure_standin

    before = _known_cells(options.output)
    chosen = cross_evaluation.entrants(options.checkpoint, changes)
    cross_evaluation.check_alike(chosen, options.targets)
    targets, missing = cross_evaluation.load_targets(
        options.targets,
        options.data_root or ensure_standin(),
        chosen[0].config.data,
        skip_missing=options.skip_missing,
        every=options.every,
    )
    cross_evaluation.check_targets(chosen, targets)
    rows, columns = tuple(entrant.row for entrant in chosen), cross_evaluation.columns(targets)
    begun = matrix.Matrix(rows=rows, columns=columns, cells=before, missing=tuple(missing))
    progress = _Progress(begun, options.output)
    try:
        for cell in cross_evaluation.untested(begun, chosen, targets, check):
            progress.add(cell)
    except KeyboardInterrupt:
        say(f"interrupted; {progress.kept()}")
        return 130
    print(matrix.as_text(progress.matrix))
    progress.finish()
    return 0


def _known_cells(stem: Path | None) -> tuple[matrix.Cell, ...]:
    """What is in STEM.json, if it is there. Raises UsageError where it cannot be read."""
    if stem is None or not os.path.lexists(path := matrix.file_of(stem, "json")):
        return ()
    try:
        return matrix.read(path).cells
    except UsageError as error:
        raise UsageError(f"{error}; remove it, or choose another --output") from None


class _Progress:
    """The matrix so far, told on stderr and kept in its file."""

    def __init__(self, begun: matrix.Matrix, stem: Path | None) -> None:
        self.matrix, self._stem, self._since = begun, stem, time.monotonic()
        self._total = len(begun.rows) * len(begun.columns)
        if begun.missing:
            say(f"not below the data root, left out: {', '.join(begun.missing)}")
        if begun.done():
            say(self.kept())

    def add(self, cell: matrix.Cell) -> None:
        """One more is tested."""
        self.matrix = self.matrix.with_cell(cell)
        if self._stem is not None:
            matrix.write(self.matrix, matrix.file_of(self._stem, "json"))
        label = next(row.label for row in self.matrix.rows if row.sha256 == cell.sha256)
        title = next(column.title for column in self.matrix.columns if column.target == cell.target)
        mark = ", a source of it" if cell.source else ""
        now = time.monotonic()
        say(
            f"[{self.matrix.done()}/{self._total}] {label} on {title}{mark}: mAP {100 * cell.mAP:.1f}, "
            f"Rank-1 {100 * cell.rank1:.1f} ({now - self._since:.1f} s)"
        )
        self._since = now

    def kept(self) -> str:
        """What an end at this moment leaves."""
        if self._stem is None:
            return "nothing is kept without --output"
        return f"{self.matrix.done()} of {self._total} cells are in {matrix.file_of(self._stem, 'json')}"

    def finish(self) -> None:
        """Write what belongs to the whole, and say where it is."""
        if self._stem is not None:
            matrix.write(self.matrix, matrix.file_of(self._stem, "json"))
            matrix.write_csv(self.matrix, matrix.file_of(self._stem, "csv"))
            say(f"{matrix.file_of(self._stem, 'json')}, {matrix.file_of(self._stem, 'csv')}")


if __name__ == "__main__":
    raise SystemExit(main())
