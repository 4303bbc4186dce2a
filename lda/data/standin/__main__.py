"""`python -m lda.data.standin`: draw the stand-in, and a picture of it.

python -m lda.data.standin --output DIR [--scale tiny|small|full] [--seed N] [--contact-sheet FILE]
                           [--cuhk03-release DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lda.arguments import HIGHEST_SEED, Parser, output_file, output_folder, whole
from lda.command import exit_code
from lda.data.catalogue import title
from lda.data.standin.cuhk03_release import write_release
from lda.data.standin.damage import VERSION
from lda.data.standin.draw import plans
from lda.data.standin.layouts import SCALES, Plan, Shot
from lda.data.standin.tree import generate
from lda.data.survey import MARKER
from lda.errors import UsageError
from lda.files import atomic


def contact_sheet(root: Path, path: Path, persons: int = 8) -> None:
    """Writes a picture of the stand-in below `root`: a row per domain, per person two images of different cameras."""
    marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
    height, width, gap, label = 128, 56, 10, 112
    planned = plans(marker["scale"], marker["seed"], marker["counts"])
    sheet = Image.new("RGB", (label + persons * (2 * width + gap), len(planned) * (height + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, (name, plan) in enumerate(planned.items()):
        y = gap + row * (height + gap)
        draw.text((8, y + height // 2), title(name), fill="black", font=font, anchor="lm")
        for column, pair in enumerate(_pairs(plan, persons)):
            for k, shot in enumerate(pair):
                with Image.open(root / shot.path) as image:
                    cell = image.convert("RGB").resize((width - 2, height), Image.Resampling.BICUBIC)
                sheet.paste(cell, (label + column * (2 * width + gap) + k * width, y))
    with atomic(path, "wb") as file:
        sheet.save(file, "PNG", optimize=True)


def _pairs(plan: Plan, persons: int) -> list[tuple[Shot, Shot]]:
    """Two images of different cameras for each of `persons` persons, evenly spaced over those that have them."""
    by_person: dict[int, list[Shot]] = {}
    for shot in plan.shots:
        if not (shot.box.empty or shot.box.junk):
            by_person.setdefault(shot.person, []).append(shot)
    pairs = []
    for shots in by_person.values():
        other = next((shot for shot in shots if shot.camera != shots[0].camera), None)
        if other is not None:
            pairs.append((shots[0], other))
    return pairs[:: max(1, len(pairs) // persons)][:persons]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_code(lambda: _draw(parse_arguments(arguments)))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.data.standin",
        description="Draw stand-in pedestrians in the layouts of the real re-identification data sets.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=output_folder, required=True, metavar="DIR", help="new folder for the data sets"
    )
    parser.add_argument("--scale", default="small", help="how many persons and images: " + ", ".join(SCALES))
    parser.add_argument(
        "--seed", type=whole(0, HIGHEST_SEED), default=0, metavar="N", help="another seed: other people and places"
    )
    parser.add_argument(
        "--contact-sheet", type=output_file, metavar="FILE", help="write a picture (PNG) of all domains here"
    )
    parser.add_argument(
        "--cuhk03-release", type=output_folder, metavar="DIR", help="write CUHK03's .mat files to this new folder"
    )
    options = parser.parse_args(arguments)
    if options.cuhk03_release and options.cuhk03_release.exists():
        raise UsageError(f"--cuhk03-release: {options.cuhk03_release} exists; name a new folder")
    return options


def _draw(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    marker = generate(options.output, options.scale, options.seed)
    if options.contact_sheet:
        contact_sheet(options.output, options.contact_sheet)
    if options.cuhk03_release:
        write_release(options.output, options.cuhk03_release)
    images = sum(part["images"] for parts in marker["counts"].values() for part in parts.values())
    print(
        f"{options.output}: stand-in v{VERSION} {options.scale}, seed {options.seed}, {len(marker['counts'])} data "
        f"sets, {images:,} images ({time.perf_counter() - start:.1f} s), hash {marker['hash'][:12]}"
    )


if __name__ == "__main__":
    sys.exit(main())
