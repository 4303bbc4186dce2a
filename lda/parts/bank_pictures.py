"""A Buffer Bank as a picture and as a table for the dashboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lda.kept import Kept
from lda.parts.bank import BufferBank, bank_arrays

_CELL = (6, 4)  # pixels of one (domain, channel) cell: height, width
_WIDTH = 1024
# Dark blue over teal to yellow: perceived lightness rises evenly, also for colour-blind readers.
_COLOURS = np.array([[32, 18, 77], [40, 92, 140], [33, 150, 136], [125, 204, 92], [253, 231, 37]], dtype=float)


def draw_banks(banks: Mapping[str, BufferBank]) -> NDArray[np.uint8]:
    """All banks as one picture (H, W, 3): per layer a band of K rows for the mean and K for the standard deviation.

    Columns are channels, the first as many as fit; colour is the value relative to its band, dark to bright.
    """
    bands = []
    for bank in banks.values():
        for values in (bank.mean.cpu().numpy(), np.sqrt(bank.var.cpu().numpy())):
            cells = values[:, : _WIDTH // _CELL[1]]
            low, high = cells.min(), cells.max()
            coloured = _coloured((cells - low) / max(high - low, 1e-12))
            pixels = coloured.repeat(_CELL[0], axis=0).repeat(_CELL[1], axis=1)
            pixels = np.pad(pixels, ((0, 3), (0, _WIDTH - pixels.shape[1]), (0, 0)), constant_values=255)
            bands.append(pixels)
    return np.concatenate(bands)


def _coloured(share: NDArray[Any]) -> NDArray[np.uint8]:
    anchors = np.linspace(0.0, 1.0, len(_COLOURS))
    channels = [np.interp(share, anchors, _COLOURS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def tabulate_banks(domains: Sequence[str], banks: Mapping[str, BufferBank]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table: per layer and domain the channels' average mean and standard deviation."""
    rows = [
        [layer, domain, bank.counts[k], float(bank.mean[k].mean()), float(bank.var[k].sqrt().mean())]
        for layer, bank in banks.items()
        for k, domain in enumerate(domains)
    ]
    return ["layer", "domain", "updates", "mean of means", "mean of standard deviations"], rows


def kept_banks(domains: list[str], banks: Mapping[str, BufferBank]) -> dict[str, Kept]:
    """What a method with Buffer Banks leaves in its run folder: buffer_bank.npz, with picture and table."""
    caption = f"rows per layer: {', '.join(domains)}"
    kept = Kept(bank_arrays(domains, banks), draw_banks(banks), caption, tabulate_banks(domains, banks))
    return {"buffer_bank": kept}
