"""The numbers printed on the LDA poster, to be shown beside a study's and never among them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

PUBLISHED = Path(__file__).parent / "published.csv"


def published_table(protocol: str) -> pd.DataFrame:
    """The poster's rows of one protocol, as printed: see the columns of published.csv."""
    published = pd.read_csv(PUBLISHED, keep_default_na=False, na_values={"mAP": "", "rank1": ""})
    return published[published["protocol"] == protocol].reset_index(drop=True)
