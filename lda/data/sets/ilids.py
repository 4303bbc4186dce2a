"""i-LIDS (QMUL underground "Persons"), not the video set iLIDS-VID.

Reference: Zheng et al., "Associating Groups of People", BMVC 2009.

Counts: 119 persons, 476 images, two to eight of a person. A split tests 60 persons: one image of each asks, another one
answers.

Layout: `i-LIDS_Pedestrian/Persons/0001001.jpg`: four digits person, three digits number within the person. Cameras were
not published; every tool takes the number within the person, so that query and gallery always differ. With a constant
camera the same-camera rule would invalidate every query.
"""

from __future__ import annotations

from lda.data.catalogue import NOT_STATED, Facts
from lda.data.options import DataOptions
from lda.data.records import ImageRecord, ReidDataset, Split
from lda.data.splits import RULES, load_draws
from lda.data.survey import Count, Grammar, Layout, Survey, quoted

FACTS = Facts(
    title="i-LIDS",
    licence=NOT_STATED,
    citation="Zheng et al., Associating Groups of People, BMVC 2009",
    order=9,
    single_shot=True,
)

PUBLISHED = Count(119, 476)

_GRAMMAR = Grammar(r"(?P<pid>\d{4})(?P<number>\d{3})", extension=".jpg", example="0001001.jpg")

LAYOUT = Layout(
    name="Persons",
    folders=("i-LIDS_Pedestrian/Persons", "ilids/i-LIDS_Pedestrian/Persons", "QMUL-iLIDS/i-LIDS_Pedestrian/Persons",
             "QMUL-iLIDS/images"),
    grammar=_GRAMMAR,
)  # fmt: skip


def read(survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`."""
    found = survey.locate(LAYOUT)
    if found is None:
        return None
    persons: dict[int, list[ImageRecord]] = {}
    for name, match in survey.images(found.folder, _GRAMMAR):
        pid = int(match["pid"])
        persons.setdefault(pid, []).append(ImageRecord(found.folder / name, pid, int(match["number"]) - 1))
    survey.check_count("persons", [record for images in persons.values() for record in images], PUBLISHED)
    rule = RULES[survey.name]
    beyond = [f"{pid:04d}" for pid in persons if not rule.first <= pid <= rule.last]
    if beyond:
        survey.strict(
            f"{found.folder}: {len(beyond)} person number(s) beyond {rule.last} are in no split: {quoted(beyond)}"
        )
    alone = [f"{pid:04d}" for pid, images in persons.items() if len(images) < 2]
    if alone:
        survey.strict(f"{found.folder}: {len(alone)} person(s) with a single image are left out: {quoted(alone)}")
    able = {pid for pid, images in persons.items() if len(images) >= 2}
    splits = []
    for drawn in load_draws(survey.name):
        pairs = [(persons[pid], drawn.pair(pid, len(persons[pid]))) for pid in drawn.tested(able, rule.test_persons)]
        query = tuple(images[asks] for images, (asks, _) in pairs)
        splits.append(Split(query, tuple(images[answers] for images, (_, answers) in pairs)))
    return survey.dataset("i-LIDS_Pedestrian", splits=splits)
