"""CUHK03 with the new protocol (or the classic one), on labeled (hand-drawn) or detected boxes.

References: Li et al., "DeepReID: Deep Filter Pairing Neural Network for Person Re-identification", CVPR 2014 (images);
Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017 (new protocol).

Counts: 767 ids (train), 700 ids (query and gallery), seen by two views in each of five camera pairs;
labeled 7,368 + 1,400 + 5,328 images, detected 7,365 + 1,400 + 5,332. Papers do not agree on the boxes: META and ACL
report labeled, M3L and BAU detected; `cuhk03_boxes` chooses and is printed with every result.

Layouts (the first that is there):
    folders   `cuhk03-np/{labeled,detected}/{bounding_box_train,query,bounding_box_test}/0001_c1_1.png`: person, view
    images    `cuhk03/images_{labeled,detected}/1_001_1_01.png` (pair, person, view, image) as torchreid unpacks them,
              with `splits_new_*.json` (base names are taken, paths may be stale) or the new protocol's .mat file
    raw       `cuhk03/cuhk03_release/cuhk-03.mat` (MATLAB 7.3) with `cuhk03_new_protocol_config_{labeled,detected}.mat`;
              images are unpacked once into the cache directory
The camera is the view, 0 or 1, as in every evaluation: one person is seen by one pair only.

The classic protocol (2014), for comparison with older papers only: 20 splits of 1,367 persons to train and 100 to test,
whose images are query and gallery at once, CMC on one random gallery image per person. Its splits are in cuhk-03.mat
(`testsets`), or in torchreid's `splits_classic_*.json`; the repacked folders lack them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lda.data.cache import cache_dir
from lda.data.catalogue import NOT_STATED, Facts
from lda.data.making import whole_folder
from lda.data.matlab import load_mat
from lda.data.options import DataOptions
from lda.data.records import ImageRecord, ReidDataset, Split
from lda.data.survey import Count, Found, Grammar, Layout, Survey, listing, quoted
from lda.errors import UsageError

FACTS = Facts(
    title="CUHK03",
    licence=NOT_STATED,
    citation="Li et al., DeepReID: Deep Filter Pairing Neural Network for Person Re-identification, CVPR 2014",
    order=5,
    options={"cuhk03_boxes": "files", "cuhk03_protocol": "division"},
)

PUBLISHED = {
    "labeled": {"train": Count(767, 7368, 2), "query": Count(700, 1400, 2), "gallery": Count(700, 5328, 2)},
    "detected": {"train": Count(767, 7365, 2), "query": Count(700, 1400, 2), "gallery": Count(700, 5332, 2)},
}

PUBLISHED_ALL = {"labeled": Count(1467, 14096, 2), "detected": Count(1467, 14097, 2)}  # of the classic protocol

RELEASE_MD5 = "728939e58ad9f0ff53e521857dd8fb43"  # of cuhk03_release.zip (open-reid)

_PLACES = ("cuhk03", "cuhk03_new")

_FOLDER_NAME = Grammar(r"(?P<pid>\d+)_c(?P<camera>\d+)_\d+", extension=".png", example="0001_c1_1.png")
_IMAGE_NAME = Grammar(
    r"(?P<pair>[1-5])_(?P<person>\d{3})_(?P<view>[12])_\d{2}", extension=".png", example="1_001_1_01.png"
)

_Lists = dict[str, list[tuple[str, int]]]  # part -> (base name, pid)


def read(survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`.

    Only the files of the chosen boxes are needed. The classic protocol's `train` holds the training persons of the
    first split.
    """
    if options.cuhk03_protocol == "classic":
        return _read_classic(survey, options.cuhk03_boxes)
    return _read_new(survey, options.cuhk03_boxes)


