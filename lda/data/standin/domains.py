"""What makes a stand-in domain: the clothes people wear, the places and the cameras that see them.

`DOMAINS` holds one `Domain` per data set: distributions, no drawing. `sample_person` and `sample_camera` draw from
them. The numbers were calibrated on plain batch- and instance-norm baselines alone (reports/calibration-standin.md)
and are frozen with `standin.VERSION`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lda.data.standin.pedestrians import Colour, Garment, Person, blend, shade

Range = tuple[float, float]
Weights = Mapping[str, float]

COLOURS: dict[str, Colour] = {
    "black": (28, 28, 32), "charcoal": (58, 60, 66), "grey": (118, 120, 124), "silver": (178, 180, 182),
    "white": (232, 232, 230), "navy": (30, 38, 72), "blue": (48, 84, 160), "sky": (120, 168, 214),
    "denim": (68, 92, 132), "faded": (124, 148, 184), "teal": (30, 108, 112), "green": (48, 114, 60),
    "olive": (98, 100, 58), "khaki": (168, 150, 110), "beige": (206, 188, 156), "brown": (96, 66, 46),
    "camel": (168, 120, 72), "red": (178, 38, 42), "wine": (102, 28, 44), "orange": (220, 122, 44),
    "yellow": (230, 196, 64), "pink": (224, 140, 164), "purple": (104, 64, 130), "mint": (150, 208, 180),
}  # fmt: skip
SKIN: tuple[Colour, Colour] = ((240, 204, 180), (118, 80, 58))
HAIR: dict[str, Colour] = {
    "black": (24, 20, 20), "dark": (50, 36, 28), "brown": (92, 62, 42), "blond": (188, 152, 96),
    "grey": (150, 150, 150), "red": (128, 58, 34),
}  # fmt: skip


@dataclass(frozen=True)
class Wardrobe:
    """Distributions over persons: weights of names, probabilities, the range of skin tones (0 light, 1 dark) and
    the spread of a garment's colour about its named one (sd, 0..255)."""

    upper: Weights
    upper_colours: Weights
    patterns: Weights
    lower: Weights
    lower_colours: Weights
    hair: Weights
    styles: Weights
    bags: Weights
    shoes: Weights
    skin: Range
    scarf: float
    boots: float
    colour_spread: float


@dataclass(frozen=True)
class Domain:
    """Distributions over the persons, cameras and images of one data set. Pairs are (low, high) between cameras.

    Attributes:
        scene: whose places and cameras these are; two domains with one scene share every camera.
        style: kind of place (`standin_scenes`): plaza, campus, street, walkway.
        cameras: number of physical cameras.
        views: weights of front, back, side of a camera's main direction; view_spread: radians within a camera.
        pitch: height of the cameras (`pedestrians.Crop`).
        height, aspect: of the images at scale `full`, in pixels and height / width; drawn per image.
        half_width: of the crop around the person, in body heights; margin: above and below.
        framing: error of the boxes, 1 = a shift of about 4 % of the height.
        detail: share of the image's resolution that the optics resolve; blur: sd in pixels at height 64.
        noise: sd, 0..255; quality: of the JPEG, or of the video codec for sets stored as PNG (0: none).
        gain: red, green, blue of the sensor; gain_spread, gamma_spread: sd between cameras; contrast, lift.
        light: contrast of the shading between a person's lit and dark side.
        shade: probability that the edge of a hard shadow lies across the image; depth: its darkness, 0..255.
        occlusion: probability; occluders: weights of bicycle, pole, person, counter, shrub.
        passer: probability of another person behind.
    """

    scene: str
    style: str
    cameras: int
    wardrobe: Wardrobe
    views: tuple[float, float, float]
    view_spread: float
    pitch: Range
    height: Range
    aspect: Range
    half_width: float
    margin: float
    framing: float
    detail: Range
    blur: Range
    noise: Range
    quality: tuple[int, int]
    gain: tuple[float, float, float]
    gain_spread: float
    gamma: float
    gamma_spread: float
    contrast: float
    lift: float
    light: Range
    shade: float
    depth: Range
    occlusion: float
    occluders: Weights
    passer: float


@dataclass(frozen=True)
class Camera:
    """One camera: its draw from the domain. `lut` holds 3 x 256 output levels, red first."""

    yaw: float
    pitch: float
    detail: float
    blur: float
    noise: float
    quality: int
    light: float
    lut: tuple[int, ...]


def pick(weights: Weights, u: float) -> str:
    """The name at share `u` in [0, 1) of the summed weights."""
    rest = u * sum(weights.values())
    for name, weight in weights.items():
        rest -= weight
        if rest < 0:
            return name
    return name


