"""Published numbers, to be shown beside a study's and never among them: those of the LDA poster, and newer ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

PUBLISHED = Path(__file__).parent / "published.csv"

POSTER = "LDA poster"
"""The source of the poster's rows; the others name the repository whose tables print them."""


def published_table(protocol: str) -> pd.DataFrame:
    """The poster's rows of one protocol, as printed: see the columns of published.csv."""
    rows = _rows(protocol)
    return rows[rows["source"] == POSTER].reset_index(drop=True)


def newer_table(protocol: str) -> pd.DataFrame:
    """Rows of one protocol that appeared after the poster, each with where it was read; some know averages only."""
    rows = _rows(protocol)
    return rows[rows["source"] != POSTER].reset_index(drop=True)


def _rows(protocol: str) -> pd.DataFrame:
    published = pd.read_csv(PUBLISHED, keep_default_na=False, na_values={"mAP": "", "rank1": ""})
    return published[published["protocol"] == protocol]
