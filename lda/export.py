"""`python -m lda.export`: a trained checkpoint as an ONNX file, checked against PyTorch before it appears.

The file maps `images`, normalised float32 (batch, 3, height, width), to `features` (batch, D), which compare by cosine.
Its metadata say how images are normalised, and which training and settings they are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lda import methods
from lda.arguments import Parser, existing_file, output_file
from lda.command import exit_code, openmp_threads
from lda.config import parse_overrides
from lda.data.cache import check_cache
from lda.errors import FailedError, UsageError
from lda.files import atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lda.embedding import Embedder

# What imports torch is imported where it is needed: mistakes answer at once.

LARGEST_DIFFERENCE = 1e-4
"""Between the features of onnxruntime and of PyTorch, over the largest feature."""

_NEEDED = ("onnx", "onnxscript")
_BATCHES = (1, 7)  # sizes that the check runs


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m lda.export",
        description="Export what a checkpoint does with an image to ONNX, and compare it with PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=existing_file, required=True, help="checkpoint.pt of a run folder")
    parser.add_argument("--output", type=output_file, required=True, help="the .onnx file")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="settings of the test that change features, for example flip_test=true",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    methods.names()  # all folders of methods are there
    openmp_threads()
    check_cache()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lda.export`: 0 done, 1 failed or unlike PyTorch, 2 bad usage, 130 interrupted."""
    return exit_code(lambda: _export(parse_arguments(arguments)))


def _export(options: argparse.Namespace) -> None:
    changes = {"device": "cpu", **parse_overrides(options.set)}
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{', '.join(missing)}: not installed; run: pip install {' '.join(_NEEDED)}")
    from lda.embedding import Embedder

    embedder = Embedder(options.checkpoint, changes)
    content = onnx_bytes(embedder)
    told = "not compared with PyTorch: onnxruntime is not installed"
    if importlib.util.find_spec("onnxruntime") is not None:
        images = standin_images(embedder)
        difference = largest_difference(content, embedder, images)
        told = f"largest difference to PyTorch on {len(images)} images of the stand-in {difference:.1e}, relative"
        if not difference <= LARGEST_DIFFERENCE:
            raise FailedError(f"{embedder.method.title}: {told}, more than {LARGEST_DIFFERENCE:g}; nothing is written")
    with atomic(options.output, "wb") as file:
        file.write(content)
    print(f"{options.output}: {embedder.name}, {len(content) / 2**20:.1f} MiB; {told}")


def onnx_bytes(embedder: Embedder) -> bytes:
    """The content of the ONNX file. Raises FailedError where the method does what cannot be exported."""
    import torch

    height, width = embedder.image_size
    example = torch.zeros(2, 3, height, width, device=embedder.device)
    try:
        with _quiet():
            program = torch.onnx.export(
                _inference(embedder),
                (example,),
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise FailedError(f"{embedder.method.title} cannot be exported: {reason}") from error
    assert program is not None, "dynamo=True gives one"
    (given,) = program.model.graph.inputs
    if given.shape is None or isinstance(given.shape[0], int):  # a len(x) on the way is enough: x.shape[0] is not
        raise FailedError(
            f"{embedder.method.title} cannot be exported: its encode makes a constant of the batch's size"
        )
    program.model.metadata_props.update(metadata(embedder))
    content: bytes = program.model_proto.SerializeToString()
    return content


def _inference(embedder: Embedder) -> nn.Module:
    """What a test does with normalised images, as a module."""
    from torch import nn

    from lda.testing import encoded

    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.method = embedder.method

        def forward(self, images: Tensor) -> Tensor:
            return encoded(embedder.method, images, embedder.config.test)

    return Inference().eval()


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter tells of its own inner workings only: of warnings to its developers, by print and by log."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def metadata(embedder: Embedder) -> dict[str, str]:
    """What the file says of itself, as text; lists and settings in JSON."""
    from lda.data.transforms import MEAN, STD

    model = {key: value if isinstance(value, str) else json.dumps(value) for key, value in vars(embedder.model).items()}
    return {
        **model,
        "title": embedder.method.label,
        "reference": embedder.method.reference,
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "input": "images: RGB, resized with antialiased bicubic interpolation to image_size (height, width), divided "
        "by 255, minus mean, divided by std; (batch, 3, height, width) float32",
        "output": "features: (batch, D) float32, to be compared by cosine",
    }


def standin_images(embedder: Embedder) -> Tensor:
    """Images of the stand-in, uint8 (B, 3, height, width): queries of the checkpoint's target."""
    import numpy as np
    import torch

    from lda.data.decode import decode
    from lda.data.sources import evaluation_splits
    from lda.data.standin.tree import ensure_standin

    target = evaluation_splits(embedder.config.run.target, ensure_standin(), embedder.config.data)
    records = target.splits[0].query[: sum(_BATCHES)]
    return torch.from_numpy(np.stack([decode(record.path, *embedder.image_size) for record in records]))


def largest_difference(content: bytes, embedder: Embedder, images: Tensor) -> float:
    """Between the features that onnxruntime and PyTorch find of uint8 images (8, 3, height, width), in batches of
    several sizes, over the largest feature. Raises FailedError where onnxruntime cannot run the file."""
    import numpy as np
    import onnxruntime
    import torch

    from lda.data.transforms import normalise

    parts = torch.split(images, list(_BATCHES))
    expected = np.concatenate([embedder.features(part.numpy()) for part in parts])
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        found = [session.run(["features"], {"images": normalise(part).numpy()})[0] for part in parts]
    except Exception as error:  # of a dozen types that have no other in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FailedError(f"{embedder.method.title}: onnxruntime cannot run it: {reason}") from error
    return float(np.abs(np.concatenate(found) - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    raise SystemExit(main())