def _read_new(survey: Survey, boxes: str) -> ReidDataset | None:
    protocol, splits = f"cuhk03_new_protocol_config_{boxes}.mat", f"splits_new_{boxes}.json"
    folders = Layout(
        name="folders",
        folders=tuple(f"{name}/{boxes}" for name in ("cuhk03-np", "cuhk03_np", "cuhknp", "cuhk03")),
        parts=("bounding_box_train", "query", "bounding_box_test"),
        grammar=_FOLDER_NAME,
        images="bounding_box_train",
    )
    with_json = Layout("images", _PLACES, (f"images_{boxes}", splits))
    with_mat = Layout("images", _PLACES, (f"images_{boxes}", protocol))
    found = survey.locate(folders, with_mat, with_json, *_raw_layouts(protocol))
    if found is None:
        return None
    if found.layout is folders:
        parts = {
            part: survey.records(found.part(folder), _FOLDER_NAME, cameras=2)
            for part, folder in zip(("train", "query", "gallery"), folders.parts, strict=True)
        }
    else:
        use_json = found.layout is with_json
        lists = _json_lists(found.part(splits)) if use_json else _protocol_lists(found.part(protocol))
        mat = _mat_of(found)
        parts = _listed(survey, _unpacked(mat, boxes) if mat else found.part(f"images_{boxes}"), lists)
    for part, records in parts.items():
        # The stand-in counts both kinds of boxes under their own names.
        survey.check_count(part, records, PUBLISHED[boxes][part], marker_part=f"{boxes}/{part}")
    survey.check_queries(parts["query"], parts["gallery"])
    return survey.dataset(boxes, parts["train"], parts["query"], parts["gallery"], archive=_mat_of(found))


def _read_classic(survey: Survey, boxes: str) -> ReidDataset | None:
    json_name = f"splits_classic_{boxes}.json"
    with_json = Layout("images", _PLACES, (f"images_{boxes}", json_name))
    found = survey.locate(*_raw_layouts(), with_json)
    if found is None:
        return None
    mat = _mat_of(found)
    if mat is None:
        images, tests = found.part(f"images_{boxes}"), _json_tests(found.part(json_name))
    else:
        images, tests = _unpacked(mat, boxes), _mat_tests(mat)
    matched = survey.images(images, _IMAGE_NAME)
    records = [ImageRecord(images / name, _pid(name), int(match["view"]) - 1) for name, match in matched]
    survey.check_count("all", records, PUBLISHED_ALL[boxes], marker_part=f"{boxes}/all")
    splits = []
    for persons in tests:
        tested = tuple(record for record in records if record.pid in persons)
        splits.append(Split(tested, tested, single_gallery_shot=True))
    if absent := set().union(*tests) - {record.pid for record in records}:
        survey.strict(f"{images}: {len(absent)} test person(s) have no image: {quoted(sorted(map(str, absent)))}")
    train = [record for record in records if record.pid not in tests[0]]
    return survey.dataset(f"{boxes}, classic", train=train, splits=splits, archive=mat)


def _raw_layouts(*files: str) -> tuple[Layout, Layout]:
    """The release with `files` beside its folder, or in it."""
    beside = Layout("raw", _PLACES, ("cuhk03_release/cuhk-03.mat", *files))
    inside = Layout("raw", tuple(f"{name}/cuhk03_release" for name in _PLACES), ("cuhk-03.mat", *files))
    return beside, inside


def _mat_of(found: Found) -> Path | None:
    """cuhk-03.mat, where the images come from it."""
    return found.part(found.layout.parts[0]) if found.layout.name == "raw" else None


def _json_tests(path: Path) -> list[set[int]]:
    """Test persons of every split of torchreid's classic split file."""
    try:
        return [
            {_pid(_base_name(item)) for item in split["query"]}
            for split in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path}: not a CUHK03 split file ({type(error).__name__}: {error}); delete it") from None


def _mat_tests(mat: Path) -> list[set[int]]:
    """Test persons of every split of cuhk-03.mat: `testsets` refers to 2 x K tables of (pair, person), both from 1."""
    with _opened(mat) as file:
        tables = [np.asarray(file[reference]).astype(int) for reference in np.ravel(file["testsets"])]
    return [{_number(pair, person) for pair, person in table.T.tolist()} for table in tables]


def _listed(survey: Survey, images: Path, lists: _Lists) -> dict[str, list[ImageRecord]]:
    """Records of the listed images; names that do not fit or are not on disk become strict findings."""
    present = set(listing(images)[0])
    parts: dict[str, list[ImageRecord]] = {}
    for part, named in lists.items():
        bad = [name for name, _ in named if not _IMAGE_NAME.match(name)]
        if bad:
            survey.strict(f"{images}: {len(bad)} listed name(s) do not look like {_IMAGE_NAME.example}: {quoted(bad)}")
        absent = [name for name, _ in named if name not in present]
        if absent:
            survey.strict(f"{images}: {len(absent)} image(s) of {part} are not there: {quoted(absent)}; unpack again")
        parts[part] = [
            ImageRecord(images / name, pid, int(match["view"]) - 1)
            for name, pid in sorted(named)
            if name in present and (match := _IMAGE_NAME.match(name))
        ]
    return parts


