"""The stand-in: drawn pedestrians on disk in the layouts of the real data sets, so that the real loaders read them.

A tree is written beside its place and renamed when it is complete, so a
folder with a `STANDIN.json` is whole.

STANDIN.json: {"version", "seed", "scale", "hash", "hashes": {data set: hash}, "counts": {data set: {part: {"ids",
"images", "cameras"}}}}. A hash covers every file's relative name with its decoded pixels (other files: their bytes),
not the encoded bytes: the same pixels compress differently under another zlib. `hash` is that of the sets which this
version began with (`layouts.FIRST`), together; a set that joined later has its own in `hashes`. So results on
the first ones stay what they are when another set joins. A tree from before gets the sets that it lacks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lda.command import cores, progress
from lda.data.cache import cache_dir
from lda.data.processes import map_processes
from lda.data.standin.draw import draw_chunk, plans
from lda.data.standin.layouts import FIRST, LAYOUTS, SCALES, Plan
from lda.data.survey import MARKER
from lda.errors import UsageError, unknown

VERSION = 1
"""Of the drawing. Results on different versions do not compare."""

_CHUNK = 64  # images a process draws at a time
_ALONE = 1500  # up to so many images, starting processes costs more than it saves


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
