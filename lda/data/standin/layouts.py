"""Which images a stand-in data set has, and where and under which name each one lies.

One planner per data set, in the layouts and name grammars that the loaders read (see their docstrings). A planner
draws nothing: it returns a `Plan`. The tables below state how many persons and images each scale has; at `full` these
are the published counts. Every query has a match under another camera.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lda.data.standin.domains import DOMAINS
from lda.data.standin.scenes import Box

PERFECT, DETECTED = Box(0.5), Box(3.0)  # CUHK03's hand-drawn and detected boxes


@dataclass(frozen=True, slots=True)
class Shot:
    """One image to draw: `path` below the root; the person, camera and moment (`take`) fix its content."""

    path: str
    person: int
    camera: int
    take: int
    box: Box = Box()  # noqa: RUF009  (frozen)


@dataclass
class Plan:
    """The images of one data set, its other files (path -> content) and the counts of its parts."""

    shots: list[Shot] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    _seen: dict[str, list[tuple[int | None, int]]] = field(default_factory=dict)

    def add(self, part: str, shot: Shot, pid: int | None, camid: int) -> None:
        """Adds an image that the loader counts under `part`; `pid` None counts as an image of no identity."""
        self.shots.append(shot)
        self._seen.setdefault(part, []).append((pid, camid))

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Part -> numbers of identities, images and cameras, as the loaders count them."""
        return {
            part: {
                "ids": len({pid for pid, _ in seen if pid is not None}),
                "images": len(seen),
                "cameras": len({camid for _, camid in seen}),
            }
            for part, seen in sorted(self._seen.items())
        }


# Scale -> counts. `small` keeps the proportions of the real sets with about a hundredth to a tenth of the images.
_Sizes = Mapping[str, Mapping[str, int]]
_MARKET: _Sizes = {
    "tiny": {"train_ids": 14, "train": 98, "test_ids": 12, "query": 24, "gallery": 72, "background": 6, "junk": 6},
    "small": {"train_ids": 140, "train": 1120, "test_ids": 90, "query": 200, "gallery": 620, "background": 40,
              "junk": 24},
    "full": {"train_ids": 751, "train": 12936, "test_ids": 750, "query": 3368, "gallery": 13115, "background": 2798,
             "junk": 3819},
}  # fmt: skip
_MSMT: _Sizes = {
    "tiny": {"train_ids": 14, "train": 98, "val": 8, "test_ids": 12, "query": 24, "gallery": 78},
    "small": {"train_ids": 150, "train": 1160, "val": 90, "test_ids": 90, "query": 200, "gallery": 660},
    "full": {"train_ids": 1041, "train": 30248, "val": 2373, "test_ids": 3060, "query": 11659, "gallery": 82161},
}
_SYSU: _Sizes = {
    "tiny": {"ids": 20, "images": 80}, "small": {"ids": 200, "images": 820}, "full": {"ids": 11934, "images": 34574},
}  # fmt: skip
_CUHK02: Mapping[str, tuple[int, ...]] = {  # identities of the pairs P1 to P5, four images each
    "tiny": (6, 4, 3, 3, 4), "small": (60, 30, 18, 22, 30), "full": (971, 306, 107, 193, 239),
}  # fmt: skip
_CUHK03_PAIRS: Mapping[str, tuple[int, ...]] = {
    "tiny": (10, 8, 3, 3, 2), "small": (108, 62, 18, 14, 13), "full": (843, 440, 77, 58, 49),
}  # fmt: skip
# The hand-drawn and the detected boxes differ by a few images, as published.
_CUHK03: _Sizes = {
    "tiny": {"train_ids": 14, "train": 98, "train_detected": 97, "gallery": 75, "gallery_detected": 76},
    "small": {"train_ids": 130, "train": 1042, "train_detected": 1039, "gallery": 615, "gallery_detected": 619},
    "full": {"train_ids": 767, "train": 7368, "train_detected": 7365, "gallery": 5328, "gallery_detected": 5332},
}  # fmt: skip


