"""The stand-in: drawn pedestrians on disk in the layouts of the real data sets, so that the real loaders read them.

    python -m lda.data.standin --output DIR [--scale tiny|small|full] [--seed N] [--contact-sheet FILE]
                               [--cuhk03-release DIR]

One seed gives the same decoded pixels on any number of processes: every image is drawn from a generator of its own,
keyed by (seed, data set, person, moment). A tree is written beside its place and renamed when it is complete, so a
folder with a `STANDIN.json` is whole.

STANDIN.json: {"version", "seed", "scale", "hash", "hashes": {data set: hash}, "counts": {data set: {part: {"ids",
"images", "cameras"}}}}. A hash covers every file's relative name with its decoded pixels (other files: their bytes),
not the encoded bytes: the same pixels compress differently under another zlib. `hash` is that of the sets which this
version began with (`standin_layouts.FIRST`), together; a set that joined later has its own in `hashes`. So results on
the first ones stay what they are when another set joins. A tree from before gets the sets that it lacks.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lda.data.cache import cache_dir
from lda.data.pedestrians import Person
from lda.data.pool import cores, map_processes, progress
from lda.data.standin_domains import DOMAINS, sample_person
from lda.data.standin_layouts import FIRST, LAYOUTS, SCALES, Plan, Shot, pixel_factor
from lda.data.standin_scenes import camera_of, photograph, stable_rng
from lda.errors import UsageError, unknown
from lda.protocols import DATASETS

VERSION = 1
"""Of the drawing. Results on different versions do not compare."""

MARKER = "STANDIN.json"
_CHUNK = 64  # images a process draws at a time
_ALONE = 1500  # up to so many images, starting processes costs more than it saves

_Chunk = tuple[str, tuple[Shot, ...]]  # data set, images


def ensure_standin(scale: str = "small", seed: int = 0) -> Path:
    """The stand-in's root folder, generated in the cache folder on first use. Raises UsageError for a bad scale."""
    _check(scale, seed)
    root = cache_dir() / f"standin-v{VERSION}-{scale}-s{seed}"
    generate(root, scale, seed)
    return root


def generate(output: Path, scale: str = "small", seed: int = 0, *, processes: int | None = None) -> dict[str, Any]:
    """Draws to `output` whatever of the stand-in is not there already; returns the content of its STANDIN.json.

    `processes`: how many draw, default one for every core. Raises UsageError if `output` holds anything else.
    """
    _check(scale, seed)
    output = output.expanduser().absolute()
    _remove_stale(output)
    marker = _existing(output, scale, seed)
    missing = [name for name in LAYOUTS if marker is None or name not in marker["counts"]]
    if marker is not None and not missing:
        return marker
    _prepare_parent(output)
    aside = output.parent / f".{output.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        drawn = _draw_tree(aside, scale, seed, missing, processes)
        if marker is not None:
            return _add_sets(aside, output, drawn)
        try:
            aside.replace(output)
        except OSError:  # another process was faster
            if (marker := _existing(output, scale, seed)) is None:
                raise
            return marker
        return drawn
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def plans(scale: str, seed: int, names: Iterable[str] = tuple(LAYOUTS)) -> dict[str, Plan]:
    """Data set -> its images, files and counts, before anything is drawn."""
    return {name: LAYOUTS[name](scale, stable_rng(seed, _key(name), 5)) for name in names}


@functools.lru_cache(maxsize=4096)
def person_of(name: str, index: int, seed: int) -> Person:
    """Person `index` of a data set; no person is in two data sets."""
    return sample_person(DOMAINS[name].wardrobe, stable_rng(seed, _key(name), 0, index))


