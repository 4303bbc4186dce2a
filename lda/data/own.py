"""Data sets and protocols of your own: files that the environment variable `LDA_DATASETS` names.

It names YAML files, or folders with such (several: separated as in PATH). A file that has `sources` is a protocol, any
other a data set, whose images stand in a CSV of the same name beside it. A data set is ten lines, `crossing.yaml`:

    name: crossing             # on command lines and in files: small letters, digits and _
    title: My Crossing         # in print
    licence: CC BY 4.0
    citation: Author, "A Crossing", 2026
    version: 1.0
    cameras: true              # false: camera numbers say nothing; matches of the query's own camera count, too
    root: ~/data/crossing      # where the paths begin; without it, and if relative, the folder of this file

and `crossing.csv`, whose further columns are left alone (see `lda.data.table`):

    path,pid,camid,split
    a/0001.jpg,1,0,train

From then on the name works wherever that of a data set does. A target brings no sources with it: who trains for it is
said by a protocol, `mine.yaml`, whose data sets are anybody's. A target among the sources does not train for itself.

    name: mine
    title: My protocol
    sources: [market1501, msmt17, crossing]
    targets: [crossing, viper]
    source_part: all           # of the sources: train, as by default, or all (train, query and gallery)

The data sets that come with this software lie below --data-root, or are the stand-in without it; your own lie where
their files say.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import yaml

from lda import arguments
from lda.errors import UsageError, unknown

VARIABLE = "LDA_DATASETS"

_NAME = re.compile("[a-z][a-z0-9_]{0,39}")
_WORDS = ("all", "none")  # they stand in the place of a data set's name


@dataclass(frozen=True)
class OwnSet:
    """A data set, as its YAML file says.

    Attributes:
        name, title, licence, citation, version, cameras: see `lda.data.catalogue.Facts`.
        folder: where the paths of its table begin.
        table: the CSV file.
        place: "file:line" of its name, for messages.
    """

    name: str
    title: str
    licence: str
    citation: str
    version: str
    cameras: bool
    folder: Path
    table: Path
    place: str


@dataclass(frozen=True)
class OwnProtocol:
    """A protocol, as its YAML file says.

    Attributes:
        name, title, source_part: see `lda.protocols.Protocol`.
        sources, targets: data sets, and "file:line" of each, for messages.
        place: the same of its name.
    """

    name: str
    title: str
    sources: Mapping[str, str]
    targets: Mapping[str, str]
    source_part: Literal["train", "all"]
    place: str


def sets() -> Mapping[str, OwnSet]:
    """Your own data sets by name. Raises UsageError for a mistake in any of the files, naming the line."""
    return {own.name: own for own in _read() if isinstance(own, OwnSet)}


def protocols() -> Mapping[str, OwnProtocol]:
    """Your own protocols by name. Raises as `sets`."""
    return {own.name: own for own in _read() if isinstance(own, OwnProtocol)}


def _read() -> list[OwnSet | OwnProtocol]:
    found: dict[tuple[type, str], OwnSet | OwnProtocol] = {}
    for path in dict.fromkeys(_files()):
        own = _own(path, path.stat().st_mtime_ns)
        if (known := found.get((type(own), own.name))) is not None:
            raise UsageError(f"{own.place}: name: {own.name!r} is there already, in {known.place}; choose another")
        found[type(own), own.name] = own
    return list(found.values())


def _files() -> Iterator[Path]:
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        place = arguments.checked(VARIABLE, arguments.path, name)
        if not place.exists():
            raise UsageError(f"{VARIABLE}: {str(place)!r} is not there; expected a YAML file or a folder with such")
        found = [place] if not place.is_dir() else [p for p in place.iterdir() if p.suffix in (".yaml", ".yml")]
        yield from sorted(Path(os.path.abspath(path)) for path in found)


@functools.cache
def _own(path: Path, changed: int) -> OwnSet | OwnProtocol:
    """What a file says that was last changed then."""
    keys = _Keys(path)
    if keys.has("sources") or keys.has("targets"):
        return _protocol(keys)
    keys.check(("name", "title", "licence", "citation", "version", "cameras"), ("root",))
    folder = path.parent
    if keys.has("root"):
        folder /= arguments.checked(f"{keys.place('root')}: root", arguments.path, keys.text("root"))
    return OwnSet(
        name=keys.name(),
        title=keys.text("title"),
        licence=keys.text("licence"),
        citation=keys.text("citation"),
        version=keys.text("version"),
        cameras=keys.flag("cameras"),
        folder=folder,
        table=path.with_suffix(".csv"),
        place=keys.place("name"),
    )


def _protocol(keys: _Keys) -> OwnProtocol:
    keys.check(("name", "title", "sources", "targets"), ("source_part",))
    parts = ("train", "all")
    part = keys.text("source_part") if keys.has("source_part") else parts[0]
    if part not in parts:
        raise UsageError(f"{keys.place('source_part')}: source_part: {unknown('part', part, parts)}")
    sources, targets = keys.names("sources"), keys.names("targets")
    for target, place in targets.items():
        if not sources.keys() - {target}:
            raise UsageError(f"{place}: targets: {target!r} is the only source; nobody else trains for it")
    known = cast(Literal["train", "all"], part)
    return OwnProtocol(keys.name(), keys.text("title"), sources, targets, known, keys.place("name"))


class _Key(NamedTuple):
    line: int
    value: yaml.Node


class _Keys:
    """The keys of a YAML file, each with its line. All methods raise UsageError naming file and line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        node = self._parsed()
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{path}:1: expected keys and values, such as name: crossing; see lda/data/own.py")
        self._keys: dict[str, _Key] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in self._keys:
                raise UsageError(f"{path}:{line}: {key.value}: stands in line {self._keys[key.value].line} already")
            self._keys[str(key.value)] = _Key(line, value)

    def _parsed(self) -> Any:
        try:
            return yaml.compose(self._path.read_text(encoding="utf-8"), yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = " ".join(str(getattr(error, "problem", None) or error).split())
            raise UsageError(f"{self._path}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"{self._path}:1: cannot be read as YAML: {reason}") from None

    def check(self, needed: tuple[str, ...], more: tuple[str, ...]) -> None:
        """All that are needed are there, and none that is unknown."""
        for key, (line, _) in self._keys.items():
            if key not in (*needed, *more):
                raise UsageError(f"{self._path}:{line}: {unknown('key', key, (*needed, *more))}")
        if missing := [key for key in needed if key not in self._keys]:
            raise UsageError(f"{self._path}:1: lacks {', '.join(missing)}; see lda/data/own.py")

    def has(self, key: str) -> bool:
        """Whether it is there."""
        return key in self._keys

    def place(self, key: str) -> str:
        """file:line of a key."""
        return f"{self._path}:{self._keys[key].line}"

    def text(self, key: str) -> str:
        """One line of text; `version: 1.0` is as it is written."""
        node = self._keys[key].value
        text = node.value.strip() if isinstance(node, yaml.ScalarNode) else ""
        if not text or not text.isprintable():
            raise UsageError(f"{self.place(key)}: {key}: expected one line of text")
        return str(text)

    def flag(self, key: str) -> bool:
        """true or false."""
        text = self.text(key)
        if text not in ("true", "false"):
            raise UsageError(f"{self.place(key)}: {key}: expected true or false, got {text!r}")
        return text == "true"

    def name(self) -> str:
        """The name of what the file describes."""
        text = self.text("name")
        if not _NAME.fullmatch(text) or text in _WORDS:
            raise UsageError(
                f"{self.place('name')}: name: expected small letters, digits and _, 40 at most, beginning with a "
                f"letter, and none of {', '.join(_WORDS)}; got {arguments.shown(text)}"
            )
        return text

    def names(self, key: str) -> dict[str, str]:
        """Names in a list -> file:line of each."""
        node = self._keys[key].value
        found: dict[str, str] = {}
        for item in node.value if isinstance(node, yaml.SequenceNode) else []:
            place = f"{self._path}:{item.start_mark.line + 1}"
            if not isinstance(item, yaml.ScalarNode) or item.value in found:
                raise UsageError(f"{place}: {key}: expected names of data sets, each once")
            found[str(item.value)] = place
        if not found:
            raise UsageError(f"{self.place(key)}: {key}: expected a list of data sets, such as [market1501, msmt17]")
        return found
