"""`python -m lda.embed`: the features of any images, by a trained checkpoint.

The images are decoded, resized, normalised and encoded as an evaluation does it, batch by batch. One that cannot be
decoded is told in a line of its own and left out; the others are written all the same, and the command ends with 1, for
the file does not hold all that was asked for. With --skip-bad that is all right, and it ends with 0.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lda import methods
from lda.arguments import ArgumentError, Parser, existing_file, existing_folder, output_file, path
from lda.command import cores, exit_code, interruptible, openmp_threads, progress
from lda.config import parse_overrides
from lda.errors import UsageError

if TYPE_CHECKING:
    from lda.data.listing import ImageList
    from lda.embedding import Embedder

# What imports torch is imported where it is needed: mistakes answer at once.


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.embed",
        description="Embed any images by a checkpoint. Ends with 1 where some cannot be decoded: see --skip-bad.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=existing_file, required=True, help="checkpoint.pt of a run folder")
    parser.add_argument(
        "--images", type=_images, required=True,
        help="a folder, with all below it; or a CSV file with a column path, whose other columns are carried along",
    )  # fmt: skip
    parser.add_argument("--output", type=output_file, required=True, help="the .npz file, see lda/features.py")
    parser.add_argument("--skip-bad", action="store_true", help="end with 0 although images could not be decoded")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="settings of the test that change features, for example flip_test=true, and where it runs",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    methods.names()  # all folders of methods are there
    openmp_threads()
    return options


def _images(given: str) -> Path:
    try:
        return existing_folder(given) if path(given).is_dir() else existing_file(given)
    except ArgumentError as mistake:
        raise ArgumentError(f"{mistake}; a folder or a CSV file") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lda.embed`: 0 done, 1 failed or some images are left out, 2 bad usage, 130 interrupted."""
    with interruptible() as told:
        return exit_code(lambda: _embed(parse_arguments(arguments), told))


def _embed(options: argparse.Namespace, told: threading.Event) -> int:
    changes = parse_overrides(options.set)
    from lda.data.listing import list_images
    from lda.features import NAMES

    images = list_images(options.images)
    if taken := [name for name in images.columns if name in NAMES]:
        raise UsageError(f"{options.images}: column {taken[0]!r} is a name of the output's own; rename it")
    from lda.embedding import Embedder

    embedder = Embedder(options.checkpoint, changes)
    count, bad = write_features(embedder, images, options.output, told)
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    others = f"; {images.others} other files are no images by their names" if images.others else ""
    print(f"{options.output}: {count:,} of {len(images.paths):,} images by {embedder.name}{others}")
    return 1 if bad and not options.skip_bad else 0


def write_features(embedder: Embedder, images: ImageList, output: Path, told: threading.Event) -> tuple[int, list[str]]:
    """Embed the images and write the file, see `lda.features`. Returns how many there are in it, and a line for every
    one that is not.

    One batch of images is in memory at a time, and of the features none; paths and columns are.
    Raises FailedError where no image can be decoded, KeyboardInterrupt soon after `told` is set.
    """
    import numpy as np

    from lda.features import texts, written

    size, kept = embedder.config.machine.evaluation_batch, []
    bad: dict[int, str] = {}
    with (
        written(output) as file,
        ThreadPoolExecutor(cores()) as pool,
        progress(f"embedding {len(images.paths):,} images", len(images.paths)) as advance,
    ):
        for start in range(0, len(images.paths), size):
            if told.is_set():  # and what it raised was swallowed
                raise KeyboardInterrupt
            part = [images.root / name for name in images.paths[start : start + size]]
            pixels, good, wrong = embedder.decoded(part, pool)
            if good:
                file.add(embedder.features(pixels))
            kept += [start + place for place in good]
            bad |= {start + place: line for place, line in wrong.items()}
            advance(len(part))
        paths = texts(images.paths[row] for row in kept)
        skipped, root = texts(images.paths[row] for row in bad), np.array(str(images.root))
        columns = {name: column[kept] for name, column in images.columns.items()}
        file.beside = {"paths": paths, **columns, "skipped": skipped, "root": root, **embedder.model.arrays()}
    return len(kept), list(bad.values())


if __name__ == "__main__":
    raise SystemExit(main())
