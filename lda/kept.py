"""What a trained method leaves in its run folder beside the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Kept:
    """One file of arrays, and how a dashboard may show it.

    Attributes:
        arrays: the content of `<name>.npz`.
        picture: pixels (H, W, 3), None for none.
        caption: of the picture.
        table: (columns, rows), None for none.
    """

    arrays: Mapping[str, NDArray[Any]]
    picture: NDArray[np.uint8] | None = None
    caption: str = ""
    table: tuple[list[str], list[list[Any]]] | None = None