def _json_lists(path: Path) -> _Lists:
    """torchreid's split file. Its paths are absolute and may be stale, its training ids are relabelled: names count."""
    try:
        split = json.loads(path.read_text(encoding="utf-8"))[0]
        names = {part: [_base_name(item) for item in split[part]] for part in ("train", "query", "gallery")}
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path}: not a CUHK03 split file ({type(error).__name__}: {error}); delete it") from None
    return {part: [(name, _pid(name)) for name in listed] for part, listed in names.items()}


def _base_name(item: list[Any]) -> str:
    """Of an entry [path, pid, camid] of torchreid's split files, whose paths may be another system's."""
    return str(item[0]).replace("\\", "/").rpartition("/")[2]


def _pid(name: str) -> int:
    match = _IMAGE_NAME.match(name)
    return _number(int(match["pair"]), int(match["person"])) if match else 0


def _number(pair: int, person: int) -> int:
    """A person's number, from the camera pair and the place in its table."""
    return pair * 1000 + person


def _protocol_lists(path: Path) -> _Lists:
    """The lists of a new-protocol file (MATLAB 5): 1-based positions in `filelist`, person numbers in `labels`."""
    content = load_mat(path)
    try:
        names = [str(np.ravel(cell)[0]) for cell in np.ravel(content["filelist"])]
        pids = np.ravel(content["labels"]).astype(int)
        rows = {part: np.ravel(content[f"{part}_idx"]).astype(int) - 1 for part in ("train", "query", "gallery")}
        return {part: [(names[row], int(pids[row])) for row in index] for part, index in rows.items()}
    except (LookupError, ValueError) as error:
        raise UsageError(f"{path}: not a CUHK03 new-protocol file ({type(error).__name__}: {error})") from None


def _unpacked(mat: Path, boxes: str) -> Path:
    """Folder of the PNG images of cuhk-03.mat, written on first use. Raises UsageError if the file is damaged."""
    stat = mat.stat()
    key = hashlib.sha256(f"{mat.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_dir() / "cuhk03" / key / f"images_{boxes}"
    if folder.is_dir():
        return folder
    from PIL import Image  # here, as h5py and scipy: the catalogue imports this file for its name

    with whole_folder(folder, f"unpacking {mat}") as partial:
        if partial is not None:
            for name, image in _mat_images(mat, boxes):
                Image.fromarray(image).save(partial / name)
    return folder


def _mat_images(mat: Path, boxes: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(name, (H, W, 3) uint8) of every image: per camera pair a table of 10 x persons, rows 1-5 view 1, 6-10 view 2."""
    with _opened(mat) as file:
        for pair, pair_reference in enumerate(np.ravel(file[boxes]), start=1):
            for person, row in enumerate(np.asarray(file[pair_reference]).T, start=1):
                for column, reference in enumerate(row):
                    image = np.asarray(file[reference])
                    if image.ndim == 3:  # an empty cell is an array of two zeros
                        name = f"{pair}_{person:03d}_{column // 5 + 1}_{column + 1:02d}.png"
                        yield name, np.ascontiguousarray(image.transpose(2, 1, 0))


@contextmanager
def _opened(mat: Path) -> Iterator[Any]:
    """cuhk-03.mat as an HDF5 file. Raises UsageError where it, or what is read from it inside `with`, is damaged."""
    try:
        import h5py
    except ImportError:
        raise UsageError(f"{mat}: reading it needs h5py: pip install h5py") from None
    try:
        with h5py.File(mat, "r") as file:
            yield file
    except (OSError, KeyError) as error:
        raise UsageError(
            f"{mat}: cannot be read as cuhk-03.mat ({error}); it is truncated or another file, "
            f"unpack cuhk03_release.zip (md5 {RELEASE_MD5}) again"
        ) from None
