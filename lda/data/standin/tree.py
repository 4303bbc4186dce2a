"""The stand-in: drawn pedestrians on disk in the layouts of the real data sets, so that the real loaders read them.

A tree is written beside its place, synced and renamed when it is complete, so a folder with a `STANDIN.json` is whole.

STANDIN.json: {"version", "seed", "scale", "hash", "hashes": {data set: hash}, "counts": {data set: {part: {"ids",
"images", "cameras"}}}}. A hash covers every file's relative name with its decoded pixels (other files: their bytes),
not the encoded bytes: the same pixels compress differently under another zlib. `hash` is that of the sets which this
version began with (`layouts.FIRST`), together; a set that joined later has its own in `hashes`. So results on
the first ones stay what they are when another set joins. A tree from before gets the sets that it lacks.
STANDIN-digests.json, beside it: data set -> file -> SHA-256 of its bytes here, compared before the first use in every
process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lda.command import cores, progress
from lda.data.cache import cache_dir
from lda.data.intact import digests_of, read_lists, write_lists
from lda.data.making import alone, new_folder, publish, remove_left_over, touch, unwritable
from lda.data.processes import map_processes
from lda.data.standin.damage import VERSION, damage, joint_hash, paths
from lda.data.standin.draw import draw_chunk, draw_shot, plans
from lda.data.standin.layouts import FIRST, LAYOUTS, SCALES
from lda.data.survey import DIGESTS, MARKER
from lda.errors import DamagedError, UsageError, unknown, warn
from lda.files import atomic, read_json, write_json

_CHUNK = 64  # images a process draws at a time
_ALONE = 1500  # up to so many images, starting processes costs more than it saves


def ensure_standin(scale: str = "small", seed: int = 0) -> Path:
    """The stand-in's root folder, generated in the cache folder on first use, and mended where it is damaged: what lies
    there is ours to make again. Raises UsageError for a bad scale."""
    _check(scale, seed)
    root = cache_dir() / f"standin-v{VERSION}-{scale}-s{seed}"
    try:
        marker = generate(root, scale, seed)
    except DamagedError:
        warn(f"{root / MARKER} is damaged or missing; the stand-in is drawn again")
        _discard(root)
        marker = generate(root, scale, seed)
    if not _mended(root, marker):
        _discard(root)
        generate(root, scale, seed)
    return root


def generate(output: Path, scale: str = "small", seed: int = 0, *, processes: int | None = None) -> dict[str, Any]:
    """Draws to `output` whatever of the stand-in is not there already; returns the content of its STANDIN.json.

    One process draws, others that ask meanwhile wait for it. `processes`: how many it uses, default one for every core.
    Raises UsageError if `output` holds anything else.
    """
    _check(scale, seed)
    output = output.expanduser().absolute()
    marker = _existing(output, scale, seed)
    if marker is not None and not _missing(marker):
        return marker
    with alone(output, f"drawing stand-in {scale}"):
        remove_left_over(output)
        marker = _existing(output, scale, seed)  # somebody else may have drawn it meanwhile
        missing = _missing(marker)
        if marker is not None and not missing:
            return marker
        with new_folder(output) as aside:
            drawn = _draw_tree(aside, scale, seed, missing, processes)
            if marker is not None:
                return _add_sets(aside, output, drawn)
            publish(aside, output)
            return drawn


def _missing(marker: dict[str, Any] | None) -> list[str]:
    """The data sets that a tree lacks."""
    return [name for name in LAYOUTS if marker is None or name not in marker["counts"]]


def _check(scale: str, seed: int) -> None:
    if scale not in SCALES:
        raise UsageError(unknown("scale", scale, SCALES))
    if seed < 0:
        raise UsageError(f"seed: {seed} is out of range, expected 0 or more")


# --- the tree --------------------------------------------------------------------------------------------------------
def read_marker(root: Path) -> dict[str, Any]:
    """The content of a tree's STANDIN.json. Raises DamagedError where there is none that can be read."""
    with suppress(DamagedError):
        marker = read_json(root / MARKER)
        if marker.keys() >= {"version", "scale", "seed", "hash", "counts"}:
            return marker
    raise DamagedError(f"{root} exists and is not a stand-in (no readable {MARKER}); name another folder")