def sample_person(wardrobe: Wardrobe, rng: np.random.Generator) -> Person:
    """Draws one identity."""
    u = rng.random(24).tolist()

    def colour(weights: Weights, share: float, spread: float = wardrobe.colour_spread) -> Colour:
        base, tone, tint = COLOURS[pick(weights, share)], rng.normal(0, spread), rng.normal(0, spread / 2, 3)
        r, g, b = (int(min(245, max(12, round(c + tone + t)))) for c, t in zip(base, tint.tolist(), strict=True))
        return r, g, b

    kind, pattern = pick(wardrobe.upper, u[0]), pick(wardrobe.patterns, u[1])
    opened = kind in ("jacket", "coat") and u[2] < 0.55
    waist = 0.385 + 0.03 * u[3]
    hem = {"coat": waist + 0.16 + 0.16 * u[4], "vest": waist + 0.04}.get(kind, waist + 0.05 + 0.06 * u[4])
    main = colour(wardrobe.upper_colours, u[5])
    upper = Garment(
        kind, main, colour(wardrobe.upper_colours, u[6]), pattern, 0.035 + 0.05 * u[7], hem, 0.9 + 0.25 * u[8], opened
    )
    below = pick(wardrobe.lower, u[9])
    length = {"shorts": 0.62 + 0.1 * u[10], "skirt": 0.6 + 0.26 * u[10]}.get(below, 0.9 + 0.07 * u[10])
    low = colour(wardrobe.lower_colours, u[11])
    trim = "side" if below == "trousers" and u[12] < 0.12 else "plain"
    lower = Garment(below, low, colour(wardrobe.upper_colours, u[13]), trim, 0.06, length, 0.85 + 0.4 * u[14])
    tone = wardrobe.skin[0] + (wardrobe.skin[1] - wardrobe.skin[0]) * u[15]
    return Person(
        skin=shade(blend(*SKIN, tone), 0.95 + 0.1 * u[16]),
        hair=HAIR[pick(wardrobe.hair, u[17])],
        hair_style=pick(wardrobe.styles, u[18]),
        hat=colour(wardrobe.upper_colours, u[19]),
        shoulder=0.108 + 0.03 * u[20],
        hip=0.078 + 0.03 * u[21],
        head=0.94 + 0.14 * rng.random(),
        waist=waist,
        upper=upper,
        lower=lower,
        shoes=colour(wardrobe.shoes, u[22], 10.0),
        boots=rng.random() < wardrobe.boots,
        bag=pick(wardrobe.bags, u[23]),
        bag_colour=colour(wardrobe.upper_colours, rng.random()),
        bag_side=1 if rng.random() < 0.5 else -1,
        bag_size=0.8 + 0.4 * rng.random(),
        scarf=colour(wardrobe.upper_colours, rng.random()) if rng.random() < wardrobe.scarf else None,
        glasses=rng.random() < 0.2,
    )


def sample_camera(domain: Domain, rng: np.random.Generator) -> Camera:
    """Draws one camera. The differences in colour between cameras of a domain are small on purpose: real ones differ
    less than domains do, and instance normalisation would remove them at once."""

    def between(bounds: Range) -> float:
        return float(rng.uniform(*bounds))

    front, back, side = domain.views
    share = rng.random() * (front + back + side)
    yaw = 0.0 if share < front else math.pi if share < front + back else math.copysign(math.pi / 2, rng.random() - 0.5)
    gamma = domain.gamma * math.exp(rng.normal(0, domain.gamma_spread))
    gains = [g * math.exp(rng.normal(0, domain.gain_spread)) for g in domain.gain]
    lut = [_level(x / 255, gain, gamma, domain) for gain in gains for x in range(256)]
    return Camera(
        yaw=yaw + rng.normal(0, 0.25),
        pitch=between(domain.pitch),
        detail=between(domain.detail),
        blur=between(domain.blur),
        noise=between(domain.noise),
        quality=int(rng.integers(domain.quality[0], domain.quality[1] + 1)),
        light=between(domain.light) * (1 if rng.random() < 0.5 else -1),
        lut=tuple(lut),
    )


def _level(x: float, gain: float, gamma: float, domain: Domain) -> int:
    """Output level of input `x` in [0, 1]: contrast about middle grey, lift, gain, gamma."""
    value = min(1.0, max(0.0, (0.5 + domain.contrast * (x - 0.5) + domain.lift) * gain))
    return round(255 * math.pow(value, gamma))


