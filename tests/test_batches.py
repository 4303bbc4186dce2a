"""Batches: what is in them, that (seed, step) alone decides it, and that workers change nothing and never hang."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from lda.batch import Batch, Layout
from lda.data.batches import CleanImages, IdentityBatches, batch_loader
from lda.data.dealing import NaturalShares, OneDomain
from lda.data.options import BatchSettings
from lda.data.packed import PackedImages
from lda.data.records import ImageRecord
from lda.data.sources import SourceDomain
from lda.data.transforms import Augment, normalise
from lda.errors import UsageError

PLAIN = BatchSettings(ids_per_batch=4, images_per_id=4, pad=2, auto_augment_probability=0.2)
ONE, ALL = Layout("one"), Layout("all")
NATURAL = Layout("all", shares="natural")
LAYOUTS = pytest.mark.parametrize("layout", [ONE, ALL, NATURAL], ids=["one", "all", "natural"])


class Numbered(PackedImages):
    """Images that hold their own position, in place of a file."""

    def __init__(self, count: int, domain: int) -> None:
        super().__init__(Path(f"domain-{domain}"), (count, 3, 8, 4))
        self.content = np.zeros(self.shape, np.uint8)
        self.content[:, 0] = domain
        self.content[:, 1] = (np.arange(count) // 256)[:, None, None]
        self.content[:, 2] = (np.arange(count) % 256)[:, None, None]

    def __getstate__(self) -> dict:
        return self.__dict__

    @property
    def array(self) -> np.ndarray:
        return self.content


def _domain(name: str, images: Sequence[int], cameras: int = 3, seed: int = 0) -> SourceDomain:
    """`images[i]` images of identity i, from random cameras, in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(images)), images)).astype(np.int64)
    camids = rng.integers(cameras, size=len(labels)).tolist()
    pairs = zip(labels, camids, strict=True)
    records = [ImageRecord(Path(f"{name}/{i}.jpg"), int(pid), cam) for i, (pid, cam) in enumerate(pairs)]
    return SourceDomain(name, tuple(records), labels, len(images))


SOURCES = (
    _domain("market1501", [6] * 11, seed=1),
    _domain("msmt17", [1, 2, 3, 4, 5, 6, 7, 8, 9], seed=2),
    _domain("cuhk_sysu", [3] * 14, cameras=1, seed=3),
)
PACKED = tuple(Numbered(len(source.records), index) for index, source in enumerate(SOURCES))


def _batches(layout: Layout = ONE, p: int = 4, k: int = 4, seed: int = 0, augmented: bool = False) -> IdentityBatches:
    settings = replace(PLAIN, ids_per_batch=p, images_per_id=k)
    return IdentityBatches(SOURCES, PACKED, settings, layout, seed, augmented=augmented)


def _rows(batch: Batch) -> list[int]:
    """The position of each image within its domain, read from its pixels."""
    return (batch.images[:, 1, 0, 0].int() * 256 + batch.images[:, 2, 0, 0]).tolist()


def _equal(one: Batch, two: Batch) -> bool:
    return all(b is None if a is None else torch.equal(a, b) for a, b in zip(one, two, strict=True))


# --- what is in a batch ----------------------------------------------------------------------------------------------
@LAYOUTS
def test_p_identities_with_k_images_of_the_right_person(layout: Layout) -> None:
    batches = _batches(p=5, k=3, layout=layout)
    for step in range(60):
        batch = batches[step]
        assert batch.images.shape == (15, 3, 8, 4)
        assert batch.labels.dtype == batch.domains.dtype == torch.int64
        people = list(zip(batch.domains.tolist(), batch.labels.tolist(), strict=True))
        assert Counter(people) == dict.fromkeys(people, 3)
        assert people == [people[first] for first in range(0, 15, 3) for _ in range(3)]  # side by side
        assert batch.images[:, 0, 0, 0].tolist() == batch.domains.tolist()
        for (domain, label), row in zip(people, _rows(batch), strict=True):
            assert SOURCES[domain].labels[row] == label


