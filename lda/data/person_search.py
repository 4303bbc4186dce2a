"""Cut CUHK-SYSU's person-search release into one image per person and appearance (layout b of cuhk_sysu.py).

The release holds whole street scenes, `Image/SSM/s1.jpg`, and `annotation/Person.mat`: for every person `idname`,
`nAppear` and for every appearance `scene` with `imname`, `idlocate` = [x y w h] (counted from 1, both ends included)
and `ishard`. The crops and their names are those of MetaBIN's MATLAB script.

    python -m lda.data.person_search --input DIR --output DIR
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lda.arguments import Parser, checked, existing_folder, output_folder
from lda.command import cores, exit_code, progress
from lda.data.decode import open_rgb
from lda.data.making import touch, whole_folder
from lda.data.matlab import load_mat
from lda.data.processes import map_processes
from lda.data.sets.cuhk_sysu import PUBLISHED
from lda.data.survey import child
from lda.errors import UsageError

FOLDER = "CUHK-SYSU/cropped_image"


@dataclass(frozen=True, slots=True)
class Appearance:
    """One person in one scene. `box`: x, y, width, height in pixels, from 1, both ends included."""

    person: int
    number: int
    scene: str
    box: tuple[int, int, int, int]
    hard: bool

    @property
    def file_name(self) -> str:
        """Name of the crop."""
        scene = int(self.scene[1:].partition(".")[0])
        return f"p{self.person:05d}_n{self.number:02d}_s{scene:05d}_hard{int(self.hard)}.png"


@dataclass(frozen=True, slots=True)
class _Scene:
    """The persons of one scene: its image is decoded once."""

    image: Path
    persons: tuple[Appearance, ...]
    output: Path


def read_appearances(mat: Path) -> list[Appearance]:
    """Every appearance of every person. Raises UsageError if the file is not Person.mat."""
    content = load_mat(mat)
    try:
        appearances = []
        for person in np.ravel(content["Person"]):
            pid = int(str(_only(person["idname"]))[1:])
            scenes = np.ravel(person["scene"])[: int(_only(person["nAppear"]))]
            for number, scene in enumerate(scenes, start=1):
                x, y, width, height = (int(value) for value in np.ravel(scene["idlocate"]))
                hard = bool(_only(scene["ishard"]))
                appearances.append(Appearance(pid, number, str(_only(scene["imname"])), (x, y, width, height), hard))
    except (LookupError, ValueError, TypeError) as error:
        raise UsageError(f"{mat}: not CUHK-SYSU's Person.mat ({type(error).__name__}: {error})") from None
    return appearances


def crop_persons(release: Path, output: Path) -> int:
    """Write the crops to `output`/CUHK-SYSU/cropped_image, which appears when it is whole. Returns their number.

    Raises UsageError if parts of the release are missing or damaged, or the folder exists.
    """
    mat, images = child(release, "annotation/Person.mat"), child(release, "Image/SSM")
    missing = [name for name, path in (("annotation/Person.mat", mat), ("Image/SSM", images)) if path is None]
    if mat is None or images is None:
        raise UsageError(f"{release} lacks {', '.join(missing)}: expected the CUHK-SYSU person-search release")
    folder = output / FOLDER
    if folder.exists():
        raise UsageError(f"{folder} exists already; name another --output or remove it")
    by_scene: dict[str, list[Appearance]] = {}
    appearances = read_appearances(mat)
    for appearance in appearances:
        by_scene.setdefault(appearance.scene, []).append(appearance)
    present = set(os.listdir(images))
    absent = sorted(by_scene.keys() - present)
    if absent:
        raise UsageError(f"{images} lacks {len(absent)} of {len(by_scene)} scenes, e.g. {absent[0]}; unpack it again")
    title = f"cropping {len(appearances):,} persons out of {len(by_scene):,} scenes"
    with whole_folder(folder, title) as partial:
        if partial is None:
            raise UsageError(f"{folder}: another process has made it meanwhile")
        scenes = (_Scene(images / scene, tuple(persons), partial) for scene, persons in sorted(by_scene.items()))
        with progress(title, len(by_scene)) as advance:
            for _ in map_processes(_crop_scene, scenes, cores() if len(by_scene) > 100 else 1):
                advance(1)
                touch(partial)
    return len(appearances)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_code(lambda: _crop(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.data.person_search",
        description="Crop the persons out of CUHK-SYSU's person-search release.",
    )
    parser.add_argument(
        "--input", type=existing_folder, required=True, help="folder with annotation/Person.mat and Image/SSM"
    )
    parser.add_argument(
        "--output", type=output_folder, required=True, help=f"data root; the crops go to {FOLDER} below it"
    )
    options = parser.parse_args(arguments)
    checked("--output", output_folder, (options.output / FOLDER).parent)
    return options


def _crop(options: argparse.Namespace) -> None:
    count = crop_persons(options.input, options.output)
    print(f"{options.output / FOLDER}: {count:,} images (published: {PUBLISHED.images:,})")


def _crop_scene(scene: _Scene) -> None:
    image = open_rgb(scene.image)
    for person in scene.persons:
        x, y, width, height = person.box
        box = max(x - 1, 0), max(y - 1, 0), min(x + width, image.width), min(y + height, image.height)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise UsageError(f"{scene.image}: box {list(person.box)} of person {person.person} lies outside the image")
        image.crop(box).save(scene.output / person.file_name)


def _only(value: Any) -> Any:
    """The element of a MATLAB scalar."""
    return np.ravel(value)[0]


if __name__ == "__main__":
    sys.exit(main())
