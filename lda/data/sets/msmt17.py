"""MSMT17, versions 1 and 2 (faces masked).

Reference: Wei et al., "Person Transfer GAN to Bridge Domain Gap for Person Re-identification", CVPR 2018.

Counts: 1,041 ids, 30,248 images (list_train) + 2,373 images of the same ids (list_val) + 3,060 ids, 11,659 images
(query) + 82,161 images (gallery), 15 cameras. Training and test persons are different people, yet both are numbered
from 0. Papers differ in whether list_val trains: fast-reid, META and ACL take list_train alone in Protocol-2, M3L and
QAConv join both; `msmt17_train` chooses.

Layouts:
    nested  `MSMT17_V1/{train,test}` or `MSMT17_V2/{mask_train_v2,mask_test_v2}` with one folder per person,
            `0000/0000_000_01_0303morning_0008_0.jpg` (person, number, camera, ...), and beside them `list_train.txt`,
            `list_val.txt`, `list_query.txt`, `list_gallery.txt` of lines "path-below-that-folder person"
    flat    `{bounding_box_train,query,bounding_box_test}/0000_c01_0008.jpg` (M3L, BAU); `list_val.txt`, where present,
            tells validation images from training images
"""

from __future__ import annotations

from pathlib import Path

from lda.data.catalogue import NOT_STATED, Facts
from lda.data.options import DataOptions
from lda.data.records import ImageRecord, ReidDataset
from lda.data.survey import Count, Grammar, Layout, Survey, child, listing, quoted, subfolders

FACTS = Facts(
    title="MSMT17",
    licence=NOT_STATED,
    citation="Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-identification, CVPR 2018",
    order=2,
    options={"msmt17_train": "extent"},
)

CAMERAS = 15

PUBLISHED = {
    "train": Count(1041, 30248, 15),
    "val": Count(None, 2373),
    "train+val": Count(1041, 32621, 15),
    "query": Count(3060, 11659, 15),
    "gallery": Count(3060, 82161, 15),
}

_NAME = Grammar(
    r"\d{4}_\d{3}_(?P<camera>\d{2})_\d{4}[a-z]+_\d{4}_\d+(?:_ex)?",
    extension=".jpg",
    example="0000_000_01_0303morning_0008_0.jpg",
)
_FLAT_NAME = Grammar(r"(?P<pid>\d+)_c(?P<camera>\d+)_\w+", extension=".jpg", example="0000_c01_0008.jpg")

_LISTS = ("list_train.txt", "list_query.txt", "list_gallery.txt")

V1 = Layout("MSMT17_V1", ("MSMT17_V1", "msmt17/MSMT17_V1", "MSMT17"), (*_LISTS, "train", "test"))
V2 = Layout("MSMT17_V2", ("MSMT17_V2", "msmt17/MSMT17_V2", "MSMT17"), (*_LISTS, "mask_train_v2", "mask_test_v2"))
FLAT = Layout(
    name="flat",
    folders=("MSMT17_V1", "msmt17/MSMT17_V1", "MSMT17_V2", "msmt17/MSMT17_V2", "MSMT17"),
    parts=("bounding_box_train", "query", "bounding_box_test"),
    grammar=_FLAT_NAME,
    images="bounding_box_train",
)


def read(survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`."""
    train_list = options.msmt17_train
    found = survey.locate(V1, V2, FLAT)
    if found is None:
        return None
    other = next((place for place in survey.also_found if place.layout.name != found.layout.name), None)
    if other is not None:
        survey.warn(
            f"{survey.title}: using {found.folder} ({found.layout.name}), not {other.folder} ({other.layout.name}): "
            f"pixels differ between versions; move one of them away to choose"
        )
    if found.layout is FLAT:
        parts = _read_flat(survey, train_list)
        folder = found.folder.name.upper()
        version = f"{folder} flat" if folder in (V1.name, V2.name) else "MSMT17 flat"
    else:
        parts = _read_nested(survey, train_list)
        version = found.layout.name
    for part, records in parts.items():
        survey.check_count(part, records, PUBLISHED[part])
    survey.check_queries(parts["query"], parts["gallery"])
    train = [record for part in ("train", "val", "train+val") for record in parts.get(part, [])]
    return survey.dataset(version, train, parts["query"], parts["gallery"])


def _read_nested(survey: Survey, train_list: str) -> dict[str, list[ImageRecord]]:
    assert survey.found is not None
    found, (train_folder, test_folder) = survey.found, survey.found.layout.parts[-2:]
    places = {"train": train_folder, "query": test_folder, "gallery": test_folder}
    if train_list == "train+val":
        places["val"] = train_folder
    present = {folder: _files_below(found.part(folder)) for folder in (train_folder, test_folder)}
    parts: dict[str, list[ImageRecord]] = {}
    for part, place in places.items():
        list_file = child(found.folder, f"list_{part}.txt")
        if list_file is None:
            survey.error(f"{survey.title}: {found.folder} lacks list_{part}.txt, which comes with the archive")
            parts[part] = []
        else:
            parts[part] = _listed(survey, list_file, found.part(place), present[place])
    return parts


def _files_below(folder: Path) -> set[str]:
    """`person/name` of every file two levels deep."""
    return {f"{sub}/{name}" for sub in subfolders(folder) for name in listing(folder / sub)[0]}


def _listed(survey: Survey, list_file: Path, folder: Path, present: set[str]) -> list[ImageRecord]:
    """The images of one list file. Lines that do not fit, and files not on disk, become strict findings."""
    records, bad, absent, outside = [], [], [], []
    for number, line in enumerate(list_file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        relative, _, pid = line.strip().replace("\t", " ").rpartition(" ")
        relative = relative.strip().replace("\\", "/")
        match = _NAME.match(relative.rpartition("/")[2])
        if match is None or not pid.isdecimal():
            bad.append(f"line {number} {line.strip()!r}")
        elif not 1 <= int(match["camera"]) <= CAMERAS:
            outside.append(f"line {number} {relative}")
        elif relative not in present:
            absent.append(relative)
        else:
            records.append(ImageRecord(folder / relative, int(pid), int(match["camera"]) - 1))
    if bad:
        survey.strict(f"{list_file}: {len(bad)} line(s) do not look like '0000/{_NAME.example} 0': {quoted(bad)}")
    if outside:
        survey.error(f"{list_file}: {len(outside)} line(s) with a camera outside 1..{CAMERAS}: {quoted(outside)}")
    if absent:
        survey.strict(
            f"{list_file}: {len(absent)} of its files are not in {folder}: {quoted(absent)}; unpack the archive again"
        )
    return sorted(records, key=lambda record: record.path)


def _read_flat(survey: Survey, train_list: str) -> dict[str, list[ImageRecord]]:
    assert survey.found is not None
    train, query, gallery = (survey.records(survey.found.part(p), _FLAT_NAME, CAMERAS) for p in FLAT.parts)
    parts = {"train": train, "query": query, "gallery": gallery}
    list_val = child(survey.found.folder, "list_val.txt")
    if list_val is not None:
        lines = list_val.read_text(encoding="utf-8").splitlines()
        names = {line.split()[0].replace("\\", "/").rpartition("/")[2] for line in lines if line.strip()}
        parts["train"] = [record for record in train if record.path.name not in names]
        if train_list == "train+val":
            parts["val"] = [record for record in train if record.path.name in names]
    elif train_list == "train":
        survey.strict(
            f"{survey.title}: {survey.found.folder} has no list_val.txt, so list_train cannot be told from list_val; "
            f"set msmt17_train to train+val to train on both"
        )
    else:
        parts["train+val"] = parts.pop("train")
    return parts