def test_pure_batches_show_one_domain() -> None:
    batches = _batches()
    assert all(len(set(batches[step].domains.tolist())) == 1 for step in range(50))


def test_domains_are_drawn_uniformly() -> None:
    batches = _batches()
    drawn = [batches.identities(step)[0][0] for step in range(9000)]
    assert chisquare(list(Counter(drawn).values())).pvalue > 1e-3
    pairs = Counter(pairwise(drawn))
    assert len(pairs) == 9
    assert chisquare(list(pairs.values())).pvalue > 1e-3  # no turn taking


@pytest.mark.parametrize("layout", [ONE, ALL], ids=["one", "all"])
@pytest.mark.parametrize("p", [3, 4, 5])
def test_every_identity_once_per_pass(layout: Layout, p: int) -> None:
    """Identities of one domain, in the order of steps: each run of floor(n / P) * P of them has no repeats."""
    batches = _batches(p=p, layout=layout)
    dealt: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(150):
        for domain, identities in batches.identities(step):
            dealt[domain] += identities.tolist()
    for domain, identities in dealt.items():
        count = SOURCES[domain].num_ids
        size = count // p * p
        assert len(identities) > 3 * size
        passes = [identities[start : start + size] for start in range(0, len(identities) - size, size)]
        assert all(len(set(one)) == size for one in passes)
        assert passes[0] != passes[1]
        assert set(identities) == set(range(count))  # who sits out one pass comes in another


def test_a_mixed_batch_is_spread_evenly() -> None:
    for p, expected in ((3, {1}), (4, {1, 2}), (5, {1, 2}), (6, {2}), (8, {2, 3})):
        batches = _batches(p=p, layout=ALL)
        totals = Counter()
        for step in range(30):
            shares = {domain: len(identities) for domain, identities in batches.identities(step)}
            assert sum(shares.values()) == p
            assert set(shares.values()) == expected
            totals.update(shares)
        assert len(set(totals.values())) == 1  # the remainder goes round


# --- natural shares --------------------------------------------------------------------------------------------------
SIZES = [(11, 9, 14), (40, 7, 300, 55), (8, 8), (5, 500), (12,), (9, 9, 9, 1000)]


@pytest.mark.parametrize("counts", SIZES, ids=str)
@pytest.mark.parametrize("p", [4, 5])
def test_natural_shares_by_a_slow_oracle(counts: tuple[int, ...], p: int) -> None:
    """Shares in exact fractions: each step's are rounded up or down and never none, a round's total is exact."""
    dealer = NaturalShares(counts, p, 3)
    shares, single = _exact_shares(counts, p)
    steps = sum(count for d, count in enumerate(counts) if d not in single) // (p - len(single))
    assert dealer.steps == steps
    for round_ in range(3):
        dealt: dict[int, list[int]] = {domain: [] for domain in range(len(counts))}
        for step in range(round_ * steps, (round_ + 1) * steps):
            chosen = dict(dealer(step))
            assert list(chosen) == list(range(len(counts)))  # every step shows all of them
            assert sum(map(len, chosen.values())) == p
            for domain, identities in chosen.items():
                assert len(identities) in (math.floor(shares[domain]), math.ceil(shares[domain]))
                assert len(set(identities.tolist())) == len(identities) >= 1
                dealt[domain] += identities.tolist()
        for domain, identities in dealt.items():
            assert len(identities) in (math.floor(steps * shares[domain]), math.ceil(steps * shares[domain]))
            if domain not in single:  # a round is one pass: who is left over sits it out
                assert len(set(identities)) == len(identities) <= counts[domain]
                assert counts[domain] - len(identities) <= p