def _existing(output: Path, scale: str, seed: int) -> dict[str, Any] | None:
    """The marker of a finished tree, None if `output` is free. Raises UsageError if it is anything else."""
    try:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return None
        os.stat(output / MARKER)  # which needs the right to look into the folder
    except PermissionError as error:
        raise unwritable(output, error, "read") from None
    except OSError:
        pass  # there is no marker, or no folder
    wanted = {"version": VERSION, "scale": scale, "seed": seed}
    marker = read_marker(output)
    found = {key: marker[key] for key in wanted}
    if found != wanted:
        raise UsageError(f"{output} holds another stand-in: {found}, wanted {wanted}; name another folder")
    return marker


def _add_sets(aside: Path, output: Path, drawn: dict[str, Any]) -> dict[str, Any]:
    """Moves data sets drawn in `aside` into a stand-in that lacks them; returns its new marker."""
    try:
        os.sync()  # before the marker says that they are here
        for folder in sorted(path for path in aside.iterdir() if path.is_dir()):
            try:
                folder.replace(output / folder.name)
            except OSError:
                if not (output / folder.name).is_dir():  # else another process was faster, with the same content
                    raise
        marker: dict[str, Any] = json.loads((output / MARKER).read_text(encoding="utf-8"))
        joined = {key: {**marker.get(key, {}), **drawn[key]} for key in ("hashes", "counts")}
        marker = {**drawn, "hash": marker["hash"], **joined}
        write_lists(output / DIGESTS, {**read_lists(output / DIGESTS), **read_lists(aside / DIGESTS)})
        write_json(output / MARKER, marker)
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
        for path in paths(plan):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
        for path, content in plan.files.items():
            (root / path).write_bytes(content)
            digests[path] = hashlib.sha256(content).hexdigest()
    draw = functools.partial(draw_chunk, root=root, scale=scale, seed=seed)
    with progress(f"drawing stand-in {scale} (seed {seed}): {shots:,} images", shots) as advance:
        for drawn in map_processes(draw, chunks, processes or (1 if shots <= _ALONE else cores())):
            digests.update(drawn)
            advance(len(drawn))
            touch(root)
    first = [path for name in FIRST if name in planned for path in paths(planned[name])]
    marker = {
        "version": VERSION,
        "scale": scale,
        "seed": seed,
        "hash": joint_hash(first, digests),
        "hashes": {name: joint_hash(paths(plan), digests) for name, plan in planned.items() if name not in FIRST},
        "counts": {name: plan.counts for name, plan in planned.items()},
    }
    write_lists(root / DIGESTS, {name: digests_of(root, paths(plan)) for name, plan in planned.items()})
    write_json(root / MARKER, marker)
    return marker


# --- damage ----------------------------------------------------------------------------------------------------------


def _mended(root: Path, marker: dict[str, Any]) -> bool:
    """Draw again what is damaged or missing in a tree. False if the whole tree has to be drawn again."""
    broken = damage(root, marker)
    if not broken:
        return True
    warn(f"{root}: {len(broken):,} files of the stand-in are damaged, {broken[0]} first; it is drawn again")
    with alone(root, "drawing what is damaged of the stand-in"):
        if MARKER in broken:
            return False
        _draw_again(root, marker, set(broken))
        if damage(root, marker):  # another library's file has other bytes; whether it has the same pixels is to be seen
            (root / DIGESTS).unlink(missing_ok=True)
        return not damage(root, marker)


def _draw_again(root: Path, marker: dict[str, Any], broken: set[str]) -> None:
    for name, plan in plans(marker["scale"], marker["seed"], marker["counts"]).items():
        for path in broken & plan.files.keys():
            _write(root / path, plan.files[path])
        for shot in plan.shots:
            if shot.path in broken:
                _write(root / shot.path, draw_shot(name, shot, marker["scale"], marker["seed"]))


def _write(path: Path, content: bytes) -> None:
    with atomic(path, "wb") as file:
        file.write(content)


def _discard(root: Path) -> None:
    """Remove a damaged tree, at once as others see it; unless somebody else has just drawn another."""
    with alone(root, "removing a damaged stand-in"), new_folder(root) as aside:
        if root.is_dir() and not _is_sound(root):
            root.replace(aside)


def _is_sound(root: Path) -> bool:
    try:
        return not damage(root, read_marker(root))
    except DamagedError:
        return False
