"""The folder of one unit: the truth about a run, as files. W&B and Optuna are views of it.

config.json: {"format": 2, "unit": hash, "training": hash, "config": {flat settings}}
env.json: hash of the code, commit, dirty flag, versions, host, device, command
metrics.jsonl: one line per logged step, append-only
checkpoint.pt: the newest complete state
result.json: {"format": 2} and the fields of `Result`; written last: a unit that has it is finished and never runs again
without-<source>/: with the rule leave_one_source_out, the unit that trained without it: a folder of the same kind
.lock: of the process that works here, while it does
queries.npz: of the N queries of the target, all test splits one after the other: "average_precisions" (N,), nan where a
    query has no match, and "cmc" (splits, 50)
<name>.npz: what the method keeps beside it. buffer_bank.npz, of methods with a Buffer Bank: "domains" (K,), "layers"
    (L,); per layer of C channels "mean/<layer>" (K, C), "var/<layer>" (K, C) and "count/<layer>" (K,), the updates

Whoever writes or reads one of these files does it here, so that no name of a file or key stands twice. No torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from lda.code import this_code
from lda.errors import DamagedError, UsageError, unknown, warn
from lda.files import atomic, damage_of_zip, held, read_json, remove_leftovers, sync_file, write_json
from lda.settings import explained

FORMAT = 2
"""Of config.json and result.json, and of a study's files. 1: before the key "format" was written."""

CONFIG = "config.json"
ENVIRONMENT = "env.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"
_FILES = (CONFIG, ENVIRONMENT, METRICS, CHECKPOINT, RESULT, "*.npz")

BUFFER_BANK = "buffer_bank"
"""Under this name a method keeps its Buffer Bank."""

QUERIES = "queries"
"""Under this name a unit keeps what its test says query by query."""

_T = TypeVar("_T")
_own_keys_only = with_config(ConfigDict(extra="forbid"))


def print_method(title: str, reconstructed: str, target_data: bool) -> str:
    """A method's name in print, marked where a reader must know more before comparing: `RaMoE [reconstruction]`."""
    marks = ["reconstruction"] * bool(reconstructed) + ["target images"] * target_data
    return f"{title} [{', '.join(marks)}]" if marks else title


# --- the content of result.json --------------------------------------------------------------------------------------


@_own_keys_only
@dataclass(frozen=True)
class Selection:
    """The score that ranks runs.

    Attributes:
        rule: see `lda.groups.Rule`.
        score: what the rule says of this unit, a fraction.
        per_source: source -> mAP on its held-out identities; empty where none are held out.
        scores: what every rule says whose number is known, the target's own (oracle) among them.
        left_out: source -> mAP on it of a training without it; empty but for leave_one_source_out.
    """

    rule: str
    score: float
    per_source: dict[str, float]
    scores: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)


@_own_keys_only
@dataclass(frozen=True)
class Cost:
    """What an image costs, in passes through the plain network.

    Attributes:
        train_passes: forward and backward passes per training image and step.
        test_forwards: forward passes per test image.
        test: how two images are compared: "vector" by cosine, or "pairs" by a matcher on both encodings.
        pair_cost: multiply-adds of comparing a pair by such a matcher; None: one product of two vectors.
    """

    train_passes: float
    test_forwards: float
    test: Literal["vector", "pairs"]
    pair_cost: int | None = None


@_own_keys_only
@dataclass(frozen=True)
class Content:
    """Hashes of the images.

    Attributes:
        sources: source -> hash of what was trained on.
        target: hash of the query and gallery images.
        proxy: of the proxy domain's; "" where there is none.
    """

    sources: dict[str, str]
    target: str
    proxy: str = ""


@_own_keys_only
@dataclass(frozen=True)
class Weights:
    """The file of weights that a network began with.

    Attributes:
        sha256: of its bytes.
        matched: tensors of the network that it filled.
        needed: tensors that the network has, its classifier apart.
    """

    sha256: str
    matched: int
    needed: int


@_own_keys_only
@dataclass(frozen=True)
class DataSet:
    """What a data set asks of whoever uses it.

    Attributes:
        licence, citation: one line each; "not stated" where nothing is known.
    """

    licence: str
    citation: str