def draw_shot(name: str, shot: Shot, scale: str, seed: int) -> bytes:
    """The image file of one shot: JPEG, BMP or PNG by its path."""
    moment = stable_rng(seed, _key(name), 3, shot.person, shot.take)
    boxing = stable_rng(seed, _key(name), 4, shot.person, shot.take, round(10 * shot.box.error))
    person = person_of(name, shot.person, seed)
    pixels = photograph(name, shot.camera, person, moment, shot.box, boxing, pixel_factor(name, scale), seed)
    file, image = io.BytesIO(), Image.fromarray(pixels)
    if shot.path.endswith((".jpg", ".jpeg")):
        image.save(file, "JPEG", quality=camera_of(name, shot.camera, seed).quality)
    elif shot.path.endswith(".bmp"):
        image.save(file, "BMP")
    else:
        image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _key(name: str) -> int:
    """A number for a data set's name, the same in every process (Python's hash() is not)."""
    return int.from_bytes(name.encode(), "big")


def _check(scale: str, seed: int) -> None:
    if scale not in SCALES:
        raise UsageError(unknown("scale", scale, SCALES))
    if seed < 0:
        raise UsageError(f"seed: {seed} is out of range, expected 0 or more")


# --- the tree --------------------------------------------------------------------------------------------------------
def _existing(output: Path, scale: str, seed: int) -> dict[str, Any] | None:
    """The marker of a finished tree, None if `output` is free. Raises UsageError if it is anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    wanted = {"version": VERSION, "scale": scale, "seed": seed}
    try:
        marker: dict[str, Any] = json.loads((output / MARKER).read_text(encoding="utf-8"))
        found, _ = {key: marker[key] for key in wanted}, marker["counts"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(f"{output} exists and is not a stand-in (no readable {MARKER}); name another folder") from None
    if found != wanted:
        raise UsageError(f"{output} holds another stand-in: {found}, wanted {wanted}; name another folder")
    return marker


def _prepare_parent(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output.parent}: cannot make this folder ({error.strerror})") from None
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"{output.parent}: cannot write here; name another folder or set LDA_CACHE_DIR")


def _remove_stale(output: Path) -> None:
    """Removes what processes that no longer run have left beside `output`."""
    for path in output.parent.glob(f".{output.name}.tmp-*"):
        pid = path.name.rpartition(".tmp-")[2].partition("-")[0]
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    if os.name != "posix":  # signal 0 would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _add_sets(aside: Path, output: Path, drawn: dict[str, Any]) -> dict[str, Any]:
    """Moves data sets drawn in `aside` into a stand-in that lacks them; returns its new marker."""
    try:
        for folder in sorted(path for path in aside.iterdir() if path.is_dir()):
            try:
                folder.replace(output / folder.name)
            except OSError:
                if not (output / folder.name).is_dir():  # else another process was faster, with the same content
                    raise
        marker: dict[str, Any] = json.loads((output / MARKER).read_text(encoding="utf-8"))
        joined = {key: {**marker.get(key, {}), **drawn[key]} for key in ("hashes", "counts")}
        marker = {**drawn, "hash": marker["hash"], **joined}
        _write_marker(aside, marker)
        (aside / MARKER).replace(output / MARKER)
    except OSError as error:
        lacking = ", ".join(drawn["counts"])
        raise UsageError(f"{output}: lacks {lacking} and cannot be written ({error.strerror})") from None
    return marker


def _draw_tree(root: Path, scale: str, seed: int, names: Iterable[str], processes: int | None) -> dict[str, Any]:
    """Writes all images and files of some data sets below `root`, STANDIN.json last."""
    planned = plans(scale, seed, names)
    shots = sum(len(plan.shots) for plan in planned.values())
    chunks = [
        (name, tuple(plan.shots[start : start + _CHUNK]))
        for name, plan in planned.items()
        for start in range(0, len(plan.shots), _CHUNK)
    ]
    digests: dict[str, str] = {}
    for plan in planned.values():
        for path in _paths(plan):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
        for path, content in plan.files.items():
            (root / path).write_bytes(content)
            digests[path] = hashlib.sha256(content).hexdigest()
    draw = functools.partial(draw_chunk, root=root, scale=scale, seed=seed)
    with progress(f"drawing stand-in {scale} (seed {seed}): {shots:,} images", shots) as advance:
        for drawn in map_processes(draw, chunks, processes or (1 if shots <= _ALONE else cores())):
            digests.update(drawn)
            advance(len(drawn))
    first = [path for name in FIRST if name in planned for path in _paths(planned[name])]
    marker = {
        "version": VERSION,
        "scale": scale,
        "seed": seed,
        "hash": _joint_hash(first, digests),
        "hashes": {name: _joint_hash(_paths(plan), digests) for name, plan in planned.items() if name not in FIRST},
        "counts": {name: plan.counts for name, plan in planned.items()},
    }
    _write_marker(root, marker)
    return marker


def _paths(plan: Plan) -> list[str]:
    return [*(shot.path for shot in plan.shots), *plan.files]


def _joint_hash(paths: Iterable[str], digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{path} {digests[path]}\n" for path in sorted(paths)).encode()).hexdigest()


def _write_marker(root: Path, marker: dict[str, Any]) -> None:
    (root / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def draw_chunk(chunk: _Chunk, root: Path, scale: str, seed: int) -> dict[str, str]:
    """Draws and writes some images; returns path -> digest of the decoded pixels."""
    name, shots = chunk
    digests = {}
    for shot in shots:
        file = draw_shot(name, shot, scale, seed)
        (root / shot.path).write_bytes(file)
        digests[shot.path] = pixel_digest(file)
    return digests


def pixel_digest(file: bytes) -> str:
    """SHA-256 of an image file's size and decoded RGB pixels."""
    with Image.open(io.BytesIO(file)) as image:
        return hashlib.sha256(f"{image.size}".encode() + np.asarray(image.convert("RGB")).tobytes()).hexdigest()