_SUMMER = Wardrobe(
    upper={"tee": 0.62, "shirt": 0.18, "vest": 0.1, "jacket": 0.1},
    upper_colours={"white": 3, "black": 1.5, "grey": 1, "red": 1.2, "pink": 1.2, "yellow": 0.9, "green": 0.8,
                   "sky": 1.2, "blue": 1.2, "purple": 0.7, "mint": 0.7, "orange": 0.7, "silver": 0.8, "teal": 0.4},
    patterns={"plain": 0.42, "stripes": 0.18, "checks": 0.1, "logo": 0.2, "block": 0.1},
    lower={"trousers": 0.4, "shorts": 0.38, "skirt": 0.22},
    lower_colours={"denim": 2, "black": 2, "faded": 1.2, "khaki": 1, "white": 0.9, "grey": 0.8, "pink": 0.4,
                   "navy": 0.8, "beige": 0.7, "red": 0.3},
    hair={"black": 5, "dark": 2, "brown": 1},
    styles={"short": 0.42, "medium": 0.16, "long": 0.2, "tail": 0.16, "cap": 0.05, "bald": 0.01},
    bags={"none": 0.4, "backpack": 0.27, "shoulder": 0.18, "handbag": 0.15},
    shoes={"white": 2, "black": 2, "grey": 1, "red": 0.6, "blue": 0.6, "brown": 0.6},
    skin=(0.05, 0.4), scarf=0.0, boots=0.0, colour_spread=11.0,
)  # fmt: skip
_WINTER = Wardrobe(
    upper={"jacket": 0.42, "coat": 0.3, "hoodie": 0.2, "shirt": 0.08},
    upper_colours={"black": 4, "charcoal": 2.5, "navy": 2.2, "grey": 1.4, "olive": 1.2, "brown": 1.1, "wine": 1.1,
                   "camel": 0.8, "red": 0.7, "blue": 0.6, "white": 0.7, "beige": 0.7, "green": 0.4, "teal": 0.4},
    patterns={"plain": 0.66, "block": 0.16, "checks": 0.1, "logo": 0.04, "pinstripes": 0.04},
    lower={"trousers": 0.93, "skirt": 0.07},
    lower_colours={"black": 3, "denim": 2.4, "navy": 1.6, "charcoal": 1.5, "grey": 1, "brown": 0.8, "olive": 0.5,
                   "faded": 0.6, "khaki": 0.5},
    hair={"black": 5, "dark": 2, "brown": 1},
    styles={"short": 0.4, "medium": 0.16, "long": 0.18, "tail": 0.1, "cap": 0.06, "hood": 0.1},
    bags={"none": 0.38, "backpack": 0.34, "shoulder": 0.14, "handbag": 0.08, "case": 0.06},
    shoes={"black": 3, "white": 1.4, "brown": 1.2, "grey": 1, "red": 0.3},
    skin=(0.0, 0.3), scarf=0.3, boots=0.25, colour_spread=9.0,
)  # fmt: skip
_MIXED = Wardrobe(
    upper={"tee": 0.28, "shirt": 0.27, "jacket": 0.25, "coat": 0.12, "hoodie": 0.05, "vest": 0.03},
    upper_colours={"black": 2.6, "white": 2, "grey": 1.3, "beige": 1.3, "red": 1.3, "brown": 1, "camel": 1, "navy": 1,
                   "blue": 1, "pink": 0.9, "khaki": 0.9, "purple": 0.5, "orange": 0.5, "green": 0.5, "silver": 0.8},
    patterns={"plain": 0.55, "stripes": 0.14, "checks": 0.12, "block": 0.1, "pinstripes": 0.04, "logo": 0.05},
    lower={"trousers": 0.66, "skirt": 0.24, "shorts": 0.1},
    lower_colours={"black": 2.6, "denim": 2, "khaki": 1, "grey": 1, "faded": 1, "brown": 0.8, "white": 0.7,
                   "beige": 0.7, "navy": 1, "wine": 0.4},
    hair={"black": 4, "dark": 2, "brown": 1.5, "blond": 0.4, "grey": 0.6, "red": 0.3},
    styles={"short": 0.42, "medium": 0.18, "long": 0.22, "tail": 0.1, "cap": 0.05, "bald": 0.03},
    bags={"none": 0.42, "handbag": 0.22, "shoulder": 0.22, "backpack": 0.12, "case": 0.02},
    shoes={"black": 3, "brown": 1.3, "white": 1.2, "red": 0.5, "beige": 0.7, "grey": 0.7},
    skin=(0.0, 0.6), scarf=0.08, boots=0.12, colour_spread=12.0,
)  # fmt: skip
_CAMPUS_WARM = Wardrobe(
    upper={"tee": 0.42, "shirt": 0.3, "hoodie": 0.14, "jacket": 0.14},
    upper_colours={"grey": 4, "silver": 3, "charcoal": 2.5, "navy": 2, "white": 1.5, "denim": 2, "black": 1.5,
                   "blue": 1, "sky": 0.5, "red": 0.3, "teal": 0.4, "olive": 0.6, "khaki": 0.5, "purple": 0.3},
    patterns={"plain": 0.46, "stripes": 0.16, "checks": 0.2, "logo": 0.12, "block": 0.06},
    lower={"trousers": 0.7, "shorts": 0.22, "skirt": 0.08},
    lower_colours={"denim": 3, "black": 2, "navy": 1.3, "grey": 1.2, "faded": 1.3, "khaki": 1.1, "charcoal": 1,
                   "brown": 0.5, "olive": 0.5},
    hair={"black": 6, "dark": 2, "brown": 0.6},
    styles={"short": 0.55, "medium": 0.17, "long": 0.14, "tail": 0.12, "cap": 0.02},
    bags={"none": 0.3, "backpack": 0.45, "shoulder": 0.2, "handbag": 0.05},
    shoes={"white": 1.6, "black": 2, "grey": 1.3, "blue": 0.7, "brown": 0.7, "red": 0.4},
    skin=(0.1, 0.45), scarf=0.02, boots=0.02, colour_spread=10.0,
)  # fmt: skip

