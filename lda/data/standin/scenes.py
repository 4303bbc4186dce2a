"""Places and the formation of an image: background, passers-by, occluders, optics, sensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from lda.data.standin.domains import DOMAINS, Camera, Domain, pick, sample_camera, sample_person
from lda.data.standin.pedestrians import Colour, Crop, Person, Pose, blend, draw_person, shade

SUPERSAMPLING = 2  # the scene is drawn this many times larger than the image and averaged down
SCENE_WIDTH = 4  # a camera's background is this many crops wide; every image shows another part of it


@dataclass(frozen=True, slots=True)
class Box:
    """How the person is boxed.

    `error` multiplies the domain's framing error (0: a perfect box); `junk` is a box that misses most of the person
    (Market-1501's id -1); `empty` shows no person at all (its id 0).
    """

    error: float = 1.0
    junk: bool = False
    empty: bool = False


def stable_rng(*key: int) -> np.random.Generator:
    """The generator that belongs to a key, the same in every process and on every machine."""
    return np.random.default_rng(np.random.SeedSequence(key))


def scene_key(domain: Domain) -> int:
    """A number for the scene's name: data sets that share a scene share it."""
    return int.from_bytes(domain.scene.encode()[:6], "big")


@lru_cache(maxsize=512)
def camera_of(name: str, index: int, seed: int) -> Camera:
    """Camera `index` of a data set's scene."""
    domain = DOMAINS[name]
    return sample_camera(domain, stable_rng(seed, scene_key(domain), 1, index))


def photograph(
    name: str, index: int, person: Person, rng: np.random.Generator, box: Box, box_rng: np.random.Generator,
    scale: float, seed: int,
) -> npt.NDArray[np.uint8]:  # fmt: skip
    """One image (H, W, 3) of `person` under camera `index` of data set `name`.

    `rng` draws the moment, `box_rng` the box around the person, so that two boxes of one moment (CUHK03's labeled and
    detected crops) differ in framing alone. `scale` multiplies the domain's image size.
    """
    domain, camera = DOMAINS[name], camera_of(name, index, seed)
    height = round(scale * rng.uniform(*domain.height))
    width = round(height / rng.uniform(*domain.aspect))
    crop = _crop(domain, camera, width * SUPERSAMPLING, height * SUPERSAMPLING, box, box_rng)
    image = _background(name, index, crop, seed, scale, rng)
    if rng.random() < domain.passer or box.junk:
        _passer(image, domain, camera, crop, rng, behind=True)
    if not box.empty:
        _shadow(image, crop)
        draw_person(image, person, _pose(domain, camera, rng), crop)
    if rng.random() < domain.occlusion:
        _occlude(image, domain, camera, crop, rng)
    if rng.random() < domain.shade:
        _cast_shadow(image, domain, rng)
    return _expose(image, camera, width, height, rng)


def _crop(domain: Domain, camera: Camera, width: int, height: int, box: Box, rng: np.random.Generator) -> Crop:
    error = 0.04 * domain.framing * box.error
    du, dv, grow, stretch = (error * rng.standard_normal(4)).tolist()
    if box.junk:
        du, dv = math.copysign(0.2, du) + 3 * du, math.copysign(0.35, dv) + 3 * dv
    half = domain.half_width * (1.0 + 1.5 * grow + stretch)
    margin = domain.margin + 0.8 * grow
    pitch = camera.pitch
    return Crop(width, height, du - half, dv - margin, du + half, 1.02 + dv + margin, pitch, camera.light)


def _pose(domain: Domain, camera: Camera, rng: np.random.Generator) -> Pose:
    yaw = camera.yaw + domain.view_spread * rng.standard_normal()
    phase, walks, bent, lean = rng.uniform(0, 2 * math.pi), rng.random(), rng.random(), rng.normal(0, 0.008)
    stride = 0.015 if walks < 0.2 else rng.uniform(0.05, 0.11)
    arm = 0 if bent > 0.22 else 1 if bent < 0.11 else -1
    return Pose(yaw, phase, stride, 0.3 * stride + 0.7 * stride * rng.random(), arm, lean)


# --- background ------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=96)
def _scenery(name: str, index: int, width: int, height: int, seed: int) -> Image.Image:
    """The place that a camera sees, `width` x `height` pixels."""
    domain = DOMAINS[name]
    rng = stable_rng(seed, scene_key(domain), 2, index)
    pitch = camera_of(name, index, seed).pitch
    horizon = max(0.02, 0.36 - 0.5 * pitch)
    image = Image.new("RGB", (width, height))
    painter = {"plaza": _plaza, "campus": _campus, "street": _street, "walkway": _walkway}[domain.style]
    painter(ImageDraw.Draw(image), width, height, horizon, rng)
    return image


def _background(name: str, index: int, crop: Crop, seed: int, scale: float, rng: np.random.Generator) -> Image.Image:
    domain = DOMAINS[name]
    tall = SUPERSAMPLING * round(scale * domain.height[1])  # one scenery per camera, cut for every image size
    scenery = _scenery(name, index, SCENE_WIDTH * tall // 2, tall * 5 // 4, seed)
    x = int(rng.integers(0, scenery.width - crop.width + 1))
    y = int(rng.integers(0, scenery.height - crop.height + 1))
    return scenery.crop((x, y, x + crop.width, y + crop.height))


def _ground(draw: ImageDraw.ImageDraw, width: int, height: int, top: float, colour: Colour, joints: Colour, gap: float,
            rng: np.random.Generator) -> None:  # fmt: skip
    """Paved ground below `top`: joints that come closer together towards the horizon, patches, stains."""
    edge = int(top * height)
    draw.rectangle((0, edge, width, height), fill=colour)
    y = float(edge)
    step = gap * height * 0.15
    while y < height:
        draw.line((0, y, width, y), fill=joints)
        y, step = y + step, step * 1.35
    middle = width / 2
    for k in range(-12, 13):
        x = middle + k * gap * height
        draw.line((middle + (x - middle) * 0.35, edge, middle + (x - middle) * 1.6, height), fill=joints)
    for _ in range(14):
        x, y = rng.uniform(0, width), rng.uniform(edge, height)
        w, h = rng.uniform(0.05, 0.25) * height, rng.uniform(0.01, 0.05) * height
        draw.ellipse((x, y, x + w, y + h), fill=shade(colour, rng.uniform(0.86, 1.08)))


def _row(draw: ImageDraw.ImageDraw, width: int, top: float, bottom: float, colours: list[Colour], cell: float,
         rng: np.random.Generator) -> None:  # fmt: skip
    """A row of upright panels of uneven width: shop windows, doors, facades."""
    x = 0.0
    while x < width:
        step = cell * rng.uniform(0.5, 1.5)
        colour = shade(colours[int(rng.integers(len(colours)))], rng.uniform(0.85, 1.15))
        draw.rectangle((x, top, x + step, bottom), fill=colour)
        draw.line((x, top, x, bottom), fill=shade(colour, 0.6))
        x += step


def _blobs(draw: ImageDraw.ImageDraw, width: int, y: float, size: float, colour: Colour, count: int,
           rng: np.random.Generator) -> None:  # fmt: skip
    """Leaves: many small ellipses about a line."""
    for _ in range(count):
        x, v, r = rng.uniform(0, width), y + rng.normal(0, size), size * rng.uniform(0.3, 0.9)
        draw.ellipse((x - r, v - 0.7 * r, x + r, v + 0.7 * r), fill=shade(colour, rng.uniform(0.6, 1.4)))


def _bicycle(draw: ImageDraw.ImageDraw, x: float, y: float, size: float, colour: Colour) -> None:
    """Two wheels and a frame; (x, y) is where the rear wheel touches the ground."""
    line = max(1, round(size / 14))
    r = 0.32 * size
    for hub in (x, x + size):
        draw.ellipse((hub - r, y - 2 * r, hub + r, y), outline=(34, 34, 36), width=line)
    top = y - 2.3 * r
    frame = [(x, y - r), (x + 0.3 * size, top), (x + 0.8 * size, top), (x + size, y - r)]
    draw.line(frame, fill=colour, width=line)
    draw.line([(x + 0.3 * size, top), (x + 0.5 * size, y - 0.8 * r), (x + 0.8 * size, top)], fill=colour, width=line)


def _plaza(draw: ImageDraw.ImageDraw, w: int, h: int, horizon: float, rng: np.random.Generator) -> None:
    """Before a supermarket in the sun: shop front, hedge, bright paving, parked bicycles."""
    edge = horizon * h
    draw.rectangle((0, 0, w, h), fill=(208, 206, 196))
    _row(draw, w, 0, edge * 0.8, [(120, 140, 150), (200, 196, 180), (170, 60, 50), (70, 90, 80)], 0.3 * h, rng)
    if rng.random() < 0.7:
        _blobs(draw, w, edge * 0.95, 0.05 * h, (74, 112, 58), 160, rng)
    tone = rng.uniform(0.92, 1.06)
    _ground(draw, w, h, horizon, shade((196, 184, 160), tone), shade((168, 156, 134), tone), 0.16, rng)
    for _ in range(int(rng.integers(2, 7))):
        colour = ((150, 40, 40), (50, 70, 130), (60, 60, 64), (190, 190, 190))[int(rng.integers(4))]
        _bicycle(draw, rng.uniform(0, w), edge + rng.uniform(0.08, 0.3) * h, 0.28 * h, colour)


def _campus(draw: ImageDraw.ImageDraw, w: int, h: int, horizon: float, rng: np.random.Generator) -> None:
    """A university in winter: brick and concrete, bare trees, asphalt; one camera in five is in a corridor."""
    edge = horizon * h
    if rng.random() < 0.2:
        draw.rectangle((0, 0, w, h), fill=(198, 196, 188))
        _row(draw, w, 0, h * 0.62, [(200, 198, 190), (188, 186, 178), (120, 84, 60), (206, 204, 198)], 0.35 * h, rng)
        _ground(draw, w, h, 0.62, (150, 146, 138), (130, 126, 118), 0.2, rng)
        return
    draw.rectangle((0, 0, w, h), fill=(206, 212, 220))
    walls: list[Colour] = [(140, 92, 76), (132, 128, 126), (158, 148, 136), (110, 112, 118)]
    _row(draw, w, 0.02 * h, edge, walls, 0.7 * h, rng)
    for x in np.arange(0, w, 0.11 * h).tolist():
        for y in np.arange(0.03 * h, edge - 0.06 * h, 0.1 * h).tolist():
            draw.rectangle((x, y, x + 0.06 * h, y + 0.06 * h), fill=(70, 78, 90))
    tone = rng.uniform(0.85, 1.1)
    _ground(draw, w, h, horizon, shade((112, 112, 116), tone), shade((102, 102, 106), tone), 0.4, rng)
    verge = edge + rng.uniform(0.05, 0.2) * h
    draw.rectangle((0, edge, w, verge), fill=shade((104, 104, 74), rng.uniform(0.8, 1.1)))
    for _ in range(int(rng.integers(3, 9))):
        x, r = rng.uniform(0, w), rng.uniform(0.02, 0.05) * h
        draw.rectangle((x - r, 0, x + r, verge + 0.02 * h), fill=shade((74, 62, 54), rng.uniform(0.8, 1.2)))
    if rng.random() < 0.5:
        y = rng.uniform(verge, h)
        draw.polygon([(0, y), (w, y - 0.1 * h), (w, y - 0.07 * h), (0, y + 0.03 * h)], fill=(190, 190, 186))


def _street(draw: ImageDraw.ImageDraw, w: int, h: int, horizon: float, rng: np.random.Generator) -> None:
    """Town at eye level: signs in every colour, parked cars, dark interiors; each place unlike the next."""
    edge = (horizon + rng.uniform(0.0, 0.3)) * h
    draw.rectangle((0, 0, w, h), fill=(90, 88, 90))
    bright: list[Colour] = [(r, g, b) for r, g, b in rng.integers(20, 236, (6, 3)).tolist()]
    signs = [blend(colour, (128, 124, 120), rng.uniform(0.2, 0.8)) for colour in bright]
    _row(draw, w, 0, edge, [shade(c, 0.7) for c in signs], 0.25 * h, rng)
    _row(draw, w, 0.05 * h, 0.2 * h, signs, 0.18 * h, rng)
    paving = blend((90, 88, 86), (200, 190, 176), rng.random())
    _ground(draw, w, h, edge / h, paving, shade(paving, 0.85), rng.uniform(0.15, 0.5), rng)
    for _ in range(int(rng.integers(0, 5))):
        x, colour = rng.uniform(0, w), signs[int(rng.integers(len(signs)))]
        draw.rounded_rectangle((x, edge - 0.16 * h, x + 0.7 * h, edge + 0.08 * h), 0.05 * h, fill=colour)
        draw.rectangle((x + 0.12 * h, edge - 0.14 * h, x + 0.56 * h, edge - 0.05 * h), fill=(50, 56, 64))
        for wheel in (x + 0.15 * h, x + 0.55 * h):
            draw.ellipse((wheel - 0.05 * h, edge + 0.02 * h, wheel + 0.05 * h, edge + 0.12 * h), fill=(24, 24, 26))


def _walkway(draw: ImageDraw.ImageDraw, w: int, h: int, horizon: float, rng: np.random.Generator) -> None:
    """A covered walkway from above: tiled floor almost everywhere, a railing with its shadow, plants."""
    tone = rng.uniform(0.85, 1.1)
    floor = shade((138, 134, 122), tone)
    draw.rectangle((0, 0, w, h), fill=(96, 104, 92))
    _blobs(draw, w, horizon * h * 0.5, 0.05 * h, (64, 92, 58), 120, rng)
    _ground(draw, w, h, horizon, floor, shade(floor, 0.82), 0.09, rng)
    rail = (horizon + rng.uniform(0.06, 0.3)) * h
    for offset in (0.0, 0.05, 0.1):
        draw.line((0, rail - offset * h, w, rail - offset * h), fill=(84, 88, 84), width=max(1, round(0.012 * h)))
    for x in np.arange(rng.uniform(0, 0.2) * h, w, 0.22 * h).tolist():
        draw.line((x, rail - 0.12 * h, x, rail + 0.03 * h), fill=(70, 74, 70), width=max(1, round(0.016 * h)))
        draw.line((x, rail + 0.03 * h, x + 0.12 * h, rail + 0.25 * h), fill=shade(floor, 0.75), width=max(1, h // 60))


def _shadow(image: Image.Image, crop: Crop) -> None:
    """A soft dark patch where the person stands."""
    draw = ImageDraw.Draw(image, "RGBA")
    ((x, y),) = crop.pixels([(-0.05 if crop.light > 0 else 0.05, 0.985)])
    rx, ry = 0.17 / (crop.right - crop.left) * crop.width, 0.022 * crop.height
    for share in (1.0, 0.6):
        draw.ellipse((x - rx * share, y - ry * share, x + rx * share, y + ry * share), fill=(0, 0, 0, 60))


# --- other people and things -----------------------------------------------------------------------------------------
def _passer(image: Image.Image, domain: Domain, camera: Camera, crop: Crop, rng: np.random.Generator, *, behind: bool
            ) -> None:  # fmt: skip
    """Another person, farther away (behind) or nearer and cut by the image's edge."""
    other = sample_person(domain.wardrobe, rng)
    side = 1.0 if rng.random() < 0.5 else -1.0
    size = rng.uniform(0.55, 0.85) if behind else rng.uniform(1.0, 1.2)
    offset = side * rng.uniform(0.12, 0.24) * (1.0 if behind else 1.15)
    feet = rng.uniform(0.75, 0.92) if behind else rng.uniform(1.05, 1.25)
    nearer = Crop(
        crop.width, crop.height, (crop.left - offset) / size, (crop.top - feet) / size + 1.0,
        (crop.right - offset) / size, (crop.bottom - feet) / size + 1.0, crop.pitch, crop.light,
    )  # fmt: skip
    draw_person(image, other, _pose(domain, camera, rng), nearer)


def _occlude(image: Image.Image, domain: Domain, camera: Camera, crop: Crop, rng: np.random.Generator) -> None:
    """Something between the camera and the person."""
    kind = pick(domain.occluders, rng.random())
    if kind == "person":
        _passer(image, domain, camera, crop, rng, behind=False)
        return
    draw, w, h = ImageDraw.Draw(image), crop.width, crop.height
    tone = shade((92, 92, 90), rng.uniform(0.5, 1.7))
    if kind == "bicycle":
        _bicycle(draw, rng.uniform(-0.3, 0.5) * w, rng.uniform(0.9, 1.05) * h, 0.75 * w, tone)
    elif kind == "pole":
        x, r = rng.uniform(0.08, 0.92) * w, rng.uniform(0.04, 0.1) * w
        draw.rectangle((x - r, 0, x + r, h), fill=tone)
        draw.rectangle((x - r, 0, x - 0.3 * r, h), fill=shade(tone, 1.2))
    elif kind == "counter":
        draw.rectangle((0, rng.uniform(0.62, 0.85) * h, w, h), fill=blend(tone, (150, 110, 80), rng.random()))
    else:
        _blobs(draw, w, rng.uniform(0.85, 0.98) * h, 0.07 * h, (70, 88, 56), 60, rng)


def _cast_shadow(image: Image.Image, domain: Domain, rng: np.random.Generator) -> None:
    """The slanted edge of a building's or a roof's shadow over the ground and the person."""
    w, h = image.size
    edge, slope = rng.uniform(0.15, 0.85) * h, rng.uniform(-1.5, 1.5) * w
    far = -h if rng.random() < 0.5 else 2 * h
    plane = [(0, edge - slope), (w, edge + slope), (w, far), (0, far)]
    ImageDraw.Draw(image, "RGBA").polygon(plane, fill=(0, 0, 8, round(rng.uniform(*domain.depth))))


# --- optics and sensor -----------------------------------------------------------------------------------------------
def _expose(image: Image.Image, camera: Camera, width: int, height: int, rng: np.random.Generator
            ) -> npt.NDArray[np.uint8]:  # fmt: skip
    """Resolution, blur, colour response and noise of the camera. No exposure jitter from image to image."""
    image = image.reduce(SUPERSAMPLING)
    if camera.detail < 1.0:
        small = (max(4, round(width * camera.detail)), max(8, round(height * camera.detail)))
        image = image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BILINEAR)
    if camera.blur > 0.05:
        image = image.filter(ImageFilter.GaussianBlur(camera.blur * height / 64))
    pixels = np.asarray(image.point(camera.lut), dtype=np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(np.rint(pixels + camera.noise * noise), 0, 255).astype(np.uint8)
