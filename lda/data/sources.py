"""What one run of a protocol needs: the source domains that train, the identities held out of them, the target.

Identities are keyed by (data set, part, pid), so that equal numbers of different people never meet (MSMT17 numbers
training and test persons from 0; CUHK02 and CUHK03 may even show the same people, but not knowingly). Labels are the
positions of the sorted keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lda.data import DEFAULTS, load_dataset
from lda.data.catalogue import Role, Terms, facts, terms, title
from lda.data.options import DataOptions
from lda.data.records import ImageRecord, ReidDataset
from lda.errors import UsageError, unknown
from lda.protocols import Protocol, SourcePart, get_protocol
from lda.settings import Setting, settings_of

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
        single_shot: every query has one match, so that mINP must equal mAP.
    """

    name: str
    query: tuple[ImageRecord, ...]
    gallery: tuple[ImageRecord, ...]
    camera_rule: bool = True
    single_gallery_shot: bool = False
    single_shot: bool = False


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
class Content:
    """Which images a run reads: what its results depend on beside its settings.

    Attributes:
        sources: source domain -> content hash of its data set, in the protocol's order.
        target: content hash of the target's query and gallery.
        standin: True if any of them is generated.
        proxy: content hash of the proxy domain's query and gallery; "" where there is none.
    """

    sources: Mapping[str, str]
    target: str
    standin: bool
    proxy: str = ""

    @property
    def kind(self) -> Literal["stand-in", "real"]:
        """How results are labelled: "stand-in" or "real"."""
        return _kind(self.standin)


@dataclass(frozen=True)
class Target:
    """A target as it is tested.

    Attributes:
        splits: every query and gallery; one where it has an official one.
        version: release or crops used.
        content: content hash of query and gallery; equal to `Content.target` of a task with this target.
        standin: True if it is generated.
    """

    splits: tuple[EvaluationSet, ...]
    version: str
    content: str
    standin: bool

    @property
    def kind(self) -> Literal["stand-in", "real"]:
        """How results are labelled: "stand-in" or "real"."""
        return _kind(self.standin)


def _kind(standin: bool) -> Literal["stand-in", "real"]:
    """The words for generated and for other images, the same wherever a result is shown."""
    return "stand-in" if standin else "real"


@dataclass(frozen=True)
class Task:
    """Everything one run reads.

    Attributes:
        protocol, target: names.
        sources: the domains that train, in the protocol's order: position = domain index.
        validation: held-out identities, one set per source; empty if validation_fraction is 0.
        test_splits: every query and gallery of the target; one where it has an official one.
        content: hashes of what was read, and whether it is the stand-in.
        versions: data set -> release or crops used.
        proxy_splits: every query and gallery of the proxy domain; empty where there is none.
        terms: data set -> licence and citation.
    """

    protocol: str
    target: str
    sources: tuple[SourceDomain, ...]
    validation: tuple[EvaluationSet, ...]
    test_splits: tuple[EvaluationSet, ...]
    content: Content
    versions: Mapping[str, str]
    proxy_splits: tuple[EvaluationSet, ...] = ()
    terms: Mapping[str, Terms] = field(default_factory=dict)


def build_task(
    protocol: str,
    target: str,
    data_root: Path,
    options: DataOptions = DEFAULTS,
    *,
    validation_fraction: float = 0.0,
    held_out: str = "",
    proxy: str = "",
) -> Task:
    """Read the data sets of one row of a protocol and divide them.

    Protocols whose source part is "all" join a source's train, query and gallery (without distractors) and read as much
    as there is (of MSMT17 both training lists, since that is what "all" means), whatever the options say. An option
    that only divides a data set for testing (`cuhk03_protocol`) is the target's: as a source it has its usual parts.

    Args:
        protocol, target: names, see `lda.protocols`.
        data_root: folder that holds the data sets.
        options: which releases are read.
        validation_fraction: share of each source's identities held out of training, at least 2 where it is above 0.
        held_out: a source that does not train, and is tested in the place of the target, which is not read.
        proxy: a data set to be tested beside the target, neither source nor target.

    Raises:
        UsageError: for unknown names, and for everything that is missing or wrong in any of the data sets, at once.
    """
    rules = get_protocol(protocol)
    names = rules.sources(target)
    if target in names:
        _check_division(target, options, rules)
    if proxy in (*names, target):
        raise UsageError(f"proxy_domain: {proxy!r} is a source or the target of {rules.title}; choose another data set")
    tested = _tested(held_out, names, target, rules)
    names = tuple(name for name in names if name != held_out)
    datasets = _load(names, (tested, *filter(None, [proxy])), data_root, options, rules.source_part)
    sources, validation = [], []
    for name in names:
        identities = _identities(datasets[name], rules.source_part)
        if not identities:
            raise UsageError(
                f"{title(name)} has no images that train; of its sources {rules.title} takes: {rules.source_part}"
            )
        if validation_fraction > 0:
            apart = _held_out(name, identities, validation_fraction)
            validation.append(_validation_set(name, [identities.pop(identity) for identity in apart]))
        sources.append(_source(name, identities))
    splits = _unseen_splits(datasets[tested], rules.source_part) if held_out else _test_splits(datasets[target])
    proxy_splits = _test_splits(datasets[proxy]) if proxy else ()
    _check_unseen(splits, sources, (*validation, *proxy_splits))
    return Task(
        protocol=protocol,
        target=target,
        sources=tuple(sources),
        validation=tuple(validation),
        test_splits=splits,
        content=Content(
            sources={name: datasets[name].data_hash for name in names},
            target=datasets[tested].data_hash if held_out else datasets[target].test_hash,
            standin=any(dataset.standin for dataset in datasets.values()),
            proxy=datasets[proxy].test_hash if proxy else "",
        ),
        versions={name: dataset.version for name, dataset in datasets.items()},
        proxy_splits=proxy_splits,
        terms={name: terms(name, dataset.standin) for name, dataset in datasets.items()},
    )