def _exact_shares(counts: Sequence[int], p: int) -> tuple[list[Fraction], set[int]]:
    """(identities of each domain in a step, the domains that are raised to one)."""
    single: set[int] = set()
    while True:
        rest = sum(count for domain, count in enumerate(counts) if domain not in single)
        shares = [
            Fraction(1) if domain in single else Fraction((p - len(single)) * count, rest)
            for domain, count in enumerate(counts)
        ]
        if min(shares) >= 1:
            return shares, single
        single |= {domain for domain, share in enumerate(shares) if share < 1}


def test_a_domain_raised_to_one_identity_has_passes_of_its_own() -> None:
    dealer = NaturalShares((5, 500), 4, 0)
    dealt = [int(dict(dealer(step))[0][0]) for step in range(300)]
    assert all(set(dealt[start : start + 5]) == set(range(5)) for start in range(0, 300, 5))
    assert len({tuple(dealt[start : start + 5]) for start in range(0, 300, 5)}) > 20


def test_natural_shares_are_mixed_over_a_round() -> None:
    """No quarter of a round has many more of a domain than another quarter, and rounds differ."""
    dealer = NaturalShares((1000, 1300, 1700), 10, 0)
    sizes = np.array([[len(identities) for _, identities in dealer(step)] for step in range(2 * dealer.steps)])
    quarters = [part.sum(axis=0) for part in np.array_split(sizes[: dealer.steps], 4)]
    assert (np.ptp(quarters, axis=0) <= 30).all()
    assert (sizes[: dealer.steps] != sizes[dealer.steps :]).any()
    assert set(range(1700)) == {pid for step in range(2 * dealer.steps) for pid in dict(dealer(step))[2].tolist()}


# --- two views -------------------------------------------------------------------------------------------------------
@LAYOUTS
def test_a_second_view_is_another_augmentation_of_the_same_images(layout: Layout) -> None:
    one, two = (_batches(replace(layout, views=views), augmented=True) for views in (1, 2))
    raw = _batches(replace(layout, views=2))
    for step in (0, 3, 4100):
        first, both, plain = one[step], two[step], raw[step]
        assert both.second is not None
        assert torch.equal(both.images, first.images)  # the first view is that of a layout with one
        assert first.second is None
        assert plain.second is None
        assert not torch.equal(both.second, both.images)
        augment = Augment(raw.settings)
        assert torch.equal(augment(plain.images, raw.generator(step, 1)), both.second)
        assert _equal(raw.augment(plain, step), both)


def test_views_differ_in_every_step() -> None:
    batches = _batches()
    states = {bytes(batches.generator(step, view).get_state().numpy()) for step in range(50) for view in (0, 1)}
    assert len(states) == 100


# --- every image once ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_clean_images_are_all_images_once_in_order(size: int) -> None:
    clean = CleanImages(SOURCES, PACKED, size)
    for _ in range(2):  # as often as wanted
        batches = list(clean)
        assert len(batches) == len(clean)
        assert all(len(set(batch.domains.tolist())) == 1 and len(batch.labels) <= size for batch in batches)
        domains = torch.cat([batch.domains for batch in batches])
        assert domains.tolist() == [d for d, source in enumerate(SOURCES) for _ in source.records]
        images, labels = torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])
        assert labels.tolist() == [label for source in SOURCES for label in source.labels.tolist()]
        assert labels.dtype == domains.dtype == torch.int64
        expected = normalise(torch.cat([packed.batch(range(len(packed))) for packed in PACKED]))
        assert torch.equal(images, expected)


# --- images of one identity ------------------------------------------------------------------------------------------
def test_images_repeat_only_where_there_are_too_few() -> None:
    batches = _batches(p=4, k=4)
    seen: dict[int, set[int]] = {}
    for step in range(300):
        batch = batches[step]
        rows = _rows(batch)
        for start in range(0, 16, 4):
            domain, label = int(batch.domains[start]), int(batch.labels[start])
            have = int((SOURCES[domain].labels == label).sum())
            times = Counter(rows[start : start + 4])
            assert len(times) == min(4, have)
            assert max(times.values()) - min(times.values()) <= 1
            if domain == 0:
                seen.setdefault(label, set()).update(times)
    assert all(len(rows) == 6 for rows in seen.values())  # over time, all of them


