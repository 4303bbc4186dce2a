"""Whether the files of a stand-in are those that were drawn, and what its hashes are made of."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lda.command import cores, progress
from lda.data.intact import Digests, damaged, digests_of, read_lists, write_lists
from lda.data.processes import map_processes
from lda.data.standin.draw import pixel_digest, plans
from lda.data.standin.layouts import FIRST, LAYOUTS, Plan
from lda.data.survey import DIGESTS, MARKER

VERSION = 1
"""Of the drawing. Results on different versions do not compare."""

_CHUNK = 256  # images a process decodes at a time
_ALONE = 6000  # up to so many images, starting processes costs more than it saves


def damage(root: Path, marker: Mapping[str, Any], names: Iterable[str] = ()) -> list[str]:
    """The files of some data sets (default: all) below `root` that are missing or not what was drawn.

    Their bytes are compared with STANDIN-digests.json. A tree from before there were such files is compared with its
    marker by its pixels, which takes as long as decoding it, and then gets one if it can be written; where it differs
    and no file shows why, the marker itself is named. Another version's drawing, and what was copied without the sets
    that its hash covers as well, cannot be judged: nothing is named.
    """
    chosen = [name for name in names or marker["counts"] if name in marker["counts"]]
    lists = read_lists(root / DIGESTS)
    broken = [path for name in chosen if name in lists for path in damaged(root, lists[name])]
    unlisted = {name for name in chosen if name not in lists and name in LAYOUTS}
    if not unlisted or marker.get("version") != VERSION:
        return broken
    planned = plans(marker["scale"], marker["seed"], [name for name in LAYOUTS if name in marker["counts"]])
    found: dict[str, Digests] = {}
    for wanted, together in hashes_of(marker).items():
        group = {name: planned[name] for name in together}
        if unlisted & group.keys() and all(_is_here(root, plan) for plan in group.values()):
            worse = _unlike(root, group, wanted)
            broken += worse
            if not worse:
                found |= {name: digests_of(root, paths(plan)) for name, plan in group.items()}
    if found and os.access(root, os.W_OK):
        write_lists(root / DIGESTS, {**lists, **found})
    return broken


def _is_here(root: Path, plan: Plan) -> bool:
    return (root / paths(plan)[0].partition("/")[0]).is_dir()


def hashes_of(marker: Mapping[str, Any]) -> dict[str, list[str]]:
    """Hash in a marker -> the data sets that it covers together."""
    drawn = [name for name in LAYOUTS if name in marker["counts"]]
    later = marker.get("hashes", {})
    first = [name for name in drawn if name in FIRST and name not in later]
    return {marker["hash"]: first} | {later[name]: [name] for name in drawn if name in later}


def paths(plan: Plan) -> list[str]:
    """Every file of a data set, from the root."""
    return [*(shot.path for shot in plan.shots), *plan.files]


def joint_hash(names: Iterable[str], digests: Mapping[str, str]) -> str:
    """Of files by name: `digests` are of decoded pixels, of other files of their bytes."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(names)).encode()).hexdigest()


def _unlike(root: Path, group: Mapping[str, Plan], wanted: str) -> list[str]:
    """The files that keep data sets from having this joint hash; the marker if each of them can be read."""
    shots = [shot.path for plan in group.values() for shot in plan.shots]
    files = [path for plan in group.values() for path in plan.files]
    chunks = [shots[start : start + _CHUNK] for start in range(0, len(shots), _CHUNK)]
    digests: dict[str, str] = {path: _digest(root / path) for path in files}
    look = functools.partial(_pixel_digests, root=root)
    with progress(f"{root}: comparing {len(shots):,} images with {MARKER}", len(shots)) as advance:
        for chunk, done in zip(
            chunks, map_processes(look, chunks, 1 if len(shots) <= _ALONE else cores()), strict=True
        ):
            digests |= zip(chunk, done, strict=True)
            advance(len(chunk))
    unread = [path for path, digest in digests.items() if not digest]
    return unread or ([] if joint_hash(digests, digests) == wanted else [MARKER])


def _pixel_digests(names: Iterable[str], root: Path) -> list[str]:
    return [_digest(root / name, pixels=True) for name in names]


def _digest(path: Path, pixels: bool = False) -> str:
    """Of a file's bytes or pixels, "" where there are none."""
    try:
        content = path.read_bytes()
        return pixel_digest(content) if pixels else hashlib.sha256(content).hexdigest()
    except (OSError, ValueError, SyntaxError):  # missing, or no image any more
        return ""
