"""The folder of one unit: the truth about a run, as files. W&B and Optuna are views of it.

config.json: {"format": 2, "unit": hash, "training": hash, "config": {flat settings}}
env.json: commit, dirty flag, versions, host, device, command
metrics.jsonl: one line per logged step, append-only
checkpoint.pt: the newest complete state
result.json: {"format": 2} and the fields of `Result`; written last: a unit that has it is finished and never runs again
<name>.npz: what the method keeps beside it. buffer_bank.npz, of methods with a Buffer Bank: "domains" (K,), "layers"
    (L,); per layer of C channels "mean/<layer>" (K, C), "var/<layer>" (K, C) and "count/<layer>" (K,), the updates

Whoever writes or reads one of these files does it here, so that no name of a file or key stands twice. No torch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from lda.errors import UsageError, unknown
from lda.files import atomic, read_json, write_json
from lda.settings import explained

FORMAT = 2
"""Of config.json and result.json, and of a study's files. 1: before the key "format" was written."""

CONFIG = "config.json"
ENVIRONMENT = "env.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"

BUFFER_BANK = "buffer_bank"
"""Under this name a method keeps its Buffer Bank."""

_PACKAGES = ("lda-reid", "torch", "torchvision", "numpy", "pillow", "wandb", "optuna")
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
        rule: source_validation or oracle.
        score: what the rule says of this unit, a fraction.
        per_source: source -> mAP on its held-out identities; empty with oracle.
    """

    rule: str
    score: float
    per_source: dict[str, float]


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
    """

    sources: dict[str, str]
    target: str


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
        cuhk03_boxes, cuhk03_protocol: which CUHK03, whether or not it is among the data sets.
        selection: the score that ranks runs.
        data: "stand-in" (drawn images, no real data set) or "real".
        content: hashes of the images.
        versions: data set -> the release that was found.
        seconds: wall clock of the unit.
        images_per_second: training throughput.
        steps: training steps.
        trained_in: the unit that did the training, "" for this one.
        cost: what an image costs.
        parameters: numbers that the whole method learns or keeps fixed, heads included.
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
    cuhk03_boxes: str
    cuhk03_protocol: str
    selection: Selection
    data: Literal["stand-in", "real"]
    content: Content
    versions: dict[str, str]
    seconds: float
    images_per_second: float
    steps: int
    trained_in: str
    cost: Cost
    parameters: int
    effective_rank: float | None

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
        """Whether the unit has its result."""
        return (self.path / RESULT).is_file()

    def result(self) -> Result | None:
        """The finished unit's result, None while it is unfinished."""
        return Result.read(self.path) if self.finished else None

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says so far."""
        path = self.path / METRICS
        return read_metrics(path) if path.exists() else []


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
class _Named:
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
    named = checked_record(known.config, _Named, f"{path}: config.")
    return Unit(files, known.unit, known.training, known.config, **vars(named), result=files.result())


def training_of(folder: Path) -> str:
    """The training hash of a unit; "" for a folder whose config.json cannot be read, or is of another version."""
    try:
        return read_record(folder / CONFIG, _ConfigFile).training
    except UsageError:
        return ""


def is_unit(folder: Path) -> bool:
    """Whether this is the folder of a unit."""
    return (folder / CONFIG).is_file()


def unit_folders(parent: Path) -> list[Path]:
    """The folders of units right under `parent` (a trial's folder), by name."""
    return sorted(path.parent for path in parent.glob(f"*/{CONFIG}"))


def finished(folder: Path) -> bool:
    """Whether the unit of this folder has its result."""
    return UnitFolder(folder).finished


# --- a folder that is written ----------------------------------------------------------------------------------------


class RunFolder(UnitFolder):
    """The folder of a unit that runs.

    Args:
        unit, training: hashes; see `Result`.
        settings: flat, plain JSON types.

    Raises UsageError when the folder holds another unit's files: a folder never mixes two configurations.
    """

    def __init__(self, path: Path, unit: str, training: str, settings: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.unit, self.training = unit, training
        if is_unit(path):
            self._check_same(read_record(path / CONFIG, _ConfigFile), settings)
        content = {"format": FORMAT, "unit": unit, "training": training, "config": dict(settings)}
        write_json(path / CONFIG, content)

    def _check_same(self, theirs: _ConfigFile, settings: Mapping[str, Any]) -> None:
        if theirs.unit == self.unit:
            return
        every = {**settings, **theirs.config}
        keys = [key for key in every if theirs.config.get(key) != settings.get(key)] or ["the data"]
        raise UsageError(
            f"{self.path} holds another run (unit {theirs.unit}, this is {self.unit}); they differ in: "
            f"{', '.join(keys)}. Choose another --output or remove that folder"
        )

    def write_environment(self, device: str) -> None:
        """Say where and by what command the unit runs."""
        write_json(self.path / ENVIRONMENT, environment(device))

    def write_result(self, result: Result) -> None:
        """Finish the unit."""
        assert (result.unit, result.training) == (self.unit, self.training), "a result lies in its own unit's folder"
        result.write(self.path)

    def keep(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write what the method keeps under `name`."""
        with atomic(self.kept(name), "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and flush it."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int, last: bool = False) -> None:
        """Drop what metrics.jsonl says after `step` (a resumed run writes it again), and a half-written last line.

        `last`: the step is the run's last one, whose validation is made again too.
        """
        if (self.path / METRICS).exists():
            rows = self.rows()
            self.replace_rows(
                [row for row in rows if row["step"] < step or (row["step"] == step and (not last or "lr" in row))]
            )

    def replace_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make metrics.jsonl say this."""
        with atomic(self.path / METRICS) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


# --- files into records ----------------------------------------------------------------------------------------------


def read_record(path: Path, kind: type[_T]) -> _T:
    """A JSON file of this format as a record (a dataclass).

    Raises UsageError naming the file: missing, damaged, of another format, or with a key that is missing or wrong.
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
    """The rows of a metrics.jsonl. A killed run may leave a half-written last line: it is left out."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UsageError(f"{path}: line {number} is not valid JSON") from None
    return rows


def environment(device: str) -> dict[str, Any]:
    """What a run can name of its parents: code, versions, machine, command."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "host": platform.node(),
        "platform": platform.platform(),
        "device": device,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def made_by_this_code(folder: Path) -> bool:
    """Whether a unit's env.json names this commit and these package versions; False where that cannot be known."""
    try:
        then, now = read_json(folder / ENVIRONMENT), environment("")
    except UsageError:
        return False
    known = bool(now["commit"]) and not now["dirty"] and then.get("dirty") is False
    return known and all(then.get(key) == now[key] for key in ("commit", "versions"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    """Output of git in the source tree, empty where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
