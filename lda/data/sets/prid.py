"""PRID2011, single-shot.

Reference: Hirzer et al., "Person Re-identification by Descriptive and Discriminative Classification", SCIA 2011.

Counts: camera A 385 persons, camera B 749 persons, one image each; persons 1 to 200 are the same in both. A split tests
100 of those 200: 100 queries from camera A against 649 images of camera B (their 100 matches and persons 201 to 749,
whom camera A has not seen). Camera A's persons 201 to 385 are others and are not used.

Layout: `prid_2011/single_shot/{cam_a,cam_b}/person_0001.png`.
"""

from __future__ import annotations

from lda.data.catalogue import NOT_STATED, Facts
from lda.data.options import DataOptions
from lda.data.records import ImageRecord, ReidDataset, Split
from lda.data.splits import RULES, load_draws
from lda.data.survey import Count, Grammar, Layout, Survey, quoted

FACTS = Facts(
    title="PRID2011",
    licence=NOT_STATED,
    citation="Hirzer et al., Person Re-identification by Descriptive and Discriminative Classification, SCIA 2011",
    order=6,
    single_shot=True,
)

SHARED = 200  # persons 1 to 200 are seen by both cameras

PUBLISHED = {"cam_a": Count(385, 385, 1), "cam_b": Count(749, 749, 1)}

_GRAMMAR = Grammar(r"person_(?P<pid>\d{4})", extension=".png", example="person_0001.png")

LAYOUT = Layout(
    name="single_shot",
    folders=("prid_2011/single_shot", "prid2011/prid_2011/single_shot", "prid2011/single_shot"),
    parts=("cam_a", "cam_b"),
    grammar=_GRAMMAR,
    images="cam_a",
)


def read(survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`."""
    found = survey.locate(LAYOUT)
    if found is None:
        return None
    cameras: list[dict[int, ImageRecord]] = []
    for camid, part in enumerate(LAYOUT.parts):
        folder = found.part(part)
        matched = survey.images(folder, _GRAMMAR)
        records = [ImageRecord(folder / name, int(match["pid"]), camid) for name, match in matched]
        survey.check_count(part, records, PUBLISHED[part])
        cameras.append({record.pid: record for record in records})
    cam_a, cam_b = cameras
    lost = [f"person_{pid:04d}" for pid in range(1, SHARED + 1) if (pid in cam_a) != (pid in cam_b)]
    if lost:
        survey.strict(f"{found.folder}: {len(lost)} of persons 1 to {SHARED} lack a camera: {quoted(lost)}")
    paired = {pid for pid in range(1, SHARED + 1) if pid in cam_a and pid in cam_b}
    others = [record for pid, record in sorted(cam_b.items()) if pid > SHARED]
    splits = []
    for drawn in load_draws(survey.name):
        tested = drawn.tested(paired, RULES[survey.name].test_persons)
        gallery = [*(cam_b[pid] for pid in tested), *others]
        splits.append(Split(tuple(cam_a[pid] for pid in tested), tuple(gallery)))
    return survey.dataset("single_shot", splits=splits)