def test_as_many_cameras_as_possible() -> None:
    batches = _batches(p=4, k=4)
    for step in range(200):
        batch = batches[step]
        for start in range(0, 16, 4):
            source = SOURCES[int(batch.domains[start])]
            own = np.flatnonzero(source.labels == int(batch.labels[start]))
            have = Counter(source.records[row].camid for row in own)
            drawn = Counter(source.records[row].camid for row in set(_rows(batch)[start : start + 4]))
            assert len(drawn) == min(4, len(have))
            # Dealt in rounds: no camera is two ahead of one that still has images.
            assert all(drawn[a] - drawn[b] <= 1 for a in drawn for b in drawn if drawn[b] < have[b])


def test_images_of_an_identity_are_equally_likely() -> None:
    source = _domain("market1501", [8, 8], cameras=1, seed=5)
    batches = IdentityBatches(
        [source], [Numbered(16, 0)], replace(PLAIN, ids_per_batch=2, images_per_id=2), ONE, 0, augmented=False
    )
    drawn = Counter(row for step in range(2000) for row in _rows(batches[step]))
    assert chisquare([drawn[row] for row in range(16)]).pvalue > 1e-3


# --- a pure function of (seed, step) ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layout", "augmented", "digest"),
    [
        (ONE, True, "872ab18cfaf08298"),
        (ONE, False, "4cec11cb6a88ab4d"),
        (ALL, True, "0d90ab90cc4ead46"),
        (ALL, False, "e22e973298e3ce61"),
    ],
)
def test_batches_never_change(layout: Layout, augmented: bool, digest: str) -> None:
    """Results of finished runs rest on them."""
    settings = BatchSettings(ids_per_batch=5, images_per_id=3)
    batches = IdentityBatches(SOURCES, PACKED, settings, layout, 7, augmented=augmented)
    found = hashlib.sha256()
    for step in (*range(40), 4095, 4096, 9000):
        for part in batches[step][:3]:
            found.update(part.numpy().tobytes())
    assert found.hexdigest()[:16] == digest


@LAYOUTS
def test_steps_in_any_order_give_the_same_batches(layout: Layout) -> None:
    forward = _batches(augmented=True, layout=layout)
    expected = {step: forward[step] for step in (*range(12), 4095, 4096, 9000)}
    order = np.random.default_rng(0).permutation(list(expected)).tolist()
    again = _batches(augmented=True, layout=layout)
    assert all(_equal(again[step], expected[step]) for step in order)
    assert all(_equal(_batches(augmented=True, layout=layout)[step], expected[step]) for step in (9000, 3))


@LAYOUTS
def test_seeds_and_steps_differ(layout: Layout) -> None:
    one, two = _batches(augmented=True, layout=layout), _batches(augmented=True, seed=1, layout=layout)
    assert not any(torch.equal(one[step].images, two[step].images) for step in range(8))
    assert not any(torch.equal(one[step].images, one[step + 1].images) for step in range(8))


def test_the_number_of_earlier_steps_is_that_of_counting() -> None:
    dealer = OneDomain([11, 9, 14], 3, 0)
    counted = [0, 0, 0]
    for step in range(4096 + 300):
        domain, earlier = dealer.domain_of(step)
        assert earlier == counted[domain]
        counted[domain] += 1


def test_global_random_state_plays_no_part() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = _batches(augmented=True)[5]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    np.random.seed(2)
    assert _equal(_batches(augmented=True)[5], expected)
    torch.set_rng_state(state)