@_own_keys_only
@dataclass(frozen=True)
class Split:
    """The metrics of one test split; see `Result`."""

    mAP: float  # noqa: N815 - the field's spelling
    rank1: float
    rank5: float
    rank10: float
    mINP: float  # noqa: N815
    num_valid_queries: int


@_own_keys_only
@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished unit says of itself. Fractions, not percent.

    Attributes:
        unit: hash that names the result: `training`, target, selection and test settings.
        training: hash that names what was learnt.
        protocol: see lda/protocols.py.
        target: the unseen data set.
        seed: of weights, batches and augmentation.
        method: name of its file in lda/methods.
        title: the method in print, with these settings.
        reconstructed: what in the method is our reading because nothing was published; "" for a published method.
        reference: the method's paper.
        target_data: the method looked at unlabelled images of the target.
        mAP: mean average precision over valid queries, mean over splits.
        rank1, rank5, rank10: CMC, mean over splits.
        mINP: mean inverse negative penalty, mean over splits.
        num_valid_queries: queries with a match in the gallery, mean over splits.
        num_splits: test splits of the target that were evaluated.
        mAP_std, rank1_std: sample standard deviation over splits; absent with one split.
        splits: the metrics of every split; absent with one split.
        inference: the method's own test settings in print, such as "fused"; "" where it has none.
        flip_test: features of image and mirror image are added.
        average_precision: the formula, step or trapezoid.
        reranking: in print, such as "k-reciprocal re-ranking (20, 6, 0.3)": k1, k2, lambda; absent without one.
        cuhk03_boxes, cuhk03_protocol: which CUHK03, whether or not it is among the data sets.
        selection: the score that ranks runs.
        data: "stand-in" (drawn images, no real data set) or "real".
        content: hashes of the images.
        versions: data set -> the release that was found.
        data_sets: data set -> its licence and citation; empty in what older versions wrote.
        seconds: wall clock of the unit.
        images_per_second: training throughput.
        steps: training steps.
        trained_in: the unit that did the training, "" for this one.
        cost: what an image costs.
        parameters: numbers that the whole method learns or keeps fixed, heads included.
        kept: names of the files that the method kept beside this one; see `UnitFolder.kept`.
        weights: the file that the network began with; absent where it began at random.
        effective_rank: of the queries' features; None where images are not compared by a vector.
    """

    unit: str
    training: str
    protocol: str
    target: str
    seed: int
    method: str
    title: str
    reconstructed: str
    reference: str = ""
    target_data: bool
    mAP: float  # noqa: N815 - the field's spelling
    rank1: float
    rank5: float
    rank10: float
    mINP: float  # noqa: N815
    num_valid_queries: float
    num_splits: int
    mAP_std: float | None = None  # noqa: N815
    rank1_std: float | None = None
    splits: tuple[Split, ...] = ()
    inference: str
    flip_test: bool
    average_precision: str
    reranking: str = "none"
    cuhk03_boxes: str
    cuhk03_protocol: str
    selection: Selection
    data: Literal["stand-in", "real"]
    content: Content
    versions: dict[str, str]
    data_sets: dict[str, DataSet] = field(default_factory=dict)
    seconds: float
    images_per_second: float
    steps: int
    trained_in: str
    cost: Cost
    parameters: int
    effective_rank: float | None
    kept: tuple[str, ...] = ()
    weights: Weights | None = None

    def write(self, folder: Path) -> None:
        """Write result.json, which finishes the unit in `folder`. Raises ValueError for nan or infinity."""
        content = dataclasses.asdict(self)
        absent = [f.name for f in dataclasses.fields(self) if content[f.name] == f.default]
        write_json(folder / RESULT, {"format": FORMAT, **{k: v for k, v in content.items() if k not in absent}})

    @classmethod
    def read(cls, folder: Path) -> Result:
        """What result.json in `folder` says.

        Raises UsageError naming the file, and the key that is missing, unknown or of a wrong type.
        """
        return read_record(folder / RESULT, cls)


# --- a folder that is read -------------------------------------------------------------------------------------------


class UnitFolder:
    """The files of a unit by name, whether or not they are there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoint(self) -> Path:
        """The newest complete state."""
        return self.path / CHECKPOINT

    def kept(self, name: str) -> Path:
        """The file of what the method keeps under `name`."""
        return self.path / f"{name}.npz"

    @property
    def finished(self) -> bool:
        """Whether the unit has its result. One that is damaged is none."""
        return self._if_whole(read_json) is not None

    def result(self) -> Result | None:
        """The finished unit's result, None while it is unfinished; a damaged one is warned of, and none.

        Raises UsageError for a result of another format.
        """
        return self._if_whole(lambda path: Result.read(path.parent))

    def _if_whole(self, read: Callable[[Path], _T]) -> _T | None:
        path = self.path / RESULT
        if not os.path.lexists(path):
            return None
        try:
            return read(path)
        except DamagedError as error:
            warn(f"{error}; the unit counts as unfinished")
            return None

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says so far. A file that cannot be read is warned of and says nothing."""
        return read_metrics(self.path / METRICS) if os.path.lexists(self.path / METRICS) else []

    def first_rows(self, number: int) -> list[dict[str, Any]] | None:
        """The first rows of metrics.jsonl; None where not all of them are there and whole."""
        try:
            found = _lines(self.path / METRICS)[:number]
        except OSError:
            return [] if number == 0 else None
        rows = [row for row in found if row is not None]
        return rows if len(rows) == number else None

    def damaged_kept(self, names: Iterable[str] = ()) -> list[str]:
        """A line for every file of what the method keeps that cannot be read, naming it and what is wrong.

        names: under which it kept something; these are missed, too.
        """
        paths = sorted({*self.path.glob("*.npz"), *map(self.kept, names)})
        damages = {path: damage_of_zip(path) if path.exists() else "missing" for path in paths}
        return [f"{path}: {damage}" for path, damage in damages.items() if damage]


@dataclass(frozen=True)
class Unit:
    """A unit as its folder tells of it.

    Attributes:
        folder: its files.
        unit, training: hashes; see `Result`.
        settings: flat, as the run was given them.
        target, seed, method: of the settings.
        result: None while the unit is unfinished.
    """

    folder: UnitFolder
    unit: str
    training: str
    settings: Mapping[str, Any]
    target: str
    seed: int
    method: str
    result: Result | None


@dataclass(frozen=True)
class Named:
    """The settings that name a unit for people; every run has them."""

    target: str
    seed: int
    method: str


@dataclass(frozen=True)
class _ConfigFile:
    unit: str
    training: str
    config: dict[str, Any]


def read_unit(folder: Path) -> Unit:
    """What a unit's folder says.

    Raises UsageError naming file and key when it is none, damaged or of another format.
    """
    files, path = UnitFolder(folder), folder / CONFIG
    known = read_record(path, _ConfigFile)
    named = checked_record(known.config, Named, f"{path}: config.")
    return Unit(files, known.unit, known.training, known.config, **vars(named), result=files.result())


def unit_of(folder: Path) -> str:
    """The hash of a unit; "" for a folder whose config.json cannot be read, or is of another version."""
    return _hash_of(folder, "unit")


def training_of(folder: Path) -> str:
    """The training hash of a unit; "" for a folder whose config.json cannot be read, or is of another version."""
    return _hash_of(folder, "training")


def _hash_of(folder: Path, key: Literal["unit", "training"]) -> str:
    try:
        return str(getattr(read_record(folder / CONFIG, _ConfigFile), key))
    except DamagedError as error:
        warn(f"{error}; {folder} is passed over")
    except UsageError:
        pass  # another version's, which is no damage
    return ""


def is_unit(folder: Path) -> bool:
    """Whether this is the folder of a unit; one that lost its config.json is one too, or it would vanish unseen."""
    return any(os.path.lexists(folder / name) for name in (CONFIG, CHECKPOINT, RESULT))


def unit_folders(parent: Path) -> list[Path]:
    """The folders of units right under `parent` (a trial's folder), by name."""
    return sorted(filter(is_unit, parent.glob("*")))


def is_finished(folder: Path, unit: str) -> bool:
    """Whether the folder holds the result of the unit of this hash, and it can be read."""
    return _own_result(folder, unit) is not None


def _own_result(folder: Path, unit: str) -> Result | None:
    try:
        result = UnitFolder(folder).result()
    except UsageError:
        return None
    return result if result is not None and result.unit == unit else None


def is_whole(folder: Path, unit: str) -> bool:
    """Whether the folder holds the finished unit of this hash and nothing that tells of it is damaged."""
    result = _own_result(folder, unit)
    if result is None or unit_of(folder) != unit or UnitFolder(folder).damaged_kept(result.kept):
        return False
    try:
        rows = _lines(folder / METRICS)
    except OSError:
        return False
    return bool(rows) and all(rows) and rows[-1] is not None and rows[-1]["step"] == result.steps


def record_files(folder: Path) -> list[Path]:
    """What tells of a finished unit, its weights apart: the files that are there."""
    named = [folder / name for name in (CONFIG, ENVIRONMENT, METRICS, RESULT)]
    return [path for path in (*named, *sorted(folder.glob("[!.]*.npz"))) if path.is_file()]


def finished(folder: Path) -> bool:
    """Whether the unit of this folder has its result."""
    return UnitFolder(folder).finished


# --- a folder that is written ----------------------------------------------------------------------------------------


class RunFolder(UnitFolder):
    """The folder of a unit that runs: asked for its result, and `owned` to write into it.

    Args:
        unit, training: hashes; see `Result`.
        settings: flat, plain JSON types.

    Attributes:
        anonymous: no config.json that can be read said whose folder it is when it was taken.
    """

    def __init__(self, path: Path, unit: str, training: str, settings: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.unit, self.training, self._settings = unit, training, settings
        self.anonymous = False
        self._logged = 0

    def known_result(self) -> Result | None:
        """The result, where the folder is known to be this unit's and has one.

        Raises UsageError when the folder holds another unit's files: it never mixes two configurations.
        """
        return self.own_result() if self._check_config() else None

    def own_result(self) -> Result | None:
        """The result, None while there is none. Raises UsageError for another unit's."""
        result = self.result()
        if result is not None:
            self.check_hash(result.unit)
        return result

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Let no other process write here meanwhile, and put in order what damage and killed processes left.

        Raises FolderInUseError naming the process that does, and UsageError as `known_result`.
        """
        if self.path.is_symlink() and not self.path.exists():
            warn(f"{self.path} is a link to a folder that is gone; removed, the unit runs here")
            self.path.unlink()
        with held(self.path):
            remove_leftovers(self.path, _FILES)
            for name in _FILES:
                for path in self.path.glob(name):
                    _move_aside(path)
            self.anonymous = not self._check_config()
            yield

    def _check_config(self) -> bool:
        """Whether config.json says that the folder is this unit's. Raises UsageError when it is another's."""
        path = self.path / CONFIG
        if not os.path.lexists(path):
            return False
        try:
            theirs = read_record(path, _ConfigFile)
        except DamagedError as error:
            warn(f"{error}; it is made again")
            return False
        every = {**self._settings, **theirs.config}
        keys = [key for key in every if theirs.config.get(key) != self._settings.get(key)] or ["the data"]
        self.check_hash(theirs.unit, f"; they differ in: {', '.join(keys)}")
        return True

    def check_hash(self, theirs: str, more: str = "") -> None:
        """Raises UsageError where this is not the unit's hash."""
        if theirs != self.unit:
            raise UsageError(
                f"{self.path} holds another run (unit {theirs}, this is {self.unit}){more}. Choose another --output or "
                "remove that folder"
            )

    def write_config(self) -> None:
        """Say whose folder it is."""
        content = {"format": FORMAT, "unit": self.unit, "training": self.training, "config": dict(self._settings)}
        write_json(self.path / CONFIG, content)

    def write_environment(self, device: str) -> None:
        """Say where and by what command the unit runs."""
        write_json(self.path / ENVIRONMENT, environment(device))

    def write_result(self, result: Result) -> None:
        """Finish the unit; whatever it consists of is on the disk before."""
        assert (result.unit, result.training) == (self.unit, self.training), "a result lies in its own unit's folder"
        self.sync_rows()
        result.write(self.path)

    def keep(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write what the method keeps under `name`."""
        with atomic(self.kept(name), "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and flush it; `sync_rows` brings it to the disk."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._logged += 1

    def sync_rows(self) -> int:
        """Bring metrics.jsonl to the disk: before a checkpoint that goes on from here. Returns its number of rows."""
        sync_file(self.path / METRICS)
        return self._logged

    def replace_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make metrics.jsonl say this: the rows before the step from which the unit goes on."""
        with atomic(self.path / METRICS) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        self._logged = len(rows)


def _move_aside(path: Path) -> None:
    """Make room for a file where a folder stands, which may hold anything."""
    if path.is_dir() and not path.is_symlink():
        others = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
        other = next(other for other in others if not os.path.lexists(other))
        path.rename(other)
        warn(f"{path} is a folder where a file belongs; it is {other.name} now")


# --- files into records ----------------------------------------------------------------------------------------------


def read_record(path: Path, kind: type[_T]) -> _T:
    """A JSON file of this format as a record (a dataclass).

    Raises DamagedError naming the file where it is missing or damaged, and UsageError where it is of another format, or
    has a key that is missing or wrong.
    """
    content = read_json(path)
    found = content.pop("format", 1)
    if found == 1:
        raise UsageError(
            f"{path} was written by an older version (format 1); run it again, or use the version that wrote it"
        )
    if found != FORMAT:
        raise UsageError(f"{path}: expected format {FORMAT}, got {found!r}; a newer version wrote it, update this one")
    return checked_record(content, kind, f"{path}: ")


def checked_record(content: Mapping[str, Any], kind: type[_T], where: str) -> _T:
    """Plain JSON types as a record. Raises UsageError that begins with `where` and names the key."""
    hashable: Any = kind  # mypy takes the class of a dataclass for unhashable
    try:
        record: _T = _adapter(hashable).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"]]
        key = ".".join(location)
        if first["type"] in ("missing", "missing_argument"):
            raise UsageError(f"{where}{key} is missing") from None
        if first["type"] == "unexpected_keyword_argument":
            raise UsageError(f"{where}{key}: {unknown('key', location[-1], _keys(kind, location[:-1]))}") from None
        raise UsageError(f"{where}{key}: {explained(first)}") from None
    return record


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _keys(kind: Any, location: Sequence[str]) -> list[str]:
    """Valid keys at a place in a record: a walk through its dataclasses, and one step into a list."""
    for part in location:
        kind = get_type_hints(kind)[part] if dataclasses.is_dataclass(kind) else get_args(kind)[0]
    return [f.name for f in dataclasses.fields(kind)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. Lines that are damaged are warned of and left out, as is a file that cannot be read;
    a last line without its end is what a killed run leaves, and left out without a word."""
    try:
        found = _lines(path)
    except OSError as error:
        warn(f"{path}: expected lines of JSON: {error}; left out")
        return []
    bad = [str(number) for number, row in enumerate(found, start=1) if row is None]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        warn(f"{path}: line {', '.join(bad[:5])}{more}: expected a JSON object with a step; left out")
    return [row for row in found if row is not None]


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """What every line that has its end says; None for one that is damaged."""
    return [_row(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def environment(device: str) -> dict[str, Any]:
    """What a run can name of its parents: code, versions, machine, command."""
    code = this_code()
    return {
        "code": code.digest,
        "commit": code.commit,
        "dirty": code.dirty,
        "python": platform.python_version(),
        "versions": code.versions,
        "host": platform.node(),
        "platform": platform.platform(),
        "device": device,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def made_by_this_code(folder: Path) -> bool:
    """Whether a unit's env.json names this very code and these package versions; False where that cannot be known."""
    try:
        then, code = read_json(folder / ENVIRONMENT), this_code()
    except UsageError as error:
        warn(f"{error}; what code made the unit is not known")
        return False
    return then.get("code") == code.digest and then.get("versions") == code.versions
