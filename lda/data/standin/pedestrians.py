"""Drawing one pedestrian: what identifies a person (`Person`) and how the body is seen in one image (`Pose`).

Lengths are fractions of the body height: u to the right from the body's axis, v down from the top of the head (0) to
the soles (1). A `Crop` maps this plane to pixels. Everything drawn is polygons with whole-number corners and
alpha-blended fills, so the pixels do not depend on the processor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Garment:
    """A piece of clothing.

    Attributes:
        kind: upper body: tee, shirt, jacket, hoodie, coat, vest; lower body: trousers, shorts, skirt.
        colour, second: main colour, and that of the pattern, the inner shirt or the trouser stripe.
        pattern: plain, stripes, pinstripes, checks, block, logo (upper); plain, side (a stripe along the leg) (lower).
        period: distance of stripes and checks; height of the block's edge.
        hem: v of the lower edge.
        fit: width, 1 = regular.
        open: a jacket or coat worn open: the inner shirt shows from the front.
    """

    kind: str
    colour: Colour
    second: Colour
    pattern: str
    period: float
    hem: float
    fit: float
    open: bool = False


@dataclass(frozen=True, slots=True)
class Person:
    """One identity. `hair_style`: bald, short, medium, long, tail, cap, hood. `bag`: none, backpack, shoulder, handbag,
    case. `scarf` is None where none is worn; `shoulder`, `hip` are half widths; `head` scales the head."""

    skin: Colour
    hair: Colour
    hair_style: str
    hat: Colour
    shoulder: float
    hip: float
    head: float
    waist: float
    upper: Garment
    lower: Garment
    shoes: Colour
    boots: bool
    bag: str
    bag_colour: Colour
    bag_side: int
    bag_size: float
    scarf: Colour | None
    glasses: bool


@dataclass(frozen=True, slots=True)
class Pose:
    """How a person stands in one image.

    Attributes:
        yaw: radians; 0 faces the camera, pi shows the back, pi / 2 walks to the right.
        phase, stride, arm_swing: of the gait: angle in radians, half step and half swing of the hands.
        bent: arm (-1 or 1) that is held up, 0 for none.
        lean: shift of the head against the feet.
    """

    yaw: float
    phase: float
    stride: float
    arm_swing: float
    bent: int
    lean: float


@dataclass(frozen=True, slots=True)
class Crop:
    """Maps the body plane to an image of `width` x `height` pixels.

    `left, top, right, bottom` are the crop's edges in (u, v). `pitch` >= 0 is the camera's height: it enlarges the
    upper body and shortens the legs. `light` in [-1, 1]: contrast of the shading, lit from the right if positive.
    """

    width: int
    height: int
    left: float
    top: float
    right: float
    bottom: float
    pitch: float
    light: float

    def pixels(self, plane: Sequence[Point], lean: float = 0.0) -> list[Point]:
        """Pixel coordinates (x, y) of points (u, v) of a body whose head is shifted by `lean`."""
        pitch, left, top = self.pitch, self.left, self.top
        scale_u, scale_v = self.width / (self.right - left), self.height / (self.bottom - top)
        mapped = []
        for u, v in plane:
            wide = (u + lean * (1.0 - v)) * (1.0 + 0.5 * pitch * (0.45 - v))
            tall = v * (1.0 + pitch) / (1.0 + pitch * v) if v > 0 else v
            mapped.append(((wide - left) * scale_u, (tall - top) * scale_v))
        return mapped


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor < 1) or lighter (> 1)."""
    r, g, b = (min(255, round(c * factor)) for c in colour)
    return r, g, b


def blend(first: Colour, second: Colour, share: float) -> Colour:
    """`share` of the second colour over the first."""
    r, g, b = (round(p + (q - p) * share) for p, q in zip(first, second, strict=True))
    return r, g, b


def draw_person(image: Image.Image, person: Person, pose: Pose, crop: Crop) -> None:
    """Draws the person over `image` (RGB, the crop's size), from the farthest limb to the nearest."""
    figure = _Figure(image, person, pose, crop)
    figure.legs()
    if person.bag == "backpack" and figure.cos > -0.25:
        figure.backpack_behind()
    if person.bag == "case":
        figure.case()
    figure.hair_behind()
    figure.arm(-1)
    figure.lower_garment()
    figure.torso()
    if person.bag == "backpack":
        figure.backpack_worn()
    figure.arm(1)
    if person.bag in ("shoulder", "handbag"):
        figure.carried_bag()
    figure.head()


