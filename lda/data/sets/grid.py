"""GRID (QMUL underground re-identification).

Reference: Loy et al., "Time-Delayed Correlation Analysis for Multi-Camera Activity Understanding", IJCV 2010.

Counts: 250 persons with one probe and one gallery image each, 775 further gallery images of nobody in particular
(id 0); camera labels 1 to 6 occur. A split tests 125 persons: 125 probes against 125 + 775 = 900 gallery images. The
ten official partitions come with the data set.

Layout: `underground_reid/{probe,gallery}/0001_1_25004_107_32_106_221.jpeg` (person, camera, frame, box) and
`underground_reid/features_and_partitions.mat`, whose `trainIdxAll` names the persons that train in each partition.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lda.data.catalogue import NOT_STATED, Facts
from lda.data.matlab import load_mat
from lda.data.options import DataOptions
from lda.data.records import ReidDataset, Split
from lda.data.splits import NUM_SPLITS, RULES, load_draws
from lda.data.survey import Count, Grammar, Layout, Survey, child, quoted
from lda.errors import UsageError

FACTS = Facts(
    title="GRID",
    licence=NOT_STATED,
    citation="Loy et al., Time-Delayed Correlation Analysis for Multi-Camera Activity Understanding, IJCV 2010",
    order=7,
    single_shot=True,
)

CAMERAS = 8  # claimed; labels 1 to 6 occur
BACKGROUND = 0
PARTITIONS = "features_and_partitions.mat"

PUBLISHED = {"probe": Count(250, 250), "gallery": Count(250, 1025)}

_GRAMMAR = Grammar(
    r"(?P<pid>\d{4})_(?P<camera>\d)(?:_\d+){5}", extension=".jpeg", example="0001_1_25004_107_32_106_221.jpeg"
)

LAYOUT = Layout(
    name="underground_reid",
    folders=("underground_reid", "grid/underground_reid", "GRID/underground_reid", "GRID"),
    parts=("probe", "gallery"),
    grammar=_GRAMMAR,
    images="probe",
)


def read(survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`."""
    found = survey.locate(LAYOUT)
    if found is None:
        return None
    probe, gallery = (survey.records(found.part(part), _GRAMMAR, CAMERAS) for part in LAYOUT.parts)
    survey.check_count("probe", probe, PUBLISHED["probe"])
    survey.check_count("gallery", gallery, PUBLISHED["gallery"], ignored_pids=(BACKGROUND,))
    paired = {record.pid for record in probe} & {record.pid for record in gallery}
    lost = [f"{pid:04d}" for pid in sorted({record.pid for record in (*probe, *gallery)} - paired - {BACKGROUND})]
    if lost:
        survey.strict(f"{found.folder}: {len(lost)} person(s) lack probe or gallery image: {quoted(lost)}")
    mat = child(found.folder, PARTITIONS)
    if mat is not None:
        tested = [paired - trained for trained in _official_partitions(mat)]
    else:
        survey.strict(
            f"{survey.title}: {found.folder} lacks {PARTITIONS} with the official partitions; the ones shipped with "
            f"lda-reid, used otherwise, do not compare with published results"
        )
        tested = [set(draw.tested(paired, RULES[survey.name].test_persons)) for draw in load_draws(survey.name)]
    splits = [
        Split(
            tuple(record for record in probe if record.pid in persons),
            tuple(record for record in gallery if record.pid in persons or record.pid == BACKGROUND),
        )
        for persons in tested
    ]
    version = "official partitions" if mat is not None else "shipped partitions"
    return survey.dataset(version, splits=splits, distractor_pids=(BACKGROUND,))


def _official_partitions(mat: Path) -> list[set[int]]:
    """The persons that train in each of the ten partitions: third field of each cell of `trainIdxAll`."""
    content = load_mat(mat)
    try:
        cells = np.ravel(content["trainIdxAll"])
        partitions = [{int(number) for number in np.ravel(np.ravel(cell)[0][2])} for cell in cells]
    except (LookupError, ValueError, TypeError) as error:
        raise UsageError(f"{mat}: holds no partitions ({type(error).__name__}: {error}); download it again") from None
    persons = set(range(1, 251))
    if len(partitions) != NUM_SPLITS or any(len(part) != 125 or not part <= persons for part in partitions):
        sizes = sorted({len(part) for part in partitions})
        raise UsageError(
            f"{mat}: expected {NUM_SPLITS} partitions of 125 persons out of 250, got {len(partitions)} of {sizes}"
        )
    return partitions
