"""CUHK02, always trained on as a whole.

Reference: Li and Wang, "Locally Aligned Feature Transforms across Views", CVPR 2013.

Counts: five camera pairs P1..P5 of 971, 306, 107, 193 and 239 persons = 1,816 ids, 7,264 images (two per person and
view), 10 cameras.

Layout: `Dataset/P1..P5/{cam1,cam2}/001_0001.png`: person and image. A person number is unique inside its pair only, so
pid = pair * 10,000 + number, and the cameras of the five pairs are counted through, 0 to 9 (torchreid, META).
"""

from __future__ import annotations

from lda.data.catalogue import NOT_STATED, Facts
from lda.data.options import DataOptions
from lda.data.records import ImageRecord, ReidDataset
from lda.data.survey import Count, Grammar, Layout, Survey, child

FACTS = Facts(
    title="CUHK02",
    licence=NOT_STATED,
    citation="Li and Wang, Locally Aligned Feature Transforms across Views, CVPR 2013",
    order=4,
    tested=False,
)

PAIRS = (1, 2, 3, 4, 5)
VIEWS = (1, 2)

PUBLISHED = Count(1816, 7264, 10)

_GRAMMAR = Grammar(r"(?P<pid>\d{1,4})_\d+", extension=".png", example="001_0001.png")

LAYOUT = Layout(
    name="CUHK02",
    # torchreid and BAU keep the archive's `Dataset` folder, MetaBIN, META and Part-Aware-Transformer drop it.
    folders=("cuhk02/Dataset", "cuhk02"),
    parts=tuple(f"P{pair}" for pair in PAIRS),
    grammar=_GRAMMAR,
    images="P1/cam1",
)


def read(survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`."""
    found = survey.locate(LAYOUT)
    if found is None:
        return None
    places = {(pair, view): f"P{pair}/cam{view}" for pair in PAIRS for view in VIEWS}
    missing = [place for place in places.values() if child(found.folder, place) is None]
    if missing:
        survey.error(f"{survey.title} is incomplete: {found.folder} lacks {', '.join(missing)}; expected {LAYOUT}")
        return None
    train = []
    for (pair, view), place in places.items():
        folder = found.part(place)
        camid = (pair - 1) * len(VIEWS) + view - 1
        matched = survey.images(folder, _GRAMMAR)
        train += [ImageRecord(folder / name, pair * 10_000 + int(match["pid"]), camid) for name, match in matched]
    survey.check_count("train", train, PUBLISHED)
    return survey.dataset("P1-P5", train)
