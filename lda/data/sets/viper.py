"""VIPeR.

Reference: Gray et al., "Evaluating Appearance Models for Recognition, Reacquisition, and Tracking", PETS 2007.

Counts: 632 persons (numbers 0 to 873 with gaps), one image in each of two cameras. A split tests 316 of them, camera A
against camera B.

Layouts:
    cam_a, cam_b  `VIPeR/{cam_a,cam_b}/000_45.bmp`: person, viewing angle
    split_1a      `viper/split_1a/{train,query,gallery}/p000_c1_d045.png`: person, camera, angle (MetaBIN, PAT write
                  forty such folders; any one holds every image, and our own splits are used)
Persons are paired by number, not by position (torchreid): one lost file must not shift the others.
"""

from __future__ import annotations

from lda.data.catalogue import NOT_STATED, Facts
from lda.data.options import DataOptions
from lda.data.records import ImageRecord, ReidDataset, Split
from lda.data.splits import RULES, load_draws
from lda.data.survey import Count, Found, Grammar, Layout, Survey, quoted

FACTS = Facts(
    title="VIPeR",
    licence=NOT_STATED,
    citation="Gray et al., Evaluating Appearance Models for Recognition, Reacquisition, and Tracking, PETS 2007",
    order=8,
    single_shot=True,
)

PUBLISHED = Count(632, 632, 1)

_GRAMMAR = Grammar(r"(?P<pid>\d{3})_\d{1,3}", extension=".bmp", example="000_45.bmp")
_SPLIT_GRAMMAR = Grammar(r"p(?P<pid>\d{3})_c(?P<camera>\d)_d\d{3}", extension=".png", example="p000_c1_d045.png")

CAMERAS = Layout("cam_a, cam_b", ("VIPeR", "viper/VIPeR"), ("cam_a", "cam_b"), _GRAMMAR, images="cam_a")
SPLIT = Layout(
    name="split_1a",
    folders=("viper/split_1a", "VIPeR/split_1a"),
    parts=("train", "query", "gallery"),
    grammar=_SPLIT_GRAMMAR,
    images="query",
)


def read(survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`."""
    found = survey.locate(CAMERAS, SPLIT)
    if found is None:
        return None
    records = _camera_folders(survey, found) if found.layout is CAMERAS else _split_folder(survey, found)
    views: list[dict[int, ImageRecord]] = []
    for camid, part in enumerate(CAMERAS.parts):
        own = [record for record in records if record.camid == camid]
        survey.check_count(part, own, PUBLISHED)
        views.append({record.pid: record for record in own})
        if len(views[-1]) < len(own):
            survey.strict(f"{found.folder}: {len(own) - len(views[-1])} person(s) have more than one image in {part}")
    cam_a, cam_b = views
    lost = [f"{pid:03d}" for pid in sorted(cam_a.keys() ^ cam_b.keys())]
    if lost:
        survey.strict(f"{found.folder}: {len(lost)} person(s) lack one of the two cameras: {quoted(lost)}")
    splits = []
    for drawn in load_draws(survey.name):
        tested = drawn.tested(cam_a.keys() & cam_b.keys(), RULES[survey.name].test_persons)
        splits.append(Split(tuple(cam_a[pid] for pid in tested), tuple(cam_b[pid] for pid in tested)))
    return survey.dataset("VIPeR.v1.0", splits=splits)


def _camera_folders(survey: Survey, found: Found) -> list[ImageRecord]:
    records = []
    for camid, part in enumerate(CAMERAS.parts):
        folder = found.part(part)
        matched = survey.images(folder, _GRAMMAR)
        records += [ImageRecord(folder / name, int(match["pid"]), camid) for name, match in matched]
    return records


def _split_folder(survey: Survey, found: Found) -> list[ImageRecord]:
    return [record for part in SPLIT.parts for record in survey.records(found.part(part), _SPLIT_GRAMMAR, cameras=2)]