_PEDESTRIANS = dataclasses.replace(
    _MIXED, bags={"none": 0.4, "shoulder": 0.25, "backpack": 0.2, "handbag": 0.12, "case": 0.03},
    skin=(0.0, 0.7), scarf=0.12, colour_spread=10.0,
)  # fmt: skip
_TRAVELLERS = dataclasses.replace(
    _WINTER, bags={"case": 0.45, "none": 0.2, "backpack": 0.15, "shoulder": 0.15, "handbag": 0.05}, skin=(0.0, 0.8),
)  # fmt: skip

_CUHK02 = Domain(
    scene="cuhk", style="walkway", cameras=10, wardrobe=_CAMPUS_WARM, views=(0.3, 0.3, 0.4), view_spread=0.5,
    pitch=(0.45, 0.85), height=(160, 160), aspect=(2.67, 2.67), half_width=0.19, margin=0.01, framing=0.25,
    detail=(0.8, 1.0), blur=(0.0, 0.35), noise=(2.5, 4.5), quality=(0, 0), gain=(0.92, 1.0, 0.97),
    gain_spread=0.03, gamma=1.12, gamma_spread=0.05, contrast=0.74, lift=-0.05, light=(0.1, 0.35),
    shade=0.65, depth=(75.0, 130.0), occlusion=0.08,
    occluders={"person": 0.6, "pole": 0.4}, passer=0.1,
)  # fmt: skip

