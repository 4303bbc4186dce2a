"""Reading a data set's folder: find it, list it, count it, and say everything that is wrong at once.

A loader describes the layouts that circulate (`Layout`) and the grammar of the file names (`Grammar`); a `Survey` does
the looking and collects `Finding`s instead of stopping at the first. Rules shared by all data sets: names are matched
on the base name, anchored, never on the path; folder names are matched without regard to case; clutter is skipped and
counted; everything is sorted.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lda.data.cache import cache_dir
from lda.data.records import ImageRecord, ReidDataset, Split
from lda.errors import UsageError

CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
"""Left behind by file managers and archivers, in lower case; names that begin with a dot are clutter as well."""

SHOWN = 3  # offending names quoted in one message

MARKER = "STANDIN.json"
DIGESTS = "STANDIN-digests.json"
"""Beside the marker: data set -> file -> SHA-256 of its bytes."""


class Severity(enum.IntEnum):
    """What a finding does to the reading of a data set."""

    NOTE = 0  # listed by the doctor
    WARNING = 1  # told, never refused
    STRICT = 2  # refused unless strict is off
    ERROR = 3  # always refused: no sound list of images can be made


@dataclass(frozen=True)
class Finding:
    """One thing worth telling: it names the file and the remedy."""

    severity: Severity
    text: str


@dataclass(frozen=True)
class Count:
    """Size of one part. None = not published, not compared."""

    ids: int | None
    images: int
    cameras: int | None = None

    @classmethod
    def of(cls, records: Sequence[ImageRecord], ignored_pids: Iterable[int] = ()) -> Count:
        """Counts of a list of records. `ignored_pids` (distractors) count as images, not as identities."""
        pids = {record.pid for record in records}.difference(ignored_pids)
        return cls(len(pids), len(records), len({record.camid for record in records}))

    def __str__(self) -> str:
        return f"{self.ids if self.ids is not None else '-'} ids, {self.images} images"


class Grammar:
    """File names of one data set: a pattern for the stem and the extension of the original release.

    Any case and any common image extension is accepted, also doubled (".jpg.jpg" is seen in Market-1501 copies).
    """

    def __init__(self, stem: str, extension: str, example: str) -> None:
        self.extension = extension
        self.example = example
        self._pattern = re.compile(rf"(?:{stem})(?P<extension>(?:\.(?:jpe?g|png|bmp))+)", re.IGNORECASE)

    def match(self, name: str) -> re.Match[str] | None:
        """The match of a base name from its first to its last character, or None."""
        return self._pattern.fullmatch(name)


@dataclass(frozen=True)
class Layout:
    """One way in which a data set is laid out on disk.

    Attributes:
        name: what the layout is called in messages, usually the release.
        folders: places below the data root, most specific name first.
        parts: names that must exist inside.
        grammar: file names in `images` (needed to recognise a folder that is not under one of the expected names).
        images: the part, among `parts`, that holds images directly; "" = the folder itself.
    """

    name: str
    folders: tuple[str, ...]
    parts: tuple[str, ...] = ()
    grammar: Grammar | None = None
    images: str = ""

    def __str__(self) -> str:
        inside = f"/{{{','.join(self.parts)}}}" if self.parts else ""
        example = f", names like {self.grammar.example}" if self.grammar else ""
        return f"{self.folders[0]}{inside}{example}"


@dataclass(frozen=True)
class Found:
    """A layout and the folder in which all of its parts exist."""

    layout: Layout
    folder: Path

    def part(self, name: str) -> Path:
        """The path of a part, whatever its case on disk."""
        path = child(self.folder, name)
        if path is None:
            raise UsageError(f"{self.folder / name}: not found")
        return path


@dataclass(frozen=True)
class StandIn:
    """What STANDIN.json says about generated data."""

    content_hash: str  # of the first data sets together
    counts: Mapping[str, Mapping[str, Mapping[str, int]]]  # data set -> part -> {"ids", "images", "cameras"}
    hashes: Mapping[str, str] = field(default_factory=dict)  # data set that joined later -> its own
    root: Path | None = None  # folder of the marker
    content: Mapping[str, Any] = field(default_factory=dict)  # all of the marker

    def hash_of(self, name: str) -> str:
        """The content hash that results on data set `name` depend on."""
        return self.hashes.get(name, self.content_hash)

    def count(self, name: str, part: str) -> Count | None:
        """The generated counts of one part, None where the generator states none."""
        entry = self.counts.get(name, {}).get(part)
        return Count(entry.get("ids"), entry["images"], entry.get("cameras")) if entry else None


@dataclass
class Survey:
    """The reading of one data set below one root.

    Attributes:
        name, title: in code, and in print.
        root: folder given by the user: the parent of the data set's folder, or that folder itself.
        findings: everything found, in order.
        found: where the data set lies, once located.
        also_found: other places, or other layouts, that would have served.
        absent: True if the root holds nothing of the data set, not even something of a similar name.
        standin: the stand-in's marker, None for real data.
        counts: part -> (counted, expected) for every part compared.
    """

    name: str
    title: str
    root: Path
    findings: list[Finding] = field(default_factory=list)
    found: Found | None = None
    also_found: list[Found] = field(default_factory=list)
    absent: bool = False
    standin: StandIn | None = None
    counts: dict[str, tuple[Count, Count | None]] = field(default_factory=dict)

    # --- telling -----------------------------------------------------------------------------------------------------
    def note(self, text: str) -> None:
        """Record something that changes nothing."""
        self.findings.append(Finding(Severity.NOTE, text))

    def warn(self, text: str) -> None:
        """Record something the user should know."""
        self.findings.append(Finding(Severity.WARNING, text))

    def strict(self, text: str) -> None:
        """Record a difference from the published data set: refused unless strict is off."""
        self.findings.append(Finding(Severity.STRICT, text))

    def error(self, text: str) -> None:
        """Record what makes the data set unreadable."""
        self.findings.append(Finding(Severity.ERROR, text))

    def refused(self, strict: bool = True) -> list[Finding]:
        """The findings that forbid the use of the data set."""
        limit = Severity.STRICT if strict else Severity.ERROR
        return [finding for finding in self.findings if finding.severity >= limit]

    def dataset(
        self,
        version: str,
        train: Sequence[ImageRecord] = (),
        query: Sequence[ImageRecord] = (),
        gallery: Sequence[ImageRecord] = (),
        distractor_pids: Iterable[int] = (),
        splits: Sequence[Split] = (),
        archive: Path | None = None,
    ) -> ReidDataset:
        """What was read, as a data set, with its content hashes (`content_hash`; for the stand-in, STANDIN.json's).

        `archive`: the file of the data set that the images were unpacked from, where they were.
        """
        if splits:
            query, gallery = splits[0].query, splits[0].gallery
        dataset = ReidDataset(
            name=self.name,
            root=self.found.folder if self.found else self.root,
            train=tuple(train),
            query=tuple(query),
            gallery=tuple(gallery),
            version=version,
            standin=self.standin is not None,
            distractor_pids=frozenset(distractor_pids),
            splits=tuple(splits),
        )
        if self.standin:
            drawn = self.standin.hash_of(self.name)
            return replace(dataset, data_hash=drawn, test_hash=drawn)
        tests = [part for split in dataset.test_splits for part in (split.query, split.gallery)]
        return replace(
            dataset,
            data_hash=content_hash([dataset.train, *tests], dataset.root, archive),
            test_hash=content_hash(tests, dataset.root, archive),
        )

    # --- finding -----------------------------------------------------------------------------------------------------
    def locate(self, *layouts: Layout) -> Found | None:
        """The first layout, in the order given, whose parts all exist; an error finding with all layouts if none does.

        Looks under every name of a layout, one level below it (archives unpacked into a folder of their own name), at
        the tail of each name and at the root itself; the last two only where file names fit the grammar.
        """
        if not _is_dir(self.root):
            self.error(f"data root {self.root} does not exist or is not a folder")
            return None
        complete, partial = [], []
        for layout in layouts:
            for folder in _candidates(self.root, layout):
                missing = [part for part in layout.parts if child(folder, part) is None]
                if not missing:
                    complete.append(Found(layout, folder))
                elif len(missing) < len(layout.parts):
                    partial.append((len(missing), f"{folder} lacks {', '.join(missing)}"))
        if not complete:
            self._not_found(layouts, [text for _, text in sorted(partial)])
            return None
        complete.sort(key=lambda found: not _recognised(found.folder, found.layout))  # stable: keeps the given order
        self.found = complete[0]
        self.standin = read_standin(self.found.folder)
        self.also_found = [other for other in complete[1:] if not _same(other.folder, self.found.folder)]
        if self.also_found:
            others = sorted({str(other.folder) for other in self.also_found})
            self.note(f"using {self.found.folder}; also found {', '.join(others)}")
        return self.found

    def _not_found(self, layouts: Sequence[Layout], partial: Sequence[str]) -> None:
        expected = " or ".join(dict.fromkeys(str(layout) for layout in layouts))
        if partial:
            self.error(f"{self.title} is incomplete: {partial[0]}; expected {expected}")
            return
        wanted = {name.split("/")[0] for layout in layouts for name in layout.folders}
        near = _near(self.root, wanted)
        self.absent = not near
        hint = f"; similar names there: {', '.join(near)}" if near else ""
        self.error(f"{self.title} not found in {self.root}: expected {expected}{hint}")

    # --- listing -----------------------------------------------------------------------------------------------------
    def images(self, folder: Path, grammar: Grammar) -> list[tuple[str, re.Match[str]]]:
        """(base name, match) of every image of one folder, sorted; names that do not fit become a strict finding."""
        names, clutter = listing(folder)
        if clutter:
            self.note(f"{folder}: skipped {len(clutter)} clutter file(s), e.g. {clutter[0]}")
        matched = [(name, match) for name in names if (match := grammar.match(name))]
        bad = [name for name in names if not grammar.match(name)]
        if bad:
            self.strict(
                f"{folder}: {len(bad)} name(s) do not look like {grammar.example}: {quoted(bad)}; remove or rename them"
            )
        odd = [name for name, match in matched if match["extension"] != grammar.extension]
        if odd:
            self.note(f"{folder}: {len(odd)} file(s) do not end in {grammar.extension}: {quoted(odd)}")
        if not matched:
            self.error(f"{folder} holds no image named like {grammar.example}; unpack the archive again")
        return matched

    def records(self, folder: Path, grammar: Grammar, cameras: int) -> list[ImageRecord]:
        """The images of one folder whose names state person and camera (groups `pid` and `camera`), sorted by name.

        An error finding names the files whose camera lies outside 1..cameras.
        """
        matched = self.images(folder, grammar)
        outside = [name for name, match in matched if not 1 <= int(match["camera"]) <= cameras]
        if outside:
            self.error(f"{folder}: {len(outside)} file(s) with a camera outside 1..{cameras}: {quoted(outside)}")
        return [ImageRecord(folder / name, int(match["pid"]), int(match["camera"]) - 1) for name, match in matched]

    # --- checking ----------------------------------------------------------------------------------------------------
    def check_count(
        self,
        part: str,
        records: Sequence[ImageRecord],
        published: Count | None,
        *,
        ignored_pids: Iterable[int] = (),
        marker_part: str = "",
    ) -> None:
        """A strict finding when a part differs from the published counts, or from STANDIN.json for the stand-in.

        `marker_part`: name of the part in STANDIN.json, where it is another.
        """
        counted = Count.of(records, ignored_pids)
        expected = self.standin.count(self.name, marker_part or part) if self.standin else published
        self.counts[part] = (counted, expected)
        where = f"{self.title} {part}"
        if self.standin and expected is None:
            self.strict(f"{where}: {MARKER} states no counts for it; generate the stand-in again")
        elif expected and not _agree(counted, expected):
            whose = MARKER if self.standin else "the published counts"
            self.strict(f"{where}: found {counted}, expected {expected} ({whose}); unpack or download it again")

    def check_queries(self, query: Sequence[ImageRecord], gallery: Sequence[ImageRecord]) -> None:
        """Strict finding for queries whose person is not in the gallery; warning for those without another camera."""
        cameras: dict[int, set[int]] = {}
        for record in gallery:
            cameras.setdefault(record.pid, set()).add(record.camid)
        absent = [record for record in query if record.pid not in cameras]
        if absent:
            self.strict(
                f"{self.title}: {len(absent)} query image(s) of persons that the gallery lacks, "
                f"e.g. {absent[0].path.name}; they cannot be scored"
            )
        same = [record for record in query if cameras.get(record.pid) == {record.camid}]
        if same:
            self.warn(
                f"{self.title}: {len(same)} query image(s) have matches in their own camera only, "
                f"e.g. {same[0].path.name}; they do not count"
            )
        shared = {record.path: record.camid for record in query}
        twice = [record for record in gallery if shared.get(record.path, record.camid) != record.camid]
        if twice:
            self.error(f"{self.title}: {twice[0].path} is query and gallery image under different cameras")


def content_hash(parts: Sequence[Sequence[ImageRecord]], root: Path, archive: Path | None = None) -> str:
    """What lists of images hold: 64 hex digits.

    SHA-256 over these lines, in UTF-8, each ended by a line feed: for every list, in the order given, its number of
    images, then for every image "<path> <SHA-256 of the file> <pid> <camid>", sorted. Paths are relative to `root` with
    "/" between folders. Where the images were unpacked from `archive` their encoding is this machine's: then the first
    line is "<path of the archive> <its SHA-256>", and images are named without folder and digest. So the hash does not
    depend on where the data set lies, on modification times or on the order of a file system; it does on every name
    and byte, on who is where, and on how the images are divided. A file that has not changed is not read again, see
    `lda.data.verify.byte_digests`.
    """
    from lda.data.verify import byte_digests  # it loads PIL, and the catalogue imports this file for a few names

    digest = hashlib.sha256()
    paths = {record.path for part in parts for record in part} if archive is None else {archive}
    digests = byte_digests(sorted(paths), root, cache_dir(), root.name)
    if archive is not None:
        digest.update(f"{_relative(archive, root)} {digests[archive]}\n".encode())
    names: dict[Path, str] = {}  # of several splits most images are the same
    for part in parts:
        for record in part:
            if record.path not in names:
                content = f" {digests[record.path]}" if archive is None else ""
                names[record.path] = (record.path.name if archive else _relative(record.path, root)) + content
        lines = sorted(f"{names[record.path]} {record.pid} {record.camid}\n" for record in part)
        digest.update(f"{len(part)}\n{''.join(lines)}".encode())
    return digest.hexdigest()


def _relative(path: Path, root: Path) -> str:
    """As `Path.relative_to`, which takes seconds for the images of a large data set."""
    return os.fspath(path).removeprefix(os.path.join(root, "")).replace(os.sep, "/")


def is_clutter(name: str) -> bool:
    """True for what file managers and archivers leave behind (`Thumbs.db`, `._0001.jpg`, `.DS_Store`, `__MACOSX`)."""
    return name.startswith(".") or name.casefold() in CLUTTER


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """(file names, clutter names) of a folder, each sorted; sub-folders are left out."""
    with os.scandir(folder) as entries:
        names = sorted((entry.name, entry.is_dir()) for entry in entries)
    files = [name for name, is_dir in names if not is_dir and not is_clutter(name)]
    return files, [name for name, _ in names if is_clutter(name)]


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without clutter."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_clutter(entry.name) and entry.is_dir())


def child(folder: Path, name: str) -> Path | None:
    """`folder/name` if it exists, with any spelling of upper and lower case; `name` may have several parts."""
    path = folder
    for part in name.split("/"):
        exact = path / part
        if not _exists(exact):
            spelled = [entry for entry in _names(path) if _fold(entry) == _fold(part)]
            if not spelled:
                return None
            exact = path / spelled[0]
        path = exact
    return path


def quoted(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def read_standin(folder: Path) -> StandIn | None:
    """The stand-in's marker in `folder` or up to three folders above it, or above the one that it is a link to.

    Raises UsageError if it cannot be read.
    """
    target = Path(os.path.realpath(folder))
    for place in (folder, *folder.parents[:3], target, *target.parents[:3]):
        path = place / MARKER
        if _exists(path):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                return StandIn(str(content["hash"]), content["counts"], content.get("hashes", {}), place, content)
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{path}: not a stand-in marker ({error}); generate the stand-in again") from None
    return None


def is_standin(data_root: Path | None) -> bool:
    """Whether the images of a data root (None: the built-in one) are stand-in images. Raises as `read_standin`."""
    return data_root is None or read_standin(data_root) is not None


def _agree(counted: Count, expected: Count) -> bool:
    cameras = expected.cameras in (None, counted.cameras)
    return counted.images == expected.images and expected.ids in (None, counted.ids) and cameras


def _candidates(root: Path, layout: Layout) -> list[Path]:
    """Folders in which a layout may lie, likeliest first, each once."""
    folders: dict[Path, None] = {}
    for name in layout.folders:
        base = child(root, name)
        if base is not None and _is_dir(base):
            below = [base / sub for sub in subfolders(base)] if _few_entries(base) else []
            folders.update(dict.fromkeys([base, *(sub for sub in below if _recognised(sub, layout))]))
    tails = {name.split("/", depth)[depth] for name in layout.folders for depth in range(1, name.count("/") + 1)}
    loose = [path for tail in sorted(tails) if (path := child(root, tail)) is not None]
    folders.update((path, None) for path in [*loose, root] if _recognised(path, layout))
    if not folders and layout.parts:  # the root may be a data set's own folder with something missing
        folders.update((root, None) for part in layout.parts if child(root, part) is not None)
    return list(folders)


def _recognised(folder: Path, layout: Layout) -> bool:
    """True if a folder of another name holds this layout: all parts are there and nearly all image names fit."""
    if not _is_dir(folder) or any(child(folder, part) is None for part in layout.parts):
        return False
    if layout.grammar is None:
        return True
    images = child(folder, layout.images) if layout.images else folder
    names = listing(images)[0] if images is not None and _is_dir(images) else []
    return bool(names) and sum(map(bool, map(layout.grammar.match, names))) >= 0.9 * len(names)


def _few_entries(folder: Path) -> bool:
    """True unless a folder holds images by the thousand: only small folders are searched one level down."""
    return len(_names(folder)) <= 100


def _near(root: Path, wanted: Iterable[str]) -> list[str]:
    """Names in root, and one level below, that resemble a wanted folder name."""
    targets = [_fold(name) for name in wanted]
    near = []
    for top in subfolders(root)[:200]:
        inner = [f"{top}/{sub}" for sub in subfolders(root / top)[:50]] if _few_entries(root / top) else []
        for name in (top, *inner):
            if any(_similar(_fold(name.rpartition("/")[2]), target) for target in targets):
                near.append(name)
    return near[:5]


def _similar(one: str, other: str) -> bool:
    """Alike, and not of another number: CUHK02 is no misspelling of CUHK03."""
    first, second = ("".join(filter(str.isdecimal, name)) for name in (one, other))
    same_number = first.startswith(second) or second.startswith(first)
    return same_number and difflib.SequenceMatcher(None, one, other).ratio() >= 0.7


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # not a folder, unreadable, or a loop of links: nothing to see here
        return []


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _exists(path: Path) -> bool:
    return os.path.exists(path)


def _is_dir(path: Path) -> bool:
    return os.path.isdir(path)
