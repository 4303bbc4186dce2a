"""Drawing one person: the geometry, and that every attribute that identifies a person shows."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from lda.data.standin.pedestrians import Crop, Garment, Person, Pose, blend, draw_person, shade

BACKGROUND = (250, 0, 250)
CROP = Crop(128, 256, -0.26, -0.03, 0.26, 1.03, 0.0, 0.5)
FRONT = Pose(yaw=0.0, phase=1.0, stride=0.08, arm_swing=0.06, bent=0, lean=0.0)
BACK, SIDE = dataclasses.replace(FRONT, yaw=math.pi), dataclasses.replace(FRONT, yaw=math.pi / 2)
PERSON = Person(
    skin=(220, 180, 150),
    hair=(40, 30, 30),
    hair_style="short",
    hat=(200, 20, 20),
    shoulder=0.125,
    hip=0.095,
    head=1.0,
    waist=0.4,
    upper=Garment("tee", (40, 90, 170), (230, 200, 60), "plain", 0.05, 0.48, 1.0),
    lower=Garment("trousers", (60, 60, 66), (200, 40, 40), "plain", 0.05, 0.95, 1.0),
    shoes=(230, 230, 230),
    boots=False,
    bag="none",
    bag_colour=(30, 150, 60),
    bag_side=1,
    bag_size=1.0,
    scarf=None,
    glasses=False,
)


def drawn(person: Person = PERSON, pose: Pose = FRONT, crop: Crop = CROP) -> np.ndarray:
    image = Image.new("RGB", (crop.width, crop.height), BACKGROUND)
    draw_person(image, person, pose, crop)
    return np.asarray(image).astype(int)


def figure(pixels: np.ndarray) -> np.ndarray:
    return (pixels != BACKGROUND).any(axis=2)


def upper(**changes: object) -> Person:
    return dataclasses.replace(PERSON, upper=dataclasses.replace(PERSON.upper, **changes))


def lower(**changes: object) -> Person:
    return dataclasses.replace(PERSON, lower=dataclasses.replace(PERSON.lower, **changes))


@pytest.mark.parametrize("pose", [FRONT, BACK, SIDE], ids=["front", "back", "side"])
def test_the_body_fills_its_height_and_stays_within_it(pose: Pose) -> None:
    rows = np.flatnonzero(figure(drawn(pose=pose)).any(axis=1))
    top, bottom = CROP.pixels([(0.0, 0.0), (0.0, 1.0)])
    assert abs(rows[0] - top[1]) < 6
    assert abs(rows[-1] - bottom[1]) < 8


def test_a_person_is_wider_from_the_front_than_from_the_side() -> None:
    still = dataclasses.replace(FRONT, stride=0.0, arm_swing=0.0)
    chest = slice(int(0.25 * CROP.height), int(0.45 * CROP.height))
    front = figure(drawn(pose=still))[chest].sum()
    side = figure(drawn(pose=dataclasses.replace(still, yaw=math.pi / 2)))[chest].sum()
    assert front > 1.25 * side


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(PERSON, skin=(140, 100, 80)),
        dataclasses.replace(PERSON, hair=(190, 160, 100)),
        dataclasses.replace(PERSON, hair_style="long"),
        dataclasses.replace(PERSON, hair_style="cap"),
        dataclasses.replace(PERSON, hair_style="hood"),
        dataclasses.replace(PERSON, shoulder=0.14),
        dataclasses.replace(PERSON, hip=0.08),
        dataclasses.replace(PERSON, head=1.1),
        dataclasses.replace(PERSON, shoes=(30, 30, 30)),
        dataclasses.replace(PERSON, boots=True),
        dataclasses.replace(PERSON, bag="backpack"),
        dataclasses.replace(PERSON, bag="shoulder"),
        dataclasses.replace(PERSON, bag="handbag"),
        dataclasses.replace(PERSON, bag="case"),
        dataclasses.replace(PERSON, scarf=(200, 40, 40)),
        dataclasses.replace(PERSON, glasses=True),
        upper(colour=(170, 40, 40)),
        upper(kind="vest"),
        upper(kind="shirt"),
        upper(kind="coat", hem=0.68),
        upper(kind="jacket", open=True),
        *(upper(pattern=pattern) for pattern in ("stripes", "pinstripes", "checks", "block", "logo")),
        lower(kind="shorts", hem=0.66),
        lower(kind="skirt", hem=0.75),
        lower(pattern="side"),
    ],
)
def test_every_attribute_shows(changed: Person) -> None:
    assert (drawn() != drawn(changed)).any(axis=2).sum() >= 8


def test_what_is_worn_in_front_or_on_the_back_shows_there_only() -> None:
    logo, jacket = upper(pattern="logo"), upper(kind="jacket", open=True)
    closed = upper(kind="jacket", open=False)
    assert np.array_equal(drawn(pose=BACK), drawn(logo, BACK))
    assert np.array_equal(drawn(closed, BACK), drawn(jacket, BACK))
    assert (drawn(closed) != drawn(jacket)).any()
    pack = dataclasses.replace(PERSON, bag="backpack")
    seen = {name: (drawn(pack, pose) != drawn(pose=pose)).any(axis=2).sum() for name, pose in
            {"front": FRONT, "back": BACK, "side": SIDE}.items()}  # fmt: skip
    assert seen["back"] > 2 * seen["front"] > 0
    assert seen["side"] > seen["front"] / 2


def test_walking_left_mirrors_walking_right() -> None:
    pose = dataclasses.replace(SIDE, stride=0.1)
    right = figure(drawn(pose=pose, crop=dataclasses.replace(CROP, light=0.0)))
    left = figure(drawn(pose=dataclasses.replace(pose, yaw=-math.pi / 2), crop=dataclasses.replace(CROP, light=0.0)))
    assert (right != left[:, ::-1]).mean() < 0.04
    assert (right != left).mean() > 0.08


def test_a_high_camera_enlarges_the_upper_body() -> None:
    flat, high = CROP, dataclasses.replace(CROP, pitch=0.6)
    waist = [(0.0, 0.45)]
    assert high.pixels(waist)[0][1] > flat.pixels(waist)[0][1] + 10
    ends = [(0.0, 0.0), (0.0, 1.0)]
    assert np.allclose(high.pixels(ends), flat.pixels(ends))
    shoulders = [(-0.1, 0.2), (0.1, 0.2)]
    wide = [crop.pixels(shoulders)[1][0] - crop.pixels(shoulders)[0][0] for crop in (flat, high)]
    assert wide[1] > wide[0]


def test_crop_maps_edges_to_the_image() -> None:
    assert np.allclose(CROP.pixels([(-0.26, -0.03), (0.26, 1.03)]), [(0, 0), (128, 256)])
    assert CROP.pixels([(0.0, 0.0)], lean=0.1) == CROP.pixels([(0.1, 0.0)])


def test_a_crop_may_cut_the_figure() -> None:
    close = dataclasses.replace(CROP, left=-0.05, right=0.05, top=0.3, bottom=0.5)
    assert figure(drawn(crop=close)).mean() > 0.95


def test_colours() -> None:
    assert shade((100, 200, 50), 0.5) == (50, 100, 25)
    assert shade((200, 200, 200), 2.0) == (255, 255, 255)
    assert blend((0, 0, 0), (100, 200, 50), 0.5) == (50, 100, 25)
