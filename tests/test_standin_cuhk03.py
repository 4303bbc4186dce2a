"""The stand-in's CUHK03 release: our loader and torchreid's access pattern find the images of the folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from lda import methods
from lda.config import preset
from lda.data import load_dataset
from lda.data.options import DataOptions
from lda.data.sources import build_task, evaluation_splits
from lda.data.standin.__main__ import main
from lda.data.standin.cuhk03_release import write_release
from lda.data.survey import MARKER
from lda.errors import UsageError
from lda.testing import Evaluator


@pytest.fixture(scope="module")
def release(standin_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("release") / "raw"
    assert main(["--output", str(standin_tiny), "--scale", "tiny", "--cuhk03-release", str(output)]) == 0
    return output


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return str(image.size).encode() + image.convert("RGB").tobytes()


@pytest.mark.parametrize("boxes", ["labeled", "detected"])
def test_it_holds_the_images_of_the_folders(release: Path, standin_tiny: Path, boxes: str) -> None:
    raw, folders = (load_dataset("cuhk03", root, cuhk03_boxes=boxes) for root in (release, standin_tiny))
    assert raw.standin
    assert raw.root == release / "cuhk03"
    assert raw.data_hash != folders.data_hash
    for part in ("train", "query", "gallery"):
        content = [
            sorted((r.pid, r.camid, pixels(r.path)) for r in getattr(dataset, part)) for dataset in (raw, folders)
        ]
        assert content[0] == content[1]
        assert content[0]


def test_it_is_read_as_torchreid_does(release: Path) -> None:
    """torchreid: tables and test sets transposed after reading, a cell of fewer than three axes is empty."""
    with h5py.File(release / "cuhk03/cuhk03_release/cuhk-03.mat", "r") as file:
        empty = images = 0
        for reference in file["labeled"][0]:
            table = file[reference][:].T
            assert table.shape[1] == 10
            for row in table:
                for cell in row:
                    image = file[cell][:].T
                    if image.size == 0 or image.ndim < 3:
                        assert "MATLAB_empty" in file[cell].attrs
                        empty += 1
                    else:
                        assert image.dtype == np.uint8
                        assert image.shape[0] > image.shape[1] > image.shape[2] == 3
                        images += 1
        counts = json.loads((release / MARKER).read_text())["counts"]["cuhk03"]
        assert images == sum(counts[f"labeled/{part}"]["images"] for part in ("train", "query", "gallery"))
        assert empty > 0
        testsets = [file[reference][:].T.tolist() for reference in file["testsets"][0]]
        assert len(testsets) == 20
        for persons in testsets:
            for pair, person in persons:
                assert 1 <= person <= file[file["labeled"][0][int(pair) - 1]].shape[1]


def test_the_classic_protocol_is_evaluated(release: Path) -> None:
    """All twenty splits of an untrained network: the rule changes the CMC of every one and no mAP."""
    splits = evaluation_splits("cuhk03", release, DataOptions(cuhk03_protocol="classic")).splits
    assert len(splits) == 20
    config = preset("standin", method="baseline", threads=1)
    method = methods.build(config.method, config.setup([4, 4]))
    evaluation = Evaluator(splits, config, torch.device("cpu"))(method)
    whole = Evaluator([replace(s, single_gallery_shot=False) for s in splits], config, torch.device("cpu"))(method)
    for ranking, usual in zip(evaluation.rankings, whole.rankings, strict=True):
        assert ranking.mAP == usual.mAP
        assert ranking.cmc != usual.cmc
    assert all(split.query == split.gallery for split in splits)


def test_classic_targets_never_meet_sources_that_hold_them(release: Path) -> None:
    with pytest.raises(UsageError, match=r"cuhk03_protocol: 'classic' tests persons that in-domain .* trains on"):
        build_task("in_domain", "cuhk03", release, DataOptions(cuhk03_protocol="classic"))


def test_what_is_there_already_is_kept(release: Path, standin_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists; name a new folder"):
        write_release(standin_tiny, release)
    with pytest.raises(UsageError, match=r"holds no readable STANDIN\.json"):
        write_release(tmp_path, tmp_path / "raw")
    assert list(tmp_path.iterdir()) == []