class _Figure:
    """The parts of one person in one image; `cos`, `sin` are of the yaw, `d` is the walking direction (-1, 1)."""

    def __init__(self, image: Image.Image, person: Person, pose: Pose, crop: Crop) -> None:
        self.image, self.person, self.pose, self.crop = image, person, pose, crop
        self.draw = ImageDraw.Draw(image, "RGBA")
        self.cos, self.sin = math.cos(pose.yaw), math.sin(pose.yaw)
        self.d = 1 if self.sin >= 0 else -1
        turn = math.sqrt(self.cos**2 + (0.6 * self.sin) ** 2)  # a body is about 0.6 as deep as it is wide
        self.shoulder, self.hip = person.shoulder * turn, person.hip * turn
        self.scale_u = crop.width / (crop.right - crop.left)

    # --- primitives --------------------------------------------------------------------------------------------------
    def points(self, plane: Sequence[Point]) -> list[Point]:
        return self.crop.pixels(plane, self.pose.lean)

    def polygon(self, plane: Sequence[Point], colour: Colour, alpha: int = 255) -> None:
        self.draw.polygon(self.points(plane), fill=(*colour, alpha))

    def line(self, plane: Sequence[Point], colour: Colour, width: float, alpha: int = 255) -> None:
        pixels = max(1, round(width * self.scale_u))
        self.draw.line(self.points(plane), fill=(*colour, alpha), width=pixels)

    def ellipse(self, u: float, v: float, ru: float, rv: float, colour: Colour, alpha: int = 255) -> None:
        (left, middle), (right, _), (_, low) = self.points(((u - ru, v), (u + ru, v), (u, v + rv)))
        self.draw.ellipse((left, 2 * middle - low, right, low), fill=(*colour, alpha))

    def limb(self, joints: Sequence[Point], radii: Sequence[float], colour: Colour) -> None:
        """A chain of tapered capsules with a lit and a dark side."""
        light = self.crop.light
        dark, lit = shade(colour, 1.0 - 0.35 * abs(light)), shade(colour, 1.0 + 0.12 * abs(light))
        for width, offset, tone in ((1.0, 0.0, dark), (0.7, math.copysign(0.3, light), lit)):
            ends = [(u + offset * r, v, r * width) for (u, v), r in zip(joints, radii, strict=True)]
            for (u0, v0, a), (u1, v1, b) in itertools.pairwise(ends):
                self.polygon([(u0 - a, v0), (u0 + a, v0), (u1 + b, v1), (u1 - b, v1)], tone)
            for u, v, r in ends:
                self.ellipse(u, v, r, r, tone)

    def shading(self, plane: Sequence[Point]) -> None:
        """Darkens the side of a patch that lies away from the light."""
        side = -math.copysign(1.0, self.crop.light)
        middle = sum(u for u, _ in plane) / len(plane)
        for share in (0.15, 0.55):
            edge = [(u if (u - middle) * side > 0 else middle + (u - middle) * -share, v) for u, v in plane]
            inner = [(u + side * share * abs(u - middle) * ((u - middle) * side <= 0), v) for u, v in edge]
            self.polygon(inner, (0, 0, 0), round(70 * abs(self.crop.light)))

    # --- legs --------------------------------------------------------------------------------------------------------
    def _leg_joints(self, side: int) -> tuple[Point, Point, Point]:
        pose = self.pose
        forward = side * math.sin(pose.phase) * pose.stride
        hip = (side * 0.5 * self.hip * abs(self.cos), self.person.waist + 0.1)
        lift = 0.035 * max(0.0, math.cos(pose.phase) * side) * min(1.0, pose.stride * 12)
        bend = self.d * 0.25 * pose.stride * abs(self.sin)
        ankle = (hip[0] + forward * self.sin * 1.25 + side * 0.008, 0.955 - lift)
        knee = (hip[0] + forward * self.sin * 0.5 + bend + side * 0.004, 0.735 - 0.4 * lift)
        return hip, knee, ankle

    def legs(self) -> None:
        lower, person = self.person.lower, self.person
        for side in (-1, 1):
            hip, knee, ankle = self._leg_joints(side)
            dim = 1.0 if side == 1 else 1.0 - 0.2 * abs(self.sin)
            skin, cloth = shade(person.skin, dim), shade(lower.colour, dim)
            self.foot(side, ankle, dim)
            if lower.kind == "trousers":
                fit = lower.fit
                end = (ankle[0], min(ankle[1], lower.hem))
                self.limb((hip, knee, end), (0.052 * fit, 0.041 * fit, 0.031 * fit), cloth)
                if lower.pattern == "side":
                    self.line([(p[0] + side * 0.025, p[1]) for p in (hip, knee, ankle)], lower.second, 0.02)
            else:
                self.limb((hip, knee, ankle), (0.05, 0.034, 0.022), skin)
                if lower.kind == "shorts":
                    share = (lower.hem - hip[1]) / (knee[1] - hip[1])
                    end = (hip[0] + (knee[0] - hip[0]) * share, lower.hem)
                    self.limb((hip, end), (0.054 * lower.fit, 0.05 * lower.fit), cloth)
            if person.boots:
                top = (ankle[0] + (knee[0] - ankle[0]) * 0.5, ankle[1] + (knee[1] - ankle[1]) * 0.5)
                self.limb((top, ankle), (0.036, 0.03), shade(person.shoes, dim))

    def foot(self, side: int, ankle: Point, dim: float) -> None:
        toe = self.d * abs(self.sin) * 0.055 + side * 0.006
        down = 0.018 + 0.012 * max(0.0, self.cos)
        shoe = shade(self.person.shoes, dim)
        u, v = ankle
        back = -0.3 * toe
        self.polygon([(u - 0.026 + back, v), (u + 0.026 + back, v), (u + 0.027 + toe, v + down + 0.012),
                      (u - 0.027 + min(toe, 0.0), v + down + 0.014)], shoe)  # fmt: skip
        self.ellipse(u + 0.7 * toe, v + down, 0.03 + 0.3 * abs(toe), 0.016, shoe)

    def lower_garment(self) -> None:
        """Hips, and the skirt where one is worn."""
        lower, waist = self.person.lower, self.person.waist
        if lower.kind == "skirt":
            flare = self.hip * (0.95 + 0.45 * lower.fit * (lower.hem - waist) / 0.3)
            sway = 0.3 * self.pose.stride * math.sin(self.pose.phase) * self.sin
            plane = [(-self.hip, waist - 0.02), (self.hip, waist - 0.02), (self.hip * 1.1, waist + 0.1),
                     (flare + sway, lower.hem), (-flare + sway, lower.hem), (-self.hip * 1.1, waist + 0.1)]  # fmt: skip
            self._cloth(plane, lower)
        else:
            low = waist + 0.13
            plane = [(-self.hip, waist - 0.02), (self.hip, waist - 0.02), (self.hip * 1.02, low - 0.02),
                     (0.3 * self.hip, low), (-0.3 * self.hip, low), (-self.hip * 1.02, low - 0.02)]  # fmt: skip
            self.polygon(plane, shade(lower.colour, 0.95))
            self.shading(plane)

    # --- upper body --------------------------------------------------------------------------------------------------
    def torso(self) -> None:
        person, upper = self.person, self.person.upper
        s, h, fit = self.shoulder, self.hip, upper.fit
        neck, collar = 0.035, 0.15
        hem_half = h * fit * (1.05 + 0.9 * max(0.0, upper.hem - person.waist - 0.08))
        right = [(neck, collar), (0.6 * s, 0.165), (0.9 * s, 0.185), (0.98 * s, 0.22), (s * 0.94 * fit, 0.3),
                 (h * fit, person.waist), (hem_half, upper.hem)]  # fmt: skip
        plane = [*right, *((-u, v) for u, v in reversed(right))]
        self._cloth(plane, upper)
        if upper.open and self.cos > -0.1:
            self._inner_shirt(hem_half)
        if upper.kind == "hoodie" and self.cos < 0.3:
            self.ellipse(-0.02 * self.sin, 0.175, 0.06, 0.03, shade(upper.colour, 0.8))
        if person.scarf is not None:
            self.ellipse(0.0, 0.155, 0.06, 0.026, person.scarf)
            if self.cos > 0.1:
                self.polygon([(0.005, 0.15), (0.04, 0.16), (0.05, 0.3), (0.015, 0.3)], person.scarf)

    def _inner_shirt(self, hem_half: float) -> None:
        upper = self.person.upper
        middle, half = 0.35 * self.shoulder * self.sin, 0.36 * max(0.25, self.cos)
        top, bottom = half * self.shoulder * 0.8, half * hem_half
        plane = [(middle - top, 0.155), (middle + top, 0.155), (middle + bottom, upper.hem),
                 (middle - bottom, upper.hem)]  # fmt: skip
        self.polygon(plane, upper.second)

    def _cloth(self, plane: list[Point], garment: Garment) -> None:
        """Fills a patch with the garment's colour, pattern, folds and shading."""
        self.polygon(plane, garment.colour)
        if garment.pattern in ("stripes", "pinstripes", "checks", "block"):
            self._pattern(plane, garment)
        elif garment.pattern == "logo" and self.cos > 0.15:
            self.ellipse(0.25 * self.shoulder * self.sin, 0.265, 0.05 * self.cos, 0.035, garment.second)
        self.shading(plane)
        fold = 0.3 * self.shoulder * math.cos(3.0 * self.pose.phase)
        self.line([(fold, 0.24), (0.6 * fold, 0.33), (fold, garment.hem)], (0, 0, 0), 0.012, 36)

    def _pattern(self, plane: list[Point], garment: Garment) -> None:
        """Draws the pattern on a sheet of cloth and pastes the patch out of it."""
        size, period = self.image.size, garment.period
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).polygon(self.points(plane), fill=255)
        sheet = Image.new("RGB", size, garment.colour)
        top, bottom = min(v for _, v in plane), max(v for _, v in plane)
        self.draw = ImageDraw.Draw(sheet, "RGBA")
        if garment.pattern == "block":
            edge = top + (bottom - top) * min(0.75, 4.0 * period)
            self.polygon([(-0.4, top - 0.1), (0.4, top - 0.1), (0.4, edge), (-0.4, edge)], garment.second)
        if garment.pattern in ("stripes", "checks"):
            for row in range(round((bottom - top) / period) + 1):
                v = top + row * period
                self.polygon([(-0.4, v), (0.4, v), (0.4, v + 0.45 * period), (-0.4, v + 0.45 * period)],
                             garment.second, 255 if garment.pattern == "stripes" else 150)  # fmt: skip
        if garment.pattern in ("pinstripes", "checks"):
            shift = 0.3 * period * self.sin
            for column in range(-round(0.2 / period), round(0.2 / period) + 1):
                u = column * period + shift
                stripe = [(u, top - 0.1), (u + 0.4 * period, top - 0.1), (u + 0.4 * period, bottom), (u, bottom)]
                self.polygon(stripe, garment.second, 255 if garment.pattern == "pinstripes" else 150)
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.image.paste(sheet, mask=mask)

    def _arm_joints(self, side: int) -> tuple[Point, Point, Point]:
        pose, across = self.pose, abs(self.cos) ** 0.7
        start = (side * (self.shoulder - 0.032) * across, 0.207)
        if side == pose.bent:
            reach = self.d * abs(self.sin) * 0.09 - side * 0.05 * abs(self.cos)
            elbow = (start[0] + side * 0.02 * across, 0.335)
            return start, elbow, (start[0] + reach, 0.31)
        swing = -side * math.sin(pose.phase) * pose.arm_swing * self.sin
        elbow = (start[0] + side * 0.018 * across + 0.4 * swing, 0.335)
        return start, elbow, (start[0] + side * 0.022 * across + swing, 0.46 - 0.3 * abs(swing))

    def arm(self, side: int) -> None:
        upper, person = self.person.upper, self.person
        start, elbow, hand = self._arm_joints(side)
        dim = 0.95 if side == 1 else 0.9 - 0.12 * abs(self.sin)
        cloth, skin = shade(upper.colour, dim), shade(person.skin, dim)
        fit = 0.5 + 0.5 * upper.fit
        self.ellipse(*hand, 0.022, 0.024, shade(skin, 0.85))
        if upper.kind in ("tee", "vest"):
            self.limb((start, elbow, hand), (0.032, 0.027, 0.021), skin)
        if upper.kind == "tee":
            sleeve = (0.4 * start[0] + 0.6 * elbow[0], 0.4 * start[1] + 0.6 * elbow[1])
            self.limb((start, sleeve), (0.035 * fit, 0.035 * fit), cloth)
        elif upper.kind != "vest":
            self.limb((start, elbow, hand), (0.035 * fit, 0.031 * fit, 0.025 * fit), cloth)
            self.ellipse(hand[0], hand[1] + 0.012, 0.019, 0.021, skin)

    # --- bags --------------------------------------------------------------------------------------------------------
    def backpack_behind(self) -> None:
        """The part that shows beside the body when the wearer is seen from the side or the front."""
        size, side = self.person.bag_size, -self.d
        u = side * (self.shoulder * 0.75 + 0.02 * size)
        width = 0.03 + 0.055 * abs(self.sin) * size
        self.ellipse(u, 0.3, width, 0.115 * size, shade(self.person.bag_colour, 0.85))

    def backpack_worn(self) -> None:
        """The whole bag from behind, the straps from the front."""
        size, colour = self.person.bag_size, self.person.bag_colour
        if self.cos < -0.25:
            half, u = (0.03 + 0.06 * abs(self.cos)) * size, -0.04 * self.sin
            top, bottom = 0.185, 0.2 + 0.215 * size
            plane = [(u - 0.75 * half, top), (u + 0.75 * half, top), (u + half, top + 0.04), (u + half, bottom - 0.02),
                     (u + 0.85 * half, bottom), (u - 0.85 * half, bottom), (u - half, bottom - 0.02),
                     (u - half, top + 0.04)]  # fmt: skip
            self.polygon(plane, colour)
            self.shading(plane)
            middle = 0.5 * (top + bottom)
            self.polygon([(u - 0.7 * half, middle), (u + 0.7 * half, middle), (u + 0.7 * half, bottom - 0.02),
                          (u - 0.7 * half, bottom - 0.02)], shade(colour, 0.7))  # fmt: skip
            return
        for side in (-1, 1):
            u = side * 0.6 * self.shoulder * max(0.2, abs(self.cos)) + 0.02 * self.sin
            self.line([(u * 0.9, 0.16), (u, 0.25), (u * 1.1, 0.36)], colour, 0.026)

    def carried_bag(self) -> None:
        person, side = self.person, self.person.bag_side
        size = 0.055 * person.bag_size
        if person.bag == "shoulder":
            u, v = side * (0.8 * self.hip * max(0.3, abs(self.cos)) + 0.02), person.waist + 0.06
            self.line([(-0.6 * u, 0.165), (u, v)], shade(person.bag_colour, 0.75), 0.016)
        else:
            (u, v) = self._arm_joints(side)[2]
            self.line([(u, v), (u, v + 0.05)], shade(person.bag_colour, 0.75), 0.014)
            v += 0.08
        plane = [(u - size, v - 0.04), (u + size, v - 0.04), (u + 1.15 * size, v + 0.06), (u - 1.15 * size, v + 0.06)]
        self.polygon(plane, person.bag_colour)
        self.shading(plane)

    def case(self) -> None:
        """A wheeled case, pulled behind or beside."""
        person = self.person
        u = -self.d * 0.13 * abs(self.sin) + person.bag_side * 0.13 * abs(self.cos)
        half, top = 0.055 * person.bag_size, 0.74
        self.line([(u, 0.47), (u, top)], (70, 70, 74), 0.012)
        plane = [(u - half, top), (u + half, top), (u + half, 0.975), (u - half, 0.975)]
        self.polygon(plane, person.bag_colour)
        self.shading(plane)

    # --- head --------------------------------------------------------------------------------------------------------
    def hair_behind(self) -> None:
        """Long hair that falls behind the face, the neck and the shoulders."""
        length = {"long": 0.075, "medium": 0.035}.get(self.person.hair_style, 0.0)
        if length:
            ru, rv = 0.043 * self.person.head, 0.062 * self.person.head
            u = (0.018 - 0.45 * ru) * self.sin
            self.ellipse(u, 0.07 + length, 1.35 * ru, rv + 0.5 * length, shade(self.person.hair, 0.8))

    def head(self) -> None:
        person, size = self.person, self.person.head
        ru, rv, u, v = 0.043 * size * (1.0 + 0.12 * abs(self.sin)), 0.062 * size, 0.018 * self.sin, 0.07
        style, cloth = person.hair_style, person.upper.colour
        if style == "hood":
            self.ellipse(u, v + 0.004, ru * 1.35, rv * 1.15, shade(cloth, 0.9))
        if self.cos > -0.3 and person.scarf is None:
            self.limb(((0.3 * u, 0.115), (0.0, 0.148)), (0.024, 0.026), shade(person.skin, 0.8))
        if style != "hood" or self.cos > -0.2:
            self.ellipse(u, v, ru, rv, person.skin)
            self.ellipse(u - 0.4 * ru * math.copysign(1, self.crop.light), v + 0.01, ru * 0.6, rv * 0.8,
                         (0, 0, 0), round(45 * abs(self.crop.light)))  # fmt: skip
        self._face(u, v, ru, rv)
        if style == "hood":
            if self.cos < -0.2:
                self.ellipse(u, v, ru * 1.25, rv * 1.1, cloth)
        elif style != "bald":
            self._hair(u, v, ru, rv)
        if style == "cap":
            self._cap(u, v, ru, rv)

    def _face(self, u: float, v: float, ru: float, rv: float) -> None:
        """Eyes or glasses; a beard is not drawn: it would be below the resolution."""
        if self.cos < 0.1:
            return
        middle = u + 0.55 * ru * self.sin
        eyes = [(middle - 0.6 * ru * self.cos, v), (middle + 0.6 * ru * self.cos, v)]
        dark = (25, 22, 22) if self.person.glasses else shade(self.person.skin, 0.55)
        self.line(eyes, dark, 0.012 if self.person.glasses else 0.008, 230 if self.person.glasses else 150)
        mouth = v + 0.5 * rv
        self.line([(middle - 0.25 * ru, mouth), (middle + 0.25 * ru, mouth)], shade(self.person.skin, 0.65), 0.008, 130)

    def _hair(self, u: float, v: float, ru: float, rv: float) -> None:
        """Covers the top of the head in front view, all of it from behind, the back half from the side."""
        hair, style, turn = self.person.hair, self.person.hair_style, abs(self.sin)
        if self.cos < -0.15:
            self.ellipse(u - 0.2 * ru * self.sin, v - 0.05 * rv, 1.08 * ru, rv, hair)
            if style in ("long", "medium"):
                low = 0.06 if style == "long" else 0.025
                self.ellipse(u - 0.3 * ru * self.sin, v + low, 1.15 * ru, rv * (1.05 if style == "long" else 0.8), hair)
        else:
            brow = v - rv * (0.42 - 0.1 * turn)
            arc = [(u + 1.08 * ru * c, v + 1.06 * rv * s) for c, s in _CIRCLE if s <= -0.25]
            self.polygon([*arc, (u + ru * 0.98, brow + 0.1 * rv), (u + 0.3 * ru * self.sin, brow - 0.08 * rv),
                          (u - ru * 0.98, brow + 0.1 * rv)], hair)  # fmt: skip
            if turn > 0.2:  # the back of the head
                self.ellipse(u - self.d * ru * (1.06 - 0.62 * turn), v - 0.1 * rv, 0.62 * ru * turn, 0.85 * rv, hair)
        if style == "tail" and self.cos < 0.5:
            back, low = u - self.sin * 1.1 * ru, 0.02 * self.sin
            self.polygon([(back - 0.018, v - 0.02), (back + 0.018, v - 0.02), (back + 0.012 - low, v + 0.1),
                          (back - 0.012 - low, v + 0.1)], shade(hair, 0.9))  # fmt: skip

    def _cap(self, u: float, v: float, ru: float, rv: float) -> None:
        hat = self.person.hat
        arc = [(u + 1.12 * ru * c, v - 0.05 * rv + 1.1 * rv * s) for c, s in _CIRCLE if s <= -0.25]
        self.polygon(arc, hat)
        if self.cos > -0.3:
            tip = u + self.sin * 1.9 * ru
            low = v - 0.32 * rv
            half = 0.9 * ru * max(0.2, self.cos)
            plane = [(u - half, low - 0.012), (u + half, low - 0.012), (tip, low + 0.006), (u, low + 0.012)]
            self.polygon(plane, shade(hat, 0.75))


# The angles that smooth an ellipse at these sizes; made once, by the same function on every machine.
_CIRCLE = [(math.cos(2 * math.pi * k / 14), math.sin(2 * math.pi * k / 14)) for k in range(14)]
