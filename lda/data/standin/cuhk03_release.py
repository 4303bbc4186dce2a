"""The stand-in's CUHK03 as its authors released it: `cuhk-03.mat` and the two files of the new protocol.

    python -m lda.data.standin --output DIR --cuhk03-release OTHER

`OTHER` then holds `cuhk03/cuhk03_release/cuhk-03.mat` (MATLAB 7.3, that is HDF5), `cuhk03/cuhk03_new_protocol_config_
{labeled,detected}.mat` (MATLAB 5) and a STANDIN.json: the same images as `DIR/cuhk03-np`, pixel by pixel. It is a
folder of its own because a reader that finds both layouts takes the folders.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

from lda.data.making import whole_folder
from lda.data.standin.draw import plans
from lda.data.standin.scenes import stable_rng
from lda.data.survey import MARKER
from lda.errors import UsageError

BOXES = ("labeled", "detected")
PARTS = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}
TESTSETS = 20  # of the old protocol
PAIRS = 5


@dataclass(frozen=True, order=True)
class _Cell:
    """One image: its place in the tables (pair, person within the pair, column of ten) and in the new protocol."""

    pair: int
    person: int
    column: int
    path: Path
    part: str
    pid: int

    @property
    def name(self) -> str:
        """The new protocol's name of it, which numbers on through both views."""
        return f"{self.pair}_{self.person:03d}_{self.column // 5 + 1}_{self.column + 1:02d}.png"


def write_release(standin: Path, output: Path) -> None:
    """Writes the release of the stand-in below `standin` to `output`, whole or not at all.

    Raises UsageError if `standin` is not a stand-in or `output` is not free.
    """
    try:
        marker: dict[str, Any] = json.loads((standin / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{standin}: holds no readable {MARKER}; draw the stand-in first") from None
    output = output.expanduser().absolute()
    if output.exists():
        raise UsageError(f"{output} exists; name a new folder for the CUHK03 release")
    with whole_folder(output, "writing the CUHK03 release") as aside:
        if aside is None:
            raise UsageError(f"{output}: another process has made it meanwhile")
        _write(standin, aside, marker)


def _write(standin: Path, root: Path, marker: dict[str, Any]) -> None:
    cells = {boxes: _cells(standin, boxes, marker) for boxes in BOXES}
    digest = hashlib.sha256()
    release = root / "cuhk03/cuhk03_release/cuhk-03.mat"
    release.parent.mkdir(parents=True)
    persons = sorted({(cell.pair, cell.person) for cell in cells["labeled"]})
    with h5py.File(release, "w") as file:
        store = file.create_group("#refs#")
        for boxes in BOXES:
            _write_tables(file, store, boxes, cells[boxes], digest)
            _write_protocol(root / f"cuhk03/cuhk03_new_protocol_config_{boxes}.mat", cells[boxes])
        rng = stable_rng(marker["seed"], int.from_bytes(b"testsets", "big"))
        references = file.create_dataset("testsets", (1, TESTSETS), dtype=h5py.ref_dtype)
        for k in range(TESTSETS):
            chosen = sorted(rng.permutation(len(persons))[: min(100, len(persons) // 2)].tolist())
            columns = np.array([persons[p] for p in chosen], dtype=np.float64).T  # 2 x K: pair, person
            references[0, k] = store.create_dataset(f"testset{k}", data=columns).ref
    everything = {
        f"{boxes}/all": {"ids": len({cell.pid for cell in own}), "images": len(own), "cameras": 2}
        for boxes, own in cells.items()
    }
    content = {
        **marker,
        "hashes": {"cuhk03": digest.hexdigest()},
        "counts": {"cuhk03": {**marker["counts"]["cuhk03"], **everything}},
    }
    (root / MARKER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _cells(standin: Path, boxes: str, marker: dict[str, Any]) -> list[_Cell]:
    """Every image of one kind of boxes, sorted."""
    shots = plans(marker["scale"], marker["seed"], ["cuhk03"])["cuhk03"].shots
    pair_of = {shot.person: shot.camera // 2 + 1 for shot in shots}
    people = sorted(pair_of)
    place = {p: 1 + sum(pair_of[other] == pair_of[p] for other in people[:k]) for k, p in enumerate(people)}
    cells = []
    for shot in shots:
        kind, folder, name = shot.path.split("/")[1:]
        if kind == boxes:
            column = int(name.removesuffix(".png").rpartition("_")[2]) - 1
            pair, person = pair_of[shot.person], place[shot.person]
            cells.append(_Cell(pair, person, column, standin / shot.path, PARTS[folder], shot.person + 1))
    return sorted(cells)


def _write_tables(file: h5py.File, store: h5py.Group, boxes: str, cells: list[_Cell], digest: Any) -> None:
    """Five tables of 10 x persons references; an image is stored as 3 x W x H, an empty cell as two zeros."""
    tables = file.create_dataset(boxes, (1, PAIRS), dtype=h5py.ref_dtype)
    empty = store.create_dataset(f"{boxes}/empty", data=np.zeros(2, np.uint64))
    empty.attrs["MATLAB_empty"] = np.uint8(1)
    for pair in range(1, PAIRS + 1):
        own = [cell for cell in cells if cell.pair == pair]
        table = np.full((10, max(cell.person for cell in own)), empty.ref, dtype=h5py.ref_dtype)
        for cell in own:
            with Image.open(cell.path) as image:
                pixels = np.asarray(image.convert("RGB"))
            digest.update(f"{boxes}/{cell.name} {cell.part} {pixels.shape}\n".encode() + pixels.tobytes())
            table[cell.column, cell.person - 1] = store.create_dataset(
                f"{boxes}/{cell.name}", data=pixels.transpose(2, 1, 0)
            ).ref
        tables[0, pair - 1] = store.create_dataset(f"{boxes}/pair{pair}", data=table, dtype=h5py.ref_dtype).ref


def _write_protocol(path: Path, cells: list[_Cell]) -> None:
    """`filelist` with `labels` and `camId` beside it; the parts as 1-based positions in it."""
    names = np.empty((len(cells), 1), dtype=object)
    names[:, 0] = [cell.name for cell in cells]
    index = {
        f"{part}_idx": np.array([[row] for row, cell in enumerate(cells, start=1) if cell.part == part])
        for part in PARTS.values()
    }
    labels, cameras = np.array([[cell.pid, cell.column // 5 + 1] for cell in cells]).T[:, :, None]
    savemat(path, {"filelist": names, "labels": labels, "camId": cameras, **index})
