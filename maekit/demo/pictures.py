"""Synthetic pictures of ten classes: a textured shape on a cloudy background.

The class is the texture of the shape: five patterns, coarse or fine. Shape, position, size, angle, colours and phases
vary independently of the class, so raw pixels help little.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maekit.images import Pixels

SHAPES = ("disc", "ring", "square", "triangle", "cross")
PATTERNS = ("stripes", "checks", "dots", "waves", "rings")
SCALES = {"coarse": 4.0, "fine": 8.0}  # texture periods across the picture
CLASSES = tuple(f"{scale}-{pattern}" for pattern in PATTERNS for scale in SCALES)

_Field = NDArray[np.float64]


def write_pictures(folder: Path, count: int, *, seed: int, size: int = 64) -> None:
    """Write `count` JPEGs to `folder/CLASS/NUMBER.jpg`, cycling through the classes."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        name = CLASSES[number % len(CLASSES)]
        Image.fromarray(draw(name, random, size)).save(folder / name / f"{number:05d}.jpg", quality=90)


def draw(name: str, random: np.random.Generator, size: int) -> Pixels:
    """Draw one picture of a class: uint8 `[size, size, 3]`."""
    scale, _, pattern = name.partition("-")
    y, x = np.mgrid[:size, :size] / size - 0.5
    ground = _coloured(_clouds(x, y, random), random)
    radius = random.uniform(0.38, 0.48)
    reach = 0.5 - radius
    left, top = random.uniform(-reach, reach, 2).tolist()
    u, v = _turn((x - left) / radius, (y - top) / radius, random.uniform(0, 2 * math.pi))
    shape = SHAPES[int(random.integers(len(SHAPES)))]
    inside = 1 / (1 + np.exp(_distance(shape, u, v) * radius * size * 2))[..., None]  # soft edge of one pixel
    figure = _coloured(_pattern(pattern, x, y, SCALES[scale], random), random)
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


def _clouds(x: _Field, y: _Field, random: np.random.Generator) -> _Field:
    """Return a smooth random field with values in [0, 1]."""
    wave = np.zeros_like(x)
    for _ in range(3):
        u, _v = _turn(x, y, random.uniform(0, 2 * math.pi))
        wave += np.sin(2 * math.pi * random.uniform(0.5, 1.5) * u + random.uniform(0, 2 * math.pi))
    return np.asarray(1 / (1 + np.exp(-wave)))


def _pattern(pattern: str, x: _Field, y: _Field, periods: float, random: np.random.Generator) -> _Field:
    """Return a texture with values in [0, 1]."""
    u, v = _turn(x, y, random.uniform(0, math.pi))
    k = 2 * math.pi * periods * random.uniform(0.9, 1.1)
    a, b = random.uniform(0, 2 * math.pi, 2).tolist()
    if pattern == "stripes":
        return _soft(np.sin(k * u + a))
    if pattern == "checks":
        return _soft(2 * np.sin(k * u + a) * np.sin(k * v + b))
    if pattern == "dots":
        return _soft(np.sin(k * u + a) + np.sin(k * v + b) - 0.7)
    if pattern == "waves":
        return _soft(np.sin(k * u + 2 * np.sin(k / 2 * v + b) + a))
    return _soft(np.sin(k * np.hypot(u - 0.3 * math.cos(a), v - 0.3 * math.sin(a)) + b))


def _soft(wave: _Field) -> _Field:
    """Map a wave around 0 to [0, 1], with soft edges."""
    return np.asarray(1 / (1 + np.exp(-4 * wave)))


def _coloured(amount: _Field, random: np.random.Generator) -> _Field:
    """Map values in [0, 1] to colours between two contrasting random ones: `[H, W]` -> `[H, W, 3]`."""
    ends = [random.uniform(0, 0.45, 3), random.uniform(0.55, 1, 3)]
    first, second = ends if random.random() < 0.5 else ends[::-1]
    return np.asarray(first * (1 - amount[..., None]) + second * amount[..., None])
