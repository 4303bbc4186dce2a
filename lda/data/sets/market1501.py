"""Market-1501.

Reference: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015.

Counts: 751 ids, 12,936 images (train) + 750 ids, 3,368 images (query) + 15,913 images (gallery), 6 cameras. The gallery
is the 19,732 files of `bounding_box_test` without the 3,819 of id -1.

Layout: `Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}/0001_c1s1_001051_00.jpg`: person, camera,
sequence, frame, box. Person -1 is junk (a box that shows a part of someone) and is dropped, as every evaluation does;
person 0 is background, which stays in the gallery and must not train.
"""

from __future__ import annotations

from lda.data.catalogue import NOT_STATED, Facts
from lda.data.options import DataOptions
from lda.data.records import ReidDataset
from lda.data.survey import Count, Grammar, Layout, Survey

FACTS = Facts(
    title="Market-1501",
    licence=NOT_STATED,
    citation="Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015",
    order=1,
)

CAMERAS = 6
JUNK, BACKGROUND = -1, 0

PUBLISHED = {"train": Count(751, 12936, 6), "query": Count(750, 3368, 6), "gallery": Count(750, 15913, 6)}

_GRAMMAR = Grammar(
    r"(?P<pid>-1|\d{4})_c(?P<camera>\d+)s[1-6]_\d{6}_\d{2}", extension=".jpg", example="0001_c1s1_001051_00.jpg"
)

LAYOUT = Layout(
    name="Market-1501-v15.09.15",
    # The release's own name, then where torchreid and Part-Aware-Transformer put it.
    folders=("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "market1501/Market1501", "market1501",
             "Market-1501"),
    parts=("bounding_box_train", "query", "bounding_box_test"),
    grammar=_GRAMMAR,
    images="bounding_box_train",
)  # fmt: skip


def read(survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`."""
    found = survey.locate(LAYOUT)
    if found is None:
        return None
    train, query, test = (survey.records(found.part(part), _GRAMMAR, CAMERAS) for part in LAYOUT.parts)
    gallery = [record for record in test if record.pid != JUNK]
    background = sum(record.pid == BACKGROUND for record in gallery)
    survey.note(f"gallery: {len(test) - len(gallery)} junk images (id -1) left out, {background} of background (id 0)")
    stray = [record.path.name for record in (*train, *query) if record.pid in (JUNK, BACKGROUND)]
    if stray:
        survey.error(f"{survey.title}: {len(stray)} image(s) of id -1 or 0 in train or query, e.g. {stray[0]}")
    survey.check_count("train", train, PUBLISHED["train"])
    survey.check_count("query", query, PUBLISHED["query"])
    survey.check_count("gallery", gallery, PUBLISHED["gallery"], ignored_pids=(BACKGROUND,))
    survey.check_queries(query, gallery)
    return survey.dataset("v15.09.15", train, query, gallery, distractor_pids=(BACKGROUND,))
