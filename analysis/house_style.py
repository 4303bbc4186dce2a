"""What all figures of this folder share: size, type, colours, and how they are saved.

Figures are made without pyplot, so that no window system, global state or backend setting is involved.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import seaborn as sns
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lda.files import atomic
from lda.protocols import DATASETS

RESOLUTION = 300  # dots per inch of a saved PNG

# Type as text (not outlines) in a PDF, so that a paper's reader can search and select it.
_STYLE: dict[str, Any] = {"pdf.fonttype": 42, "axes.titlesize": "medium", "figure.titlesize": "medium"}

# Ten colours that stay apart for colour-blind readers, and as many markers; a data set has its own, the same in every
# figure. An eleventh begins again from the first.
_COLOURS: list[tuple[float, float, float]] = list(sns.color_palette("colorblind", 10))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_PLACES = {name: place for place, name in enumerate(DATASETS)}


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, NDArray[Any]]:
    """A figure of `width` x `height` inches and its axes (rows, columns), in the house's style."""
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes: NDArray[Any] = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def style() -> Any:
    """Context of the house's style: everything that makes text or axes belongs inside."""
    settings: dict[Any, Any] = {**sns.axes_style("whitegrid"), **sns.plotting_context("paper"), **_STYLE}
    return rc_context(settings)


def colour(domain: str, position: int) -> tuple[float, float, float]:
    """A domain's colour; one that is no data set of ours takes that of its position."""
    return _COLOURS[_PLACES.get(domain, position) % len(_COLOURS)]


def marker(domain: str, position: int) -> str:
    """A domain's marker, for readers without colour."""
    return _MARKERS[_PLACES.get(domain, position) % len(_MARKERS)]


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG or PDF atomically; the same figure gives the same bytes."""
    with atomic(path, "wb") as file:
        file.write(_rendered(figure, path.suffix.removeprefix(".")))
    return path


def as_png(figure: Figure, resolution: int = 150) -> bytes:
    """The figure as a PNG in memory."""
    return _rendered(figure, "png", resolution)


def _rendered(figure: Figure, format: str, resolution: int = RESOLUTION) -> bytes:
    undated = {"CreationDate": None} if format == "pdf" else {"Software": None}
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=format, dpi=resolution, metadata=undated)
    return buffer.getvalue()
