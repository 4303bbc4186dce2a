"""Tasks of a few drawn rectangles, with any number of sources, for tests of methods and of the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lda.data.records import ImageRecord
from lda.data.sources import Content, EvaluationSet, SourceDomain, Task

SIZE = (16, 32)  # width, height


def write_image(path: Path, pid: int, camid: int, domain: int, shot: int) -> Path:
    """Two garments whose colours say who it is, on a ground that says where, with noise."""
    random = np.random.default_rng([pid, camid, domain, shot])
    colours = np.random.default_rng([pid, domain]).integers(0, 255, (2, 3))
    pixels = np.full((SIZE[1], SIZE[0], 3), 40 + 50 * (domain % 4) + 15 * camid, dtype=float)
    pixels[4:16, 4:12], pixels[16:28, 4:12] = colours
    pixels += random.normal(0, 12, pixels.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def records(root: Path, domain: int, pids: range, shots: int = 2, cameras: int = 2) -> list[ImageRecord]:
    """`shots` images of every person and camera of one domain."""
    return [
        ImageRecord(write_image(root / f"d{domain}" / f"{pid:03d}_{cam}_{shot}.png", pid, cam, domain, shot), pid, cam)
        for pid in pids
        for cam in range(cameras)
        for shot in range(shots)
    ]


def source(root: Path, domain: int, ids: int) -> SourceDomain:
    """A source domain of `ids` persons with four images each."""
    found = sorted(records(root, domain, range(ids)), key=lambda record: record.path)
    labels = np.array([record.pid for record in found], dtype=np.int64)
    return SourceDomain(f"source{domain}", tuple(found), labels, ids)


def evaluation_set(root: Path, domain: int, pids: range, name: str = "") -> EvaluationSet:
    """Camera 0 asks, camera 1 is searched."""
    found = records(root, domain, pids, shots=1)
    query = tuple(record for record in found if record.camid == 0)
    return EvaluationSet(name or f"source{domain}", query, tuple(record for record in found if record.camid == 1))


def make_task(root: Path, num_domains: int, ids: int = 6) -> Task:
    """K sources of 6, 7, 8, ... persons, and a target."""
    sources = tuple(source(root, domain, ids + domain) for domain in range(num_domains))
    return Task(
        protocol="protocol3",
        target="market1501",
        sources=sources,
        validation=tuple(evaluation_set(root, domain, range(50, 54)) for domain in range(num_domains)),
        content=Content({one.name: f"hash{k}" for k, one in enumerate(sources)}, "hash", standin=True),
        versions={},
        test_splits=(evaluation_set(root, 9, range(6), "market1501"),),
    )