# --- contact sheet ---------------------------------------------------------------------------------------------------
def contact_sheet(root: Path, path: Path, persons: int = 8) -> None:
    """Writes a picture of the stand-in below `root`: a row per domain, per person two images of different cameras."""
    marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
    height, width, gap, label = 128, 56, 10, 112
    planned = plans(marker["scale"], marker["seed"], marker["counts"])
    sheet = Image.new("RGB", (label + persons * (2 * width + gap), len(planned) * (height + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, (name, plan) in enumerate(planned.items()):
        y = gap + row * (height + gap)
        draw.text((8, y + height // 2), DATASETS[name], fill="black", font=font, anchor="lm")
        for column, pair in enumerate(_pairs(plan, persons)):
            for k, shot in enumerate(pair):
                with Image.open(root / shot.path) as image:
                    cell = image.convert("RGB").resize((width - 2, height), Image.Resampling.BICUBIC)
                sheet.paste(cell, (label + column * (2 * width + gap) + k * width, y))
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    sheet.save(aside, "PNG", optimize=True)
    aside.replace(path)


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


# --- command ---------------------------------------------------------------------------------------------------------
def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lda.data.standin",
        description="Draw stand-in pedestrians in the layouts of the real re-identification data sets.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the data sets")
    parser.add_argument("--scale", default="small", help="how many persons and images: " + ", ".join(SCALES))
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed: other people and places")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="write a picture (PNG) of all domains here")
    parser.add_argument(
        "--cuhk03-release", type=Path, metavar="DIR", help="write CUHK03's .mat files to this new folder"
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        marker = generate(options.output, options.scale, options.seed)
        if options.contact_sheet:
            contact_sheet(options.output, options.contact_sheet)
        if options.cuhk03_release:
            from lda.data.standin_cuhk03 import write_release  # it imports this module

            write_release(options.output, options.cuhk03_release)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that vanished
        print(f"error: {error.filename or options.output}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    images = sum(part["images"] for parts in marker["counts"].values() for part in parts.values())
    print(
        f"{options.output}: stand-in v{VERSION} {options.scale}, seed {options.seed}, {len(marker['counts'])} data "
        f"sets, {images:,} images ({time.perf_counter() - start:.1f} s), hash {marker['hash'][:12]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