def spread(total: int, parts: int, low: int, high: int, rng: np.random.Generator) -> list[int]:
    """`total` split into `parts` uneven numbers of `low` to `high`. Raises ValueError if that cannot be."""
    if not parts * low <= total <= parts * high:
        raise ValueError(f"{total} cannot be split into {parts} numbers of {low} to {high}")
    numbers, rest = np.full(parts, low), total - parts * low
    while rest:
        open_ones = rng.permutation(np.flatnonzero(numbers < high))
        chosen = open_ones[: min(rest, max(1, len(open_ones) // 3))]
        numbers[chosen] += 1
        rest -= len(chosen)
    return [int(n) for n in numbers]


def _cameras(count: int, of: int, rng: np.random.Generator) -> list[int]:
    """`count` different cameras of `of`, in random order."""
    return [int(c) for c in rng.permutation(of)[: min(count, of)]]


def market1501(scale: str, rng: np.random.Generator) -> Plan:
    """`Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}/0001_c1s1_000001_00.jpg`.

    Identities are 1 to 1501 at every scale; 0000 (distractors) and -1 (junk) lie in bounding_box_test, beside the
    `Thumbs.db` that the common archive brings.
    """
    size, plan, cameras = _MARKET[scale], Plan(), DOMAINS["market1501"].cameras
    root, background, junk = "Market-1501-v15.09.15", 0, -1
    people = size["train_ids"] + size["test_ids"]
    pids = sorted(int(p) for p in rng.permutation(1501)[:people] + 1)
    rng.shuffle(pids)

    def add(part: str, folder: str, person: int, pid: int, camera: int, box: Box = Box()) -> None:  # noqa: B008
        take = len(plan.shots)
        name = "-1" if pid == junk else f"{pid:04d}"
        path = f"{root}/{folder}/{name}_c{camera + 1}s{take % 6 + 1}_{take + 1:06d}_{take % 3:02d}.jpg"
        shot = Shot(path, person, camera, take, box)
        if pid == junk:
            plan.shots.append(shot)  # the loader leaves it out
        else:
            plan.add(part, shot, None if pid == background else pid, camera)

    for person, images in enumerate(spread(size["train"], size["train_ids"], 4, 60, rng)):
        own = _cameras(int(rng.integers(2, cameras + 1)), cameras, rng)
        for k in range(images):
            add("train", "bounding_box_train", person, pids[person], own[k % len(own)])
    queries = spread(size["query"], size["test_ids"], 1, cameras, rng)
    galleries = spread(size["gallery"], size["test_ids"], 4, 60, rng)
    for person, (asked, stored) in enumerate(zip(queries, galleries, strict=True), start=size["train_ids"]):
        own = _cameras(max(2, asked, int(rng.integers(2, cameras + 1))), cameras, rng)
        for camera in own[:asked]:  # at most one query of a person under each camera
            add("query", "query", person, pids[person], camera)
        for k in range(stored):
            add("gallery", "bounding_box_test", person, pids[person], own[k % len(own)])
    for k in range(size["background"] + size["junk"]):
        pid = background if k < size["background"] else junk
        box = Box(junk=pid == junk or k % 3 == 0, empty=pid == background and k % 3 == 1)
        add("gallery", "bounding_box_test", people + k, pid, int(rng.integers(cameras)), box)
    plan.files[f"{root}/bounding_box_train/Thumbs.db"] = b"not an image"
    plan.files[f"{root}/bounding_box_test/Thumbs.db"] = b"not an image"
    return plan


def msmt17(scale: str, rng: np.random.Generator) -> Plan:
    """`MSMT17_V1/{train,test}/0000/0000_000_01_0303morning_0001_0.jpg` and `list_{train,val,query,gallery}.txt`.

    Train and test identities both count from 0; list_val names further images of the training identities.
    """
    size, plan, cameras = _MSMT[scale], Plan(), DOMAINS["msmt17"].cameras
    lists: dict[str, list[str]] = {part: [] for part in ("train", "val", "query", "gallery")}

    def add(part: str, person: int, pid: int, number: int, camera: int) -> None:
        take = len(plan.shots)
        day = ("0302", "0303", "0113", "0114")[int(rng.integers(4))]
        session = ("morning", "noon", "afternoon")[int(rng.integers(3))]
        name = f"{pid:04d}/{pid:04d}_{number:03d}_{camera + 1:02d}_{day}{session}_{take % 10000:04d}_{take % 3}.jpg"
        lists[part].append(f"{name} {pid}\n")
        folder = "train" if part in ("train", "val") else "test"
        plan.add(part, Shot(f"MSMT17_V1/{folder}/{name}", person, camera, take), pid, camera)

    def add_person(person: int, pid: int, first: tuple[str, int], second: tuple[str, int]) -> None:
        """`first`, `second`: (part, images). Images go round the person's cameras."""
        (part, images), (other, others) = first, second
        own = _cameras(int(rng.integers(2, min(cameras, images) + 1)), cameras, rng)
        for k in range(images):
            add(part, person, pid, k, own[k % len(own)])
        for k in range(others):
            add(other, person, pid, images + k, own[k % len(own)])

    train_ids = size["train_ids"]
    trained = spread(size["train"], train_ids, 4, 200, rng)
    held = spread(size["val"], train_ids, 0, 20, rng)
    for pid in range(train_ids):
        add_person(pid, pid, ("train", trained[pid]), ("val", held[pid]))
    galleries = spread(size["gallery"], size["test_ids"], 4, 200, rng)
    queries = spread(size["query"], size["test_ids"], 1, 15, rng)
    for pid in range(size["test_ids"]):
        add_person(train_ids + pid, pid, ("gallery", galleries[pid]), ("query", queries[pid]))
    for part, lines in lists.items():
        plan.files[f"MSMT17_V1/list_{part}.txt"] = "".join(lines).encode()
    return plan


def cuhk_sysu(scale: str, rng: np.random.Generator) -> Plan:
    """`cuhk_sysu/cropped_images/p1_s1_1.jpg`: person, scene, running number. A person is seen in few places; the
    loader gives every image camera 0."""
    size, plan, places = _SYSU[scale], Plan(), DOMAINS["cuhk_sysu"].cameras
    for person, images in enumerate(spread(size["images"], size["ids"], 2, 12, rng)):
        own = _cameras(int(rng.integers(2, 4)), places, rng)
        for k in range(images):
            take, camera = len(plan.shots), own[k % len(own)]
            scene = 1 + camera + places * int(rng.integers(300))
            path = f"cuhk_sysu/cropped_images/p{person + 1}_s{scene}_{k + 1}.jpg"
            plan.add("train", Shot(path, person, camera, take), person + 1, 0)
    return plan


def cuhk02(scale: str, rng: np.random.Generator) -> Plan:
    """`cuhk02/Dataset/P1..P5/{cam1,cam2}/001_0001.png`: four images of a person, two in each view of one camera pair.
    Numbers of persons start again in every pair."""
    plan, person = Plan(), 0
    for pair, ids in enumerate(_CUHK02[scale]):
        for index in range(ids):
            for view in range(2):
                for number in range(2):
                    path = f"cuhk02/Dataset/P{pair + 1}/cam{view + 1}/{index + 1:03d}_{number + 1:04d}.png"
                    camera = 2 * pair + view
                    plan.add("train", Shot(path, person, camera, len(plan.shots)), person, camera)
            person += 1
    return plan


def cuhk03(scale: str, rng: np.random.Generator) -> Plan:
    """`cuhk03-np/{labeled,detected}/{bounding_box_train,query,bounding_box_test}/0001_c1_1.png`: the new protocol.

    Both kinds of boxes show the same moments. A test person has one query in each of its two views.
    """
    size, plan = _CUHK03[scale], Plan()
    pairs = [pair for pair, ids in enumerate(_CUHK03_PAIRS[scale]) for _ in range(ids)]
    order = [int(p) for p in rng.permutation(len(pairs))]
    train, test = sorted(order[: size["train_ids"]]), sorted(order[size["train_ids"] :])
    trained = spread(max(size["train"], size["train_detected"]), len(train), 4, 10, rng)
    stored = spread(max(size["gallery"], size["gallery_detected"]), len(test), 2, 8, rng)
    moments: dict[str, list[tuple[int, int, int]]] = {"train": [], "query": [], "gallery": []}  # person, view, number
    for person, images in zip(train, trained, strict=True):
        moments["train"] += [(person, k % 2, 5 * (k % 2) + k // 2 + 1) for k in range(images)]
    for person, images in zip(test, stored, strict=True):
        moments["query"] += [(person, view, 5 * view + 1) for view in range(2)]
        moments["gallery"] += [(person, k % 2, 5 * (k % 2) + k // 2 + 2) for k in range(images)]
    for boxes, box, suffix in (("labeled", PERFECT, ""), ("detected", DETECTED, "_detected")):
        for part, folder in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")):
            seen = moments[part]
            spare = len(seen) - size.get(part + suffix, len(seen))
            # Left out where a box was missed: third or later images of a view, so that every match stays.
            late = [k for k, (_, view, number) in enumerate(seen) if number - 5 * view >= 3]
            missed = set(late[:spare])
            for k, (person, view, number) in enumerate(seen):
                if k not in missed:
                    path = f"cuhk03-np/{boxes}/{folder}/{person + 1:04d}_c{view + 1}_{number}.png"
                    take = 10 * person + number - 1
                    shot = Shot(path, person, 2 * pairs[person] + view, take, box)
                    plan.add(f"{boxes}/{part}", shot, person + 1, view)
    return plan


# --- the single-shot targets: their published numbers of files at every scale, which the field's readers assert ------
def prid(scale: str, rng: np.random.Generator) -> Plan:
    """`prid_2011/single_shot/{cam_a,cam_b}/person_0001.png`: 385 and 749 persons, of whom 1 to 200 are in both."""
    plan, shared, in_a, in_b = Plan(), 200, 385, 749
    for camera, (part, persons) in enumerate((("cam_a", in_a), ("cam_b", in_b))):
        for index in range(persons):
            person = index if camera == 0 or index < shared else in_a + index - shared
            path = f"prid_2011/single_shot/{part}/person_{index + 1:04d}.png"
            plan.add(part, Shot(path, person, camera, len(plan.shots)), index + 1, camera)
    return plan


def grid(scale: str, rng: np.random.Generator) -> Plan:
    """`underground_reid/{probe,gallery}/0001_1_25004_107_32_106_221.jpeg` (person, camera, frame, box): 250 pairs, 775
    further gallery images of nobody (0000), and ten partitions in `features_and_partitions.mat`."""
    plan, cameras, pairs, others = Plan(), DOMAINS["grid"].cameras, 250, 775

    def add(part: str, person: int, pid: int, camera: int) -> None:
        frame, x, y, width, height = (int(n) for n in rng.integers((0, 0, 0, 60, 150), (30000, 500, 300, 120, 260)))
        path = f"underground_reid/{part}/{pid:04d}_{camera + 1}_{frame}_{x}_{y}_{width}_{height}.jpeg"
        plan.add(part, Shot(path, person, camera, len(plan.shots)), pid or None, camera)

    for person in range(pairs):
        for part, camera in zip(("probe", "gallery"), _cameras(2, cameras, rng), strict=True):
            add(part, person, person + 1, camera)
    for k in range(others):
        add("gallery", pairs + k, 0, int(rng.integers(cameras)))
    trained = [sorted(rng.permutation(pairs)[: pairs // 2] + 1) for _ in range(10)]
    plan.files["underground_reid/features_and_partitions.mat"] = _grid_partitions(trained)
    return plan


def _grid_partitions(trained: list[list[np.int64]]) -> bytes:
    """The .mat file: `trainIdxAll` holds a struct per partition whose third field names the training persons."""
    from scipy.io import savemat  # slow to import, and every drawing process imports this module

    cells = np.empty((1, len(trained)), dtype=object)
    for split, persons in enumerate(trained):
        empty = np.zeros((1, 0))
        cells[0, split] = {"features": empty, "labels": empty, "trainIdx": np.array([persons], dtype=float)}
    file = io.BytesIO()
    savemat(file, {"trainIdxAll": cells})
    header = b"MATLAB 5.0 MAT-file, stand-in".ljust(116)  # of fixed length; scipy would write the time of day
    return header + file.getvalue()[len(header) :]


def viper(scale: str, rng: np.random.Generator) -> Plan:
    """`VIPeR/{cam_a,cam_b}/000_45.bmp`: 632 pairs, numbers 0 to 873 with gaps. The viewing angles in the names are
    drawn freely and say nothing about the pose; the places of one view differ from those of the other."""
    plan, places = Plan(), DOMAINS["viper"].cameras // 2
    for person, pid in enumerate(sorted(int(p) for p in rng.permutation(874)[:632])):
        angles = 45 * rng.permutation(5)[:2]
        for view, part in enumerate(("cam_a", "cam_b")):
            path = f"VIPeR/{part}/{pid:03d}_{angles[view]}.bmp"
            camera = places * view + int(rng.integers(places))
            plan.add(part, Shot(path, person, camera, len(plan.shots)), pid, view)
    return plan


def ilids(scale: str, rng: np.random.Generator) -> Plan:
    """`i-LIDS_Pedestrian/Persons/0001001.jpg`: person, number of the image, which the loader takes for the camera; 476
    images of 119 persons."""
    plan, cameras = Plan(), DOMAINS["ilids"].cameras
    persons_with = {2: 22, 3: 33, 4: 24, 5: 15, 6: 17, 7: 4, 8: 4}  # images -> persons, as published
    sizes = [images for images, persons in persons_with.items() for _ in range(persons)]
    for person, images in enumerate(rng.permutation(sizes).tolist()):
        own = _cameras(int(rng.integers(2, 4)), cameras, rng)
        for k in range(images):
            path = f"i-LIDS_Pedestrian/Persons/{person + 1:04d}{k + 1:03d}.jpg"
            plan.add("persons", Shot(path, person, own[k % len(own)], len(plan.shots)), person + 1, k)
    return plan


LAYOUTS: dict[str, Callable[[str, np.random.Generator], Plan]] = {
    "market1501": market1501,
    "msmt17": msmt17,
    "cuhk_sysu": cuhk_sysu,
    "cuhk02": cuhk02,
    "cuhk03": cuhk03,
    "prid": prid,
    "grid": grid,
    "viper": viper,
    "ilids": ilids,
}
"""Data set name -> its planner."""
FIRST = ("market1501", "msmt17", "cuhk_sysu", "cuhk02", "cuhk03")
"""The sets that version 1 began with; they share one content hash (see `standin`)."""
SCALES: dict[str, float] = {"tiny": 0.5, "small": 0.5, "full": 1.0}
"""Scale -> factor on the images' size (`Domain.height`); see `pixel_factor`."""


def pixel_factor(name: str, scale: str) -> float:
    """Factor on a data set's image size. The sets that have all their images at every scale are smaller at `tiny`."""
    return 0.3125 if scale == "tiny" and name not in FIRST else SCALES[scale]
