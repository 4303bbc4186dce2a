"""What one run of a protocol needs: the source domains that train, the identities held out of them, the target.

Identities are keyed by (data set, part, pid), so that equal numbers of different people never meet (MSMT17 numbers
training and test persons from 0; CUHK02 and CUHK03 may even show the same people, but not knowingly). Labels are the
positions of the sorted keys.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lda.data import load_dataset
from lda.data.cache import cache_dir
from lda.data.records import ImageRecord, ReidDataset
from lda.data.verify import check_images
from lda.errors import UsageError
from lda.protocols import DATASETS, WITHOUT_CAMERAS, SourcePart, get_protocol

MIN_HELD_OUT = 2  # with a single identity every ranking is perfect

_Identity = tuple[str, int]  # (part, pid); "test" is query and gallery
_Identities = dict[_Identity, list[ImageRecord]]


@dataclass(frozen=True)
class EvaluationSet:
    """A query and a gallery to rank.

    Attributes:
        name: the data set.
        query, gallery: pids are unique within this set.
        camera_rule: ignore gallery images of the query's person that share its camera; False where cameras are unknown.
        single_gallery_shot: CMC by CUHK03's old protocol.
    """

    name: str
    query: tuple[ImageRecord, ...]
    gallery: tuple[ImageRecord, ...]
    camera_rule: bool = True
    single_gallery_shot: bool = False


@dataclass(frozen=True)
class SourceDomain:
    """One source domain's training images.

    Attributes:
        name: the data set.
        records: N images, sorted by path.
        labels: (N,) int64, identity of each image, 0 to num_ids - 1 without gaps.
        num_ids: number of identities.
    """

    name: str
    records: tuple[ImageRecord, ...]
    labels: NDArray[np.int64]
    num_ids: int


@dataclass(frozen=True)
class Task:
    """Everything one run reads.

    Attributes:
        protocol, target: names.
        sources: the domains that train, in the protocol's order: position = domain index.
        validation: held-out identities, one set per source; empty if validation_fraction is 0.
        test: the target's query and gallery; of the first split where it has several.
        standin: True if any of the data is generated.
        data_hash: content hash of the stand-in, "" for real data.
        versions: data set -> release or crops used.
        test_splits: every split of the target; one where it has an official query and gallery.
    """

    protocol: str
    target: str
    sources: tuple[SourceDomain, ...]
    validation: tuple[EvaluationSet, ...]
    test: EvaluationSet
    standin: bool
    data_hash: str
    versions: dict[str, str]
    test_splits: tuple[EvaluationSet, ...] = ()


def build_task(
    protocol: str,
    target: str,
    data_root: Path,
    *,
    validation_fraction: float = 0.0,
    cuhk03_boxes: str = "labeled",
    cuhk03_protocol: str = "new",
    msmt17_train: str = "train",
    strict: bool = True,
) -> Task:
    """Read the data sets of one row of a protocol and divide them.

    Protocols whose source part is "all" join a source's train, query and gallery (without distractors), and for MSMT17
    always both training lists, since that is what "all" means; `msmt17_train` then has nothing to choose.

    Args:
        protocol, target: names, see `lda.protocols`.
        data_root: folder that holds the data sets.
        validation_fraction: share of each source's identities held out of training, at least 2 where it is above 0.
        cuhk03_boxes, msmt17_train: see `lda.data.load_dataset`.
        cuhk03_protocol: as there, of CUHK03 as the target; as a source it always has the new protocol's parts.
        strict: as there; False also decodes every source image once and leaves damaged ones out of training. A damaged
            test image stays an error: leaving it out would change the metric.

    Raises:
        UsageError: for unknown names, and for everything that is missing or wrong in any of the data sets, at once.
    """
    rules = get_protocol(protocol)
    names = rules.sources(target)
    options = {"cuhk03_boxes": cuhk03_boxes, "strict": strict}
    everything = {"msmt17_train": "train+val" if rules.source_part == "all" else msmt17_train}
    if target in names and cuhk03_protocol != "new":
        raise UsageError(
            f"cuhk03_protocol: {cuhk03_protocol!r} tests persons that {rules.title} trains on; set it to new"
        )
    datasets = _load((*names, target), data_root, {**options, **everything}, {"cuhk03_protocol": cuhk03_protocol})
    sources, validation = [], []
    for name in names:
        identities = _identities(datasets[name], rules.source_part)
        if not strict:
            identities = _without_damaged(name, identities)
        if validation_fraction > 0:
            held_out = _held_out(name, identities, validation_fraction)
            validation.append(_validation_set(name, [identities.pop(identity) for identity in held_out]))
        sources.append(_source(name, identities))
    test_splits = _test_splits(datasets[target])
    hashes = sorted({dataset.data_hash for dataset in datasets.values()} - {""})
    return Task(
        protocol=protocol,
        target=target,
        sources=tuple(sources),
        validation=tuple(validation),
        test=test_splits[0],
        standin=any(dataset.standin for dataset in datasets.values()),
        data_hash="+".join(hashes),
        versions={name: dataset.version for name, dataset in datasets.items()},
        test_splits=test_splits,
    )


def evaluation_set(
    target: str, data_root: Path, *, cuhk03_boxes: str = "labeled", strict: bool = True
) -> EvaluationSet:
    """A target's query and gallery alone, of its first split. Raises UsageError if it has none or cannot be read."""
    return evaluation_splits(target, data_root, cuhk03_boxes=cuhk03_boxes, strict=strict)[0]