def _tested(held_out: str, names: Sequence[str], target: str, rules: Protocol) -> str:
    """What is tested. Raises UsageError for a domain that cannot be held out."""
    if not held_out:
        return target
    if held_out not in names:
        raise UsageError(f"held_out: {unknown(f'source of {rules.title} for {target}', held_out, names)}")
    if len(names) < 2:
        raise UsageError(f"held_out: {held_out} is the only source of {rules.title} for {target}: nothing is left")
    return held_out


def _unseen_splits(dataset: ReidDataset, part: SourcePart) -> tuple[EvaluationSet, ...]:
    """A source as an unseen domain: its one official query and gallery, else all its persons as in source validation.
    Splits drawn of the same persons say the same thing several times."""
    if len(dataset.test_splits) == 1:
        return _test_splits(dataset)
    return (_validation_set(dataset.name, list(_identities(dataset, part).values())),)


def evaluation_splits(target: str, data_root: Path, options: DataOptions = DEFAULTS) -> Target:
    """A target alone, to be tested. Raises UsageError if it has no query and gallery or cannot be read."""
    return target_of(load_dataset(target, data_root, options))


def target_of(dataset: ReidDataset) -> Target:
    """A data set as a target. Raises UsageError if it has no query and gallery."""
    return Target(_test_splits(dataset), dataset.version, dataset.test_hash, dataset.standin)


def _check_division(target: str, options: DataOptions, rules: Protocol) -> None:
    """Raises UsageError where a target that is its own source would be tested on persons it trains on."""
    for key, usual in _values(target, "division", lambda setting: setting.default).items():
        if (value := getattr(options, key)) != usual:
            raise UsageError(f"{key}: {value!r} tests persons that {rules.title} trains on; set it to {usual}")


def _check_unseen(
    splits: Sequence[EvaluationSet], sources: Sequence[SourceDomain], selecting: Sequence[EvaluationSet]
) -> None:
    """Raises UsageError where a file is tested that trains or selects: two data sets, one of them your own, name it."""
    tested = {record.path for split in splits for record in (*split.query, *split.gallery)}
    used = [("trains on", source.name, source.records) for source in sources]
    used += [("selects by", images.name, (*images.query, *images.gallery)) for images in selecting]
    for how, name, records in used:
        shared = [record.path for record in records if record.path in tested]
        if shared:
            raise UsageError(
                f"{title(name)} {how} {len(shared)} image(s) that {title(splits[0].name)} tests, e.g. {shared[0]}; an "
                "unseen target shares none"
            )


def _load(
    names: Sequence[str], tested: Sequence[str], data_root: Path, options: DataOptions, part: SourcePart
) -> dict[str, ReidDataset]:
    """Sources and what is tested, each once. Raises one UsageError with all that is wrong."""
    if not Path(data_root).is_dir():
        raise UsageError(f"data root {data_root} does not exist or is not a folder")
    datasets, wrong = {}, []
    for name in dict.fromkeys((*names, *tested)):
        changes = _values(name, "extent", lambda setting: setting.choices[-1]) if part == "all" else {}
        if name not in tested:
            changes |= _values(name, "division", lambda setting: setting.default)
        try:
            datasets[name] = load_dataset(name, data_root, options, **changes)
        except UsageError as error:
            wrong.append(str(error))
    if wrong:
        raise UsageError("; ".join(wrong))
    return datasets


def _values(name: str, role: Role, value: Callable[[Setting], Any]) -> dict[str, Any]:
    """A value for each of a data set's options of one role."""
    known = settings_of(DataOptions)
    return {key: value(known[key]) for key in facts(name).chosen_by(role)}


def _test_splits(dataset: ReidDataset) -> tuple[EvaluationSet, ...]:
    if not dataset.test_splits:
        raise UsageError(f"{title(dataset.name)} has no query and gallery: it is only trained on")
    known = facts(dataset.name)
    return tuple(
        EvaluationSet(
            dataset.name, split.query, split.gallery, known.cameras, split.single_gallery_shot, known.single_shot
        )
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
    cameras = facts(name).cameras
    able = [key for key, images in identities.items() if len({r.camid if cameras else r.path for r in images}) >= 2]
    if len(able) < MIN_HELD_OUT or len(identities) <= MIN_HELD_OUT:
        where = "images in two cameras" if cameras else "two images"
        raise UsageError(
            f"{title(name)}: source validation needs {MIN_HELD_OUT} identities with {where} and others to train, "
            f"got {len(able)} of {len(identities)}; set validation_fraction to 0"
        )
    able.sort(key=lambda key: hashlib.sha256(f"{name}/{key[0]}/{key[1]}".encode()).digest())
    return sorted(able[: max(MIN_HELD_OUT, round(fraction * len(identities)))])


def _validation_set(name: str, identities: Sequence[Sequence[ImageRecord]]) -> EvaluationSet:
    """Held-out identities as query and gallery, pids renumbered from 0.

    One query per person and camera (the first image by name) as far as every query keeps a match in another camera;
    one query per person where cameras are unknown. All other images are the gallery.
    """
    camera_rule = facts(name).cameras
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
