"""Pictures with visible structure: a textured shape on a striped ground, ten classes.

A class is the ground: five directions of stripes, wide or narrow. The stripes bend, and their phase, colours and contrast
vary, as do shape, place, size and texture of what lies on them; none of that says anything about the class, so that raw
pixels help little.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maekit.images import Pixels

SHAPES = ("disc", "ring", "square", "triangle", "cross")
TEXTURES = ("checks", "dots", "speckle")
WIDTHS = {"wide": 4.5, "narrow": 8.0}  # stripes across the picture
DIRECTIONS = (0, 36, 72, 108, 144)  # degrees
CLASSES = tuple(f"{width}-{direction:03d}" for width in WIDTHS for direction in DIRECTIONS)

_Field = NDArray[np.float64]


def write_pictures(folder: Path, count: int, *, seed: int, size: int = 64) -> None:
    """Write `count` JPEGs into `folder/CLASS/NUMBER.jpg`, the classes in turn."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        name = CLASSES[number % len(CLASSES)]
        Image.fromarray(draw(name, random, size)).save(folder / name / f"{number:05d}.jpg", quality=90)


def draw(name: str, random: np.random.Generator, size: int) -> Pixels:
    """Draw one picture of a class: uint8 `[size, size, 3]`."""
    width, _, direction = name.partition("-")
    y, x = np.mgrid[:size, :size] / size - 0.5
    ground = _coloured(_stripes(x, y, WIDTHS[width], math.radians(int(direction)), random), random)
    radius = random.uniform(0.2, 0.3)
    reach = 0.5 - radius
    left, top = random.uniform(-reach, reach, 2).tolist()
    u, v = _turn((x - left) / radius, (y - top) / radius, random.uniform(0, 2 * math.pi))
    shape = SHAPES[int(random.integers(len(SHAPES)))]
    inside = 1 / (1 + np.exp(_distance(shape, u, v) * radius * size * 2))[..., None]  # one pixel of soft edge
    figure = _coloured(_texture(TEXTURES[int(random.integers(len(TEXTURES)))], x, y, random), random)
    pixels: _Field = ground * (1 - inside) + figure * inside + random.normal(0, 0.02, (size, size, 3))
    return np.asarray((pixels.clip(0, 1) * 255).astype(np.uint8))


def _turn(x: _Field, y: _Field, angle: float) -> tuple[_Field, _Field]:
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _distance(shape: str, u: _Field, v: _Field) -> _Field:
    """Return the signed distance to the edge, in radii: negative inside."""
    r = np.hypot(u, v)
    if shape == "disc":
        return r - 0.9
    if shape == "ring":
        return np.abs(r - 0.75) - 0.25
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.8
    if shape == "triangle":
        sides = (-v - 0.5, 0.866 * u + 0.5 * v - 0.5, -0.866 * u + 0.5 * v - 0.5)
        return np.asarray(np.maximum.reduce(sides))
    arms = np.minimum(np.maximum(np.abs(u) - 1, np.abs(v) - 0.3), np.maximum(np.abs(v) - 1, np.abs(u) - 0.3))
    return np.asarray(arms)


def _stripes(x: _Field, y: _Field, count: float, angle: float, random: np.random.Generator) -> _Field:
    """Return bent stripes, amounts in [0, 1]."""
    u, v = _turn(x, y, angle + random.normal(0, math.radians(5)))
    for _ in range(2):
        bend, phase = random.uniform(1, 2), random.uniform(0, 2 * math.pi)
        u = u + 0.05 * np.sin(2 * math.pi * bend * v + phase)
    return _soft(np.sin(2 * math.pi * count * random.uniform(0.9, 1.1) * u + random.uniform(0, 2 * math.pi)))


def _texture(texture: str, x: _Field, y: _Field, random: np.random.Generator) -> _Field:
    """Return amounts in [0, 1]."""
    if texture == "speckle":
        noise = random.normal(size=x.shape)
        return _soft(sum(np.roll(noise, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)))
    u, v = _turn(x, y, random.uniform(0, math.pi))
    first, second = (np.sin(2 * math.pi * 6 * w + random.uniform(0, 2 * math.pi)) for w in (u, v))
    return _soft(first * second if texture == "checks" else first + second - 0.7)


def _soft(wave: _Field | int) -> _Field:
    """Return a wave around 0 as amounts in [0, 1] with soft edges."""
    return np.asarray(1 / (1 + np.exp(-4 * np.asarray(wave))))


def _coloured(amount: _Field, random: np.random.Generator) -> _Field:
    """Return amounts in [0, 1] as colours between a dark and a light one of any tint: `[H, W]` -> `[H, W, 3]`."""
    dark, light = (
        random.uniform(0, 0.4) + random.uniform(0, 0.15, 3),
        random.uniform(0.6, 0.85) + random.uniform(0, 0.15, 3),
    )
    return np.asarray(dark * (1 - amount[..., None]) + light * amount[..., None])