def evaluation_splits(
    target: str, data_root: Path, *, cuhk03_boxes: str = "labeled", cuhk03_protocol: str = "new", strict: bool = True
) -> tuple[EvaluationSet, ...]:
    """Every split of a target, alone. Raises UsageError if it has no query and gallery or cannot be read."""
    dataset = load_dataset(target, data_root, cuhk03_boxes=cuhk03_boxes, cuhk03_protocol=cuhk03_protocol, strict=strict)
    return _test_splits(dataset)


def _load(
    names: Sequence[str], data_root: Path, options: Mapping[str, Any], of_target: Mapping[str, Any]
) -> dict[str, ReidDataset]:
    """Every data set once; `of_target` are options of the last. Raises one UsageError with all that is wrong."""
    if not Path(data_root).is_dir():
        raise UsageError(f"data root {data_root} does not exist or is not a folder")
    datasets, wrong = {}, []
    for name in dict.fromkeys(names):
        try:
            datasets[name] = load_dataset(name, data_root, **options, **(of_target if name == names[-1] else {}))
        except UsageError as error:
            wrong.append(str(error))
    if wrong:
        raise UsageError("; ".join(wrong))
    return datasets


def _test_splits(dataset: ReidDataset) -> tuple[EvaluationSet, ...]:
    if not dataset.test_splits:
        raise UsageError(f"{DATASETS[dataset.name]} has no query and gallery: it is only trained on")
    return tuple(
        EvaluationSet(dataset.name, split.query, split.gallery, single_gallery_shot=split.single_gallery_shot)
        for split in dataset.test_splits
    )


def _identities(dataset: ReidDataset, part: SourcePart) -> _Identities:
    """Identity -> its images, in sorted order; distractors left out."""
    identities: _Identities = {}
    for record in dataset.train:
        identities.setdefault(("train", record.pid), []).append(record)
    if part == "all":
        for record in (*dataset.query, *dataset.gallery):
            if record.pid not in dataset.distractor_pids:
                identities.setdefault(("test", record.pid), []).append(record)
    return {key: sorted(identities[key], key=lambda record: record.path) for key in sorted(identities)}


def _without_damaged(name: str, identities: _Identities) -> _Identities:
    """The identities without images that cannot be decoded, which are warned of."""
    paths = [record.path for images in identities.values() for record in images]
    damaged = {path: check.problem for path, check in check_images(paths, cache_dir(), DATASETS[name]).items()
               if check.problem}  # fmt: skip
    if not damaged:
        return identities
    warnings.warn(
        f"{DATASETS[name]}: {len(damaged)} damaged image(s) left out of training: {next(iter(damaged.values()))}",
        stacklevel=3,
    )
    kept = {key: [record for record in images if record.path not in damaged] for key, images in identities.items()}
    return {key: images for key, images in kept.items() if images}


def _source(name: str, identities: _Identities) -> SourceDomain:
    labelled = [(record, label) for label, images in enumerate(identities.values()) for record in images]
    labelled.sort(key=lambda pair: pair[0].path)
    labels = np.array([label for _, label in labelled], dtype=np.int64)
    return SourceDomain(name, tuple(record for record, _ in labelled), labels, len(identities))


def _held_out(name: str, identities: _Identities, fraction: float) -> list[_Identity]:
    """The identities held out of one source, among those that can be evaluated.

    They are the first in the order of SHA-256("name/part/pid"): the same for every run, seed and library version, and
    a larger fraction keeps the ones of a smaller. Raises UsageError if fewer than two can be evaluated.
    """
    cameras = name not in WITHOUT_CAMERAS
    able = [key for key, images in identities.items() if len({r.camid if cameras else r.path for r in images}) >= 2]
    if len(able) < MIN_HELD_OUT or len(identities) <= MIN_HELD_OUT:
        where = "images in two cameras" if cameras else "two images"
        raise UsageError(
            f"{DATASETS[name]}: source validation needs {MIN_HELD_OUT} identities with {where} and others to train, "
            f"got {len(able)} of {len(identities)}; set validation_fraction to 0"
        )
    able.sort(key=lambda key: hashlib.sha256(f"{name}/{key[0]}/{key[1]}".encode()).digest())
    return sorted(able[: max(MIN_HELD_OUT, round(fraction * len(identities)))])


def _validation_set(name: str, identities: Sequence[Sequence[ImageRecord]]) -> EvaluationSet:
    """Held-out identities as query and gallery, pids renumbered from 0.

    One query per person and camera (the first image by name) as far as every query keeps a match in another camera;
    one query per person where cameras are unknown. All other images are the gallery.
    """
    camera_rule = name not in WITHOUT_CAMERAS
    query: list[ImageRecord] = []
    gallery: list[ImageRecord] = []
    for pid, images in enumerate(identities):
        renumbered = [replace(record, pid=pid) for record in images]
        asked = _queries(renumbered) if camera_rule else renumbered[:1]
        query += asked
        gallery += [record for record in renumbered if record not in asked]
    return EvaluationSet(name, tuple(query), tuple(gallery), camera_rule)


def _queries(images: Sequence[ImageRecord]) -> list[ImageRecord]:
    """One image per camera, skipping a camera where its query would leave one of the queries without a match."""
    queries: list[ImageRecord] = []
    for camid in sorted({record.camid for record in images}):
        trial = [*queries, next(record for record in images if record.camid == camid)]
        rest = [record.camid for record in images if record not in trial]
        if all(any(camid != asked.camid for camid in rest) for asked in trial):
            queries = trial
    return queries
