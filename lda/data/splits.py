"""The test splits of the single-shot targets: drawn once, shipped as JSON, the same on every machine.

A split file holds, for each of ten splits, an order of all person numbers the data set can have: the first n persons in
that order who are present (and fit to be tested) are the test persons. So a lost file shifts nobody else. For i-LIDS,
which shows a person two to eight times, it holds two draws below 840 per person as well: position `query % n` among the
person's n sorted images asks, position `gallery % (n - 1)` among the others answers (840 is divisible by 1 to 8, so all
are equally likely).

`lda/data/draw_splits.py` states how they were drawn.

GRID's official partitions come with the data set; its file here is only the fallback where they are missing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lda.errors import UsageError

FOLDER = Path(__file__).parent / "split_files"
FORMAT = 1
NUM_SPLITS = 10
DRAWS = 840


@dataclass(frozen=True)
class Rule:
    """Which persons a data set can have (first to last number) and how many of them are tested."""

    first: int
    last: int
    test_persons: int
    draws_images: bool = False


RULES = {
    "prid": Rule(1, 200, 100),  # the persons seen by both cameras
    "viper": Rule(0, 873, 316),  # 632 of these numbers exist
    "ilids": Rule(1, 200, 60, draws_images=True),  # 119 of these numbers exist
    "grid": Rule(1, 250, 125),
}


@dataclass(frozen=True)
class Draw:
    """One split of a file.

    Attributes:
        order: every person number, in the order in which they become test persons.
        query, gallery: draws below 840, beside `order`; empty where a person has one image per camera.
    """

    order: tuple[int, ...]
    query: tuple[int, ...] = ()
    gallery: tuple[int, ...] = ()

    def tested(self, present: set[int], count: int) -> list[int]:
        """The numbers of the `count` test persons among those present, sorted."""
        return sorted([person for person in self.order if person in present][:count])

    def pair(self, person: int, images: int) -> tuple[int, int]:
        """Positions of the query and the gallery image among a person's sorted images (two or more)."""
        place = self.order.index(person)
        asks = self.query[place] % images
        answers = [position for position in range(images) if position != asks]
        return asks, answers[self.gallery[place] % len(answers)]


def load_draws(name: str) -> tuple[Draw, ...]:
    """The ten shipped splits of a data set. Raises UsageError if the file was changed."""
    path = FOLDER / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = content.pop("sha256")
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise UsageError(f"{path}: not a split file ({error}); install lda-reid again") from None
    if content.get("format") != FORMAT or stated != digest(content):
        raise UsageError(f"{path}: changed since it was shipped (its SHA-256 differs); install lda-reid again")
    return tuple(Draw(**{key: tuple(values) for key, values in split.items()}) for split in content["splits"])


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of a split file's content without its own `sha256`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