def test_without_augmentation_the_caller_can_augment() -> None:
    plain, augmented = _batches(), _batches(augmented=True)
    assert plain[7].images.dtype == torch.uint8
    assert _equal(plain.augment(plain[7], 7), augmented[7])


# --- workers ---------------------------------------------------------------------------------------------------------
@LAYOUTS
def test_workers_and_resume_change_nothing(layout: Layout) -> None:
    batches = _batches(augmented=True, layout=layout)
    expected = list(batch_loader(batches, 0, 12, workers=0))
    assert len(expected) == 12
    assert all(isinstance(batch, Batch) for batch in expected)
    resumed = list(batch_loader(_batches(augmented=True, layout=layout), 5, 12, workers=2))
    assert all(_equal(one, two) for one, two in zip(expected[5:], resumed, strict=True))


def test_real_files_and_full_size_images_with_threads_and_workers(tmp_path: Path) -> None:
    """Bit for bit: the parent may use several threads, a worker has one."""
    shape = (len(SOURCES[0].records), 3, 128, 64)
    path = tmp_path / "images.u8"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).tobytes())
    batches = IdentityBatches(SOURCES[:1], [PackedImages(path, shape)], BatchSettings(ids_per_batch=8), ONE, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = list(batch_loader(batches, 0, 4))
    finally:
        torch.set_num_threads(threads)
    assert all(_equal(a, b) for a, b in zip(expected, batch_loader(batches, 0, 4, workers=1), strict=True))


_SCRIPT = """
from pathlib import Path
import sys
import numpy as np
from lda.batch import Layout
from lda.data.batches import IdentityBatches, batch_loader
from lda.data.options import BatchSettings
from lda.data.packed import PackedImages
from lda.data.records import ImageRecord
from lda.data.sources import SourceDomain

def main():
    labels = np.repeat(np.arange(8), 4)
    records = tuple(ImageRecord(Path(f"{{row}}.jpg"), int(pid), 0) for row, pid in enumerate(labels))
    images = PackedImages(Path({images!r}), (32, 3, 8, 4))
    settings = BatchSettings(ids_per_batch=4, pad=2, auto_augment_probability=0)
    batches = IdentityBatches([SourceDomain("market1501", records, labels, 8)], [images], settings, Layout("one"), 0)
    loader = batch_loader(batches, 0, 10**6, workers=2)
    next(loader)
    print("first", flush=True)
    {then}

if __name__ == "__main__":
    main()
"""


def _children(pid: int) -> list[int]:
    """Every living descendant of a process (Linux)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found += [int(entry.name), *_children(int(entry.name))]
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("then", "send", "code"),
    [
        ("sys.exit(3)", None, 3),
        ("import time; time.sleep(100)", signal.SIGINT, -signal.SIGINT),
        ("import time; time.sleep(100)", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_nothing_hangs_or_stays_behind(tmp_path: Path, then: str, send: signal.Signals | None, code: int) -> None:
    script = tmp_path / "main.py"
    (tmp_path / "images.u8").write_bytes(bytes(32 * 3 * 8 * 4))
    script.write_text(_SCRIPT.format(images=str(tmp_path / "images.u8"), then=then))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    started = process.stdout.readline()
    left = _children(process.pid) if send else []
    if send:
        process.send_signal(send)
    _, error = process.communicate(timeout=90)
    assert started == b"first\n", error.decode()
    assert process.returncode == code, error.decode()
    assert len(left) >= 2 or not send  # the fork server and its workers
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in left if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


# --- refusals --------------------------------------------------------------------------------------------------------
def test_too_few_identities() -> None:
    with pytest.raises(UsageError, match=r"MSMT17 has 9 identities to train on, ids_per_batch is 10"):
        _batches(p=10)
    with pytest.raises(UsageError, match=r"ids_per_batch: 2 identities cannot be spread over 3 domains"):
        _batches(p=2, layout=ALL)
    with pytest.raises(IndexError, match="step -1"):
        _batches()[-1]
