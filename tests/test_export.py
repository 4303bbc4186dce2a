"""`python -m lda.export`: the ONNX file gives PyTorch's features, or does not appear."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import checkpoint
from torch import Tensor

from lda import export, methods
from lda.data.transforms import MEAN, STD, normalise
from lda.embedding import Embedder
from lda.errors import FailedError, UsageError
from lda.files import sha256_of
from lda.methods.baseline import Baseline

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `test` has it")
pytest.importorskip("onnxscript", reason="the extra `export` has it")

REFUSED = {"qaconv": "compares images pair by pair"}
"""Methods that cannot be exported, and why."""

TOLD = {"mda": {"mda_inference": "source"}}
"""Settings under which a method does not look at the target."""


def images(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 32, 16), dtype=np.uint8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("baseline"), "baseline")


@pytest.fixture(scope="module")
def content(model: Path) -> bytes:
    return export.onnx_bytes(Embedder(model, {"device": "cpu", "threads": 1, "flip_test": True}))


def test_agrees_with_pytorch_at_any_batch(model: Path, content: bytes) -> None:
    embedder = Embedder(model, {"device": "cpu", "threads": 1, "flip_test": True})
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, 32, 16])
    assert (found.name, found.shape[1]) == ("features", embedder.features(images(1).numpy()).shape[1])
    for count in (1, 3, 16):
        (features,) = session.run(None, {"images": normalise(images(count)).numpy()})
        expected = embedder.features(images(count).numpy())
        np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    plain = Embedder(model, {"device": "cpu", "threads": 1})
    assert export.largest_difference(content, embedder, images(8)) < 1e-5
    assert export.largest_difference(content, plain, images(8)) > 0.1  # the check can fail


def test_the_file_says_what_it_is(model: Path, content: bytes) -> None:
    told = onnxruntime.InferenceSession(content).get_modelmeta().custom_metadata_map
    assert (json.loads(told["mean"]), json.loads(told["std"])) == (list(MEAN), list(STD))
    assert json.loads(told["image_size"]) == [32, 16]
    assert (told["training"], told["checkpoint_sha256"]) == ("training-baseline", sha256_of(model))
    assert (told["method"], told["title"], told["flip_test"]) == ("baseline", "plain BN", "true")
    assert "divided by 255, minus mean, divided by std" in told["input"]


def test_a_file_that_differs_is_not_written(
    model: Path, content: bytes, standin_tiny: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One export serves the whole test: here it is the network with flip test, whatever was asked for."""
    monkeypatch.setattr("lda.data.standin.tree.ensure_standin", lambda: standin_tiny)
    monkeypatch.setattr(export, "onnx_bytes", lambda embedder: content)
    arguments = ["--checkpoint", str(model), "--output", str(tmp_path / "m.onnx"), "--set", "threads=1"]
    assert export.main(arguments) == 1
    error = capsys.readouterr().err
    assert "more than 0.0001; nothing is written" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "m.onnx").exists()
    assert export.main([*arguments, "flip_test=true"]) == 0
    shown = capsys.readouterr().out
    assert "largest difference to PyTorch on 8 images of the stand-in" in shown
    assert "plain BN, flip test (training training-baseline)" in shown
    assert (tmp_path / "m.onnx").read_bytes() == content

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    assert export.main(arguments) == 0
    assert "not compared with PyTorch: onnxruntime is not installed" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    assert export.main(arguments) == 2
    assert "onnxscript: not installed; run: pip install onnx onnxscript" in capsys.readouterr().err


class Counting(Baseline):
    """Asks for the number of images in a way that makes a constant of it."""

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images).view(len(images), -1)


@pytest.mark.slow
def test_what_cannot_be_exported_is_one_line(model: Path) -> None:
    embedder = Embedder(model, {"device": "cpu", "threads": 1})
    embedder.method.__class__ = Counting
    with pytest.raises(
        FailedError, match="plain BN cannot be exported: its encode makes a constant of the batch's size"
    ):
        export.onnx_bytes(embedder)
    with pytest.raises(FailedError, match="plain BN: onnxruntime cannot run it: "):
        export.largest_difference(b"no model", embedder, images(8))


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.names())
def test_every_method_agrees_or_is_refused(method: str, tmp_path: Path) -> None:
    """Trained longer than any warm-up."""
    model = checkpoint(tmp_path, method, 48)
    told = {"device": "cpu", "threads": 1, **TOLD.get(method, {})}
    if why := REFUSED.get(method):
        with pytest.raises((UsageError, FailedError), match=why) as caught:
            export.onnx_bytes(Embedder(model, told))
        assert "\n" not in str(caught.value)
        return
    embedder = Embedder(model, told)
    content = export.onnx_bytes(embedder)
    difference = export.largest_difference(content, embedder, images(8))
    print(f"{method:10} {difference:.1e} {len(content) / 2**20:.1f} MiB")
    assert difference < export.LARGEST_DIFFERENCE