DOMAINS: dict[str, Domain] = {
    "market1501": Domain(
        scene="market", style="plaza", cameras=6, wardrobe=_SUMMER, views=(0.35, 0.35, 0.3), view_spread=0.55,
        pitch=(0.1, 0.3), height=(128, 128), aspect=(2, 2), half_width=0.22, margin=0.02, framing=1.0,
        detail=(0.6, 0.8), blur=(0.5, 0.9), noise=(2.0, 4.0), quality=(55, 75), gain=(1.05, 1.0, 0.93),
        gain_spread=0.03, gamma=0.9, gamma_spread=0.05, contrast=1.0, lift=0.03, light=(0.4, 0.8), shade=0.03,
        depth=(40.0, 80.0), occlusion=0.25,
        occluders={"bicycle": 0.55, "person": 0.35, "counter": 0.1}, passer=0.25,
    ),
    "msmt17": Domain(
        scene="msmt", style="campus", cameras=15, wardrobe=_WINTER, views=(0.3, 0.3, 0.4), view_spread=0.7,
        pitch=(0.0, 0.4), height=(112, 160), aspect=(2.1, 2.6), half_width=0.205, margin=0.015, framing=0.7,
        detail=(0.75, 1.0), blur=(0.2, 0.9), noise=(2.0, 5.0), quality=(75, 92), gain=(0.97, 1.0, 1.06),
        gain_spread=0.045, gamma=1.05, gamma_spread=0.09, contrast=0.95, lift=0.0, light=(0.1, 0.7), shade=0.0,
        depth=(40.0, 80.0), occlusion=0.34,
        occluders={"person": 0.45, "pole": 0.25, "bicycle": 0.2, "shrub": 0.1}, passer=0.25,
    ),
    "cuhk_sysu": Domain(
        scene="sysu", style="street", cameras=60, wardrobe=_MIXED, views=(0.45, 0.3, 0.25), view_spread=0.5,
        pitch=(-0.05, 0.08), height=(120, 176), aspect=(2.2, 2.9), half_width=0.235, margin=0.04, framing=0.4,
        detail=(0.85, 1.0), blur=(0.0, 0.4), noise=(0.5, 3.0), quality=(70, 90), gain=(1.04, 1.0, 0.98),
        gain_spread=0.05, gamma=1.0, gamma_spread=0.09, contrast=1.12, lift=0.0, light=(0.1, 0.6), shade=0.0,
        depth=(40.0, 80.0), occlusion=0.18,
        occluders={"person": 0.75, "counter": 0.15, "pole": 0.1}, passer=0.4,
    ),
    "cuhk02": _CUHK02,
    "cuhk03": dataclasses.replace(_CUHK02, height=(136, 184), aspect=(2.4, 2.9)),
    # The targets of Protocol-1. They came after the calibration and reuse the wardrobes and kinds of place above.
    "prid": Domain(
        scene="prid", style="street", cameras=2, wardrobe=_PEDESTRIANS, views=(0.2, 0.2, 0.6), view_spread=0.35,
        pitch=(0.35, 0.6), height=(128, 128), aspect=(2, 2), half_width=0.23, margin=0.02, framing=0.5,
        detail=(0.5, 0.65), blur=(0.4, 0.8), noise=(2.0, 4.0), quality=(0, 0), gain=(0.95, 1.0, 1.05),
        gain_spread=0.05, gamma=0.85, gamma_spread=0.08, contrast=0.7, lift=0.06, light=(0.2, 0.6), shade=0.2,
        depth=(40.0, 90.0), occlusion=0.05,
        occluders={"pole": 0.6, "person": 0.4}, passer=0.05,
    ),
    "grid": Domain(
        scene="grid", style="walkway", cameras=6, wardrobe=_PEDESTRIANS, views=(0.4, 0.4, 0.2), view_spread=0.5,
        pitch=(0.3, 0.6), height=(110, 180), aspect=(2.0, 2.8), half_width=0.21, margin=0.02, framing=0.8,
        detail=(0.45, 0.7), blur=(0.5, 1.1), noise=(4.0, 8.0), quality=(50, 70), gain=(1.08, 1.0, 0.82),
        gain_spread=0.05, gamma=1.2, gamma_spread=0.08, contrast=0.85, lift=-0.02, light=(0.05, 0.25), shade=0.0,
        depth=(40.0, 80.0), occlusion=0.3,
        occluders={"person": 0.8, "pole": 0.2}, passer=0.3,
    ),
    "viper": Domain(
        scene="viper", style="campus", cameras=16, wardrobe=_SUMMER, views=(0.3, 0.25, 0.45), view_spread=0.4,
        pitch=(0.0, 0.15), height=(128, 128), aspect=(2.667, 2.667), half_width=0.18, margin=0.01, framing=0.3,
        detail=(0.6, 0.85), blur=(0.3, 0.7), noise=(1.5, 3.5), quality=(0, 0), gain=(1.06, 1.0, 0.9),
        gain_spread=0.06, gamma=0.95, gamma_spread=0.15, contrast=1.1, lift=0.02, light=(0.3, 0.8), shade=0.15,
        depth=(40.0, 90.0), occlusion=0.02,
        occluders={"pole": 0.7, "shrub": 0.3}, passer=0.05,
    ),
    "ilids": Domain(
        scene="ilids", style="plaza", cameras=5, wardrobe=_TRAVELLERS, views=(0.4, 0.3, 0.3), view_spread=0.5,
        pitch=(0.1, 0.4), height=(144, 192), aspect=(2.0, 2.2), half_width=0.23, margin=0.03, framing=1.0,
        detail=(0.6, 0.85), blur=(0.3, 0.8), noise=(2.5, 5.0), quality=(60, 80), gain=(1.02, 1.0, 0.95),
        gain_spread=0.05, gamma=1.1, gamma_spread=0.08, contrast=0.9, lift=-0.03, light=(0.1, 0.4), shade=0.0,
        depth=(40.0, 80.0), occlusion=0.45,
        occluders={"person": 0.6, "counter": 0.4}, passer=0.5,
    ),
}  # fmt: skip
"""Data set name (lda.protocols) -> its domain."""
