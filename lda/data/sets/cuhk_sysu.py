"""CUHK-SYSU person crops, always trained on as a whole, never a target.

Reference: Xiao et al., "Joint Detection and Identification Feature Learning for Person Search", CVPR 2017.

Counts: 11,934 ids, 34,574 images.

Layouts of the crops that circulate:
    a  `cuhk_sysu/cropped_images/p11422_s16929_1.jpg` (torchreid, fast-reid, ACL, META): person, scene, number
    b  `CUHK-SYSU/cropped_image/p00001_n01_s00001_hard0.png` (MetaBIN): person, appearance, scene, hard
    c  `CUHK-SYSU/bounding_box_train/1_c0_1.jpg` (BAU): person, 0 or 1
    d  the person-search release itself, `annotation/Person.mat` and `Image/SSM/s1.jpg`, which `python -m
       lda.data.person_search` cuts into layout b
The images of one person come from a few scenes, so there are no cameras in any useful sense: every image gets camera 0,
as in the tools that read layout a (MetaBIN takes the scene number instead).
"""

from __future__ import annotations

from lda.data.catalogue import NOT_STATED, Facts
from lda.data.options import DataOptions
from lda.data.records import ImageRecord, ReidDataset
from lda.data.survey import Count, Grammar, Layout, Survey

FACTS = Facts(
    title="CUHK-SYSU",
    licence=NOT_STATED,
    citation="Xiao et al., Joint Detection and Identification Feature Learning for Person Search, CVPR 2017",
    order=3,
    cameras=False,
    tested=False,
)

PUBLISHED = Count(11934, 34574, 1)

LAYOUTS = (
    Layout(
        name="cropped_images",
        folders=("cuhk_sysu/cropped_images", "cuhksysu/cropped_images", "CUHK-SYSU/cropped_images"),
        grammar=Grammar(r"p(?P<pid>\d+)_s\d+_\d+", extension=".jpg", example="p11422_s16929_1.jpg"),
    ),
    Layout(
        name="cropped_image",
        folders=("CUHK-SYSU/cropped_image", "cuhk_sysu/cropped_image", "cuhksysu/cropped_image"),
        grammar=Grammar(
            r"p(?P<pid>\d{5})_n\d{2}_s\d{5}_hard[01]", extension=".png", example="p00001_n01_s00001_hard0.png"
        ),
    ),
    Layout(
        name="bounding_box_train",
        folders=("CUHK-SYSU/bounding_box_train", "cuhk_sysu/bounding_box_train", "cuhksysu/bounding_box_train"),
        grammar=Grammar(r"(?P<pid>\d+)_c[01]\w*", extension=".jpg", example="1_c0_1.jpg"),
    ),
)

RELEASE = Layout(
    name="person-search release",
    folders=("CUHK-SYSU", "cuhk_sysu", "cuhksysu", "CUHK-SYSU/dataset"),
    parts=("annotation/Person.mat", "Image/SSM"),
)


def read(survey: Survey, options: DataOptions) -> ReidDataset | None:
    """Read the data set below `survey.root`; None if it is not there. Everything wrong is in `survey.findings`."""
    found = survey.locate(*LAYOUTS, RELEASE)
    if found is not None and found.layout is RELEASE:
        survey.error(
            f"{survey.title}: {found.folder} is the person-search release; crop the persons with "
            f"python -m lda.data.person_search --input {found.folder} --output {survey.root}"
        )
    if found is None or found.layout.grammar is None:
        return None
    matched = survey.images(found.folder, found.layout.grammar)
    train = [ImageRecord(found.folder / name, int(match["pid"]), 0) for name, match in matched]
    survey.check_count("train", train, PUBLISHED)
    return survey.dataset(found.layout.name, train)
