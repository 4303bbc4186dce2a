"""`python -m lda.search`: the images of an embedded folder nearest to a query image, as text and as a picture."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lda import methods
from lda.arguments import ArgumentError, Parser, existing_file, existing_folder, output_file, whole
from lda.command import exit_code, openmp_threads
from lda.errors import UsageError
from lda.files import atomic, sha256_of

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from lda.features import Features

    _Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# What imports torch is imported where it is needed: mistakes answer at once.

_CHUNK = 8192  # features compared at a time

# Pixels of the picture: made for a slide, so twice what a screen needs.
_TILE = (160, 320)  # box that an image is fitted into
_GAP, _MARGIN, _QUERY_GAP = 20, 32, 56
_ROW = 10  # hits side by side
_LARGE, _SMALL = 22, 15  # type
_PATH_LINES = 3
_INK, _PALE = (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class Hit:
    """An image that was found: its path as the features call it, its file, its cosine with the query."""

    path: str
    file: Path
    cosine: float


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.search",
        description="Find the images nearest to a query among those that python -m lda.embed embedded.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--features", type=existing_file, required=True, help=".npz file of python -m lda.embed")
    parser.add_argument("--query", type=existing_file, required=True, help="image; left out of what is found")
    parser.add_argument("--checkpoint", type=existing_file, required=True, help="the one that embedded the images")
    parser.add_argument("--top", type=whole(1, 100), default=10, help="how many images")
    parser.add_argument("--output", type=_picture, help="picture (.png) of the query and what is found")
    parser.add_argument("--images", type=existing_folder, help="folder of the images, where it has moved since")
    options = parser.parse_args(arguments)
    methods.names()  # all folders of methods are there
    openmp_threads()
    return options


def _picture(given: str) -> Path:
    file = output_file(given)
    if file.suffix.lower() != ".png":
        raise ArgumentError(f"{file}: expected a name that ends in .png")
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lda.search`: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _search(parse_arguments(arguments)))


def _search(options: argparse.Namespace) -> None:
    from lda.features import read_features

    features = read_features(options.features)
    if (sha256 := sha256_of(options.checkpoint)) != features.model.checkpoint_sha256:
        raise UsageError(
            f"--checkpoint {options.checkpoint}: is another model (SHA-256 {sha256[:12]}) than the one that "
            f"{options.features} comes from ({features.model.method}, training {features.model.training}, "
            f"SHA-256 {features.model.checkpoint_sha256[:12]})"
        )
    hits = find(features, options.checkpoint, options.query, options.top, options.images or features.root)
    for rank, hit in enumerate(hits, start=1):
        print(f"{rank:3}  {hit.cosine:.4f}  {hit.path}")
    if options.output is not None:
        picture = draw(options.query, hits)
        with atomic(options.output, "wb") as file:
            picture.save(file, "PNG")


def find(features: Features, checkpoint: Path, query: Path, top: int, root: Path) -> list[Hit]:
    """The images nearest to the query by cosine, nearest first, equal ones in the order of the features. The query's
    own file is not among them. Raises UsageError where the query cannot be decoded."""
    import numpy as np
    import torch

    from lda.data.decode import decode
    from lda.embedding import Embedder

    embedder = Embedder(checkpoint, features.model.settings)
    scorer = embedder.method.scorer()
    own = scorer.prepare(torch.from_numpy(embedder.features(decode(query, *embedder.image_size)[None])))
    parts = torch.split(torch.from_numpy(features.features), _CHUNK)
    cosines = torch.cat([scorer.scores(own, scorer.prepare(part))[0] for part in parts]).numpy()
    hits: list[Hit] = []
    for place in np.argsort(-cosines, kind="stable"):
        hit = Hit(str(features.paths[place]), root / str(features.paths[place]), float(cosines[place]))
        if len(hits) == top:
            break
        if hit.file.resolve() != query.resolve():
            hits.append(hit)
    return hits


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(query: Path, hits: Sequence[Hit]) -> Image.Image:
    """Query left, hits right of it by rank, ten in a row, each with its cosine and path below.

    Raises UsageError naming an image that is not there any more.
    """
    from PIL import Image, ImageDraw, ImageFont

    large, small = ImageFont.load_default(_LARGE), ImageFont.load_default(_SMALL)
    rows, columns = max(1, -(-len(hits) // _ROW)), min(len(hits), _ROW)
    caption = _LARGE + _PATH_LINES * (_SMALL + 4) + 20
    step, line = _TILE[0] + _GAP, _TILE[1] + caption + _GAP
    left = _MARGIN + _TILE[0] + _QUERY_GAP  # of the hits
    size = (left + columns * step - _GAP + _MARGIN, 2 * _MARGIN + rows * line - _GAP)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    _tile(picture, pen, (_MARGIN, _MARGIN), query, ("query", query.name), (large, small))
    between = left - _QUERY_GAP // 2
    pen.line((between, _MARGIN, between, size[1] - _MARGIN), fill=(200, 200, 200), width=2)
    for place, hit in enumerate(hits):
        corner = (left + place % _ROW * step, _MARGIN + place // _ROW * line)
        words = (f"{place + 1}    {hit.cosine:.3f}", hit.path)
        _tile(picture, pen, corner, hit.file, words, (large, small))
    return picture


def _tile(
    picture: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    file: Path,
    words: tuple[str, str],
    fonts: tuple[_Font, _Font],
) -> None:
    """One image in its box, centred at the foot, and below it a line of large and some of small type."""
    from PIL import Image

    from lda.data.decode import open_rgb

    (x, y), (width, height) = corner, _TILE
    image = open_rgb(file)
    scale = min(width / image.width, height / image.height)
    fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    place = (x + (width - fitted[0]) // 2, y + height - fitted[1])
    picture.paste(image.resize(fitted, Image.Resampling.BICUBIC), place)
    pen.text((x, y + height + 8), words[0], fill=_INK, font=fonts[0])
    for number, text in enumerate(_lines(words[1], width, fonts[1])):
        pen.text((x, y + height + 16 + _LARGE + number * (_SMALL + 4)), text, fill=_PALE, font=fonts[1])


def _lines(path: str, width: int, font: _Font) -> list[str]:
    """A path in lines that fit, broken where names are; of one that is too long the end."""
    lines = [""]
    for part in re.findall(r"[^/_. -]*[/_. -]?", path):
        if lines[-1] and font.getlength(lines[-1] + part) > width:
            lines.append("")
        for sign in part:  # a part alone may be too long
            if font.getlength(lines[-1] + sign) > width:
                lines.append("")
            lines[-1] += sign
    cut = lines[-_PATH_LINES:]
    return cut if cut == lines else [f"\N{HORIZONTAL ELLIPSIS}{cut[0][1:]}", *cut[1:]]


if __name__ == "__main__":
    raise SystemExit(main())
