"""Pictures with visible structure: a textured shape on a textured ground, ten classes.

A class is the pair of textures: five for the shape, two for the ground. Shape, place, size, angle, tints and phases vary
and say nothing about it, so that raw pixels help little.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maekit.images import Pixels

SHAPES = ("disc", "ring", "square", "triangle", "cross")
TEXTURES = ("stripes", "checks", "dots", "waves", "speckle")
GROUNDS = ("clouds", "weave")
CLASSES = tuple(f"{texture}-on-{ground}" for texture in TEXTURES for ground in GROUNDS)

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
    texture, _, ground_name = name.partition("-on-")
    shape = SHAPES[int(random.integers(len(SHAPES)))]
    y, x = np.mgrid[:size, :size] / size - 0.5
    ground = _tinted(_ground(ground_name, x, y, random), random)
    radius = random.uniform(0.32, 0.42)
    reach = 0.5 - radius
    centre_x, centre_y = random.uniform(-reach, reach, 2)
    angle = random.uniform(0, 2 * math.pi)
    u, v = _turn((x - centre_x) / radius, (y - centre_y) / radius, angle)
    inside = 1 / (1 + np.exp(_distance(shape, u, v) * radius * size * 2))  # one pixel of soft edge
    figure = _tinted(_texture(texture, x, y, random), random)
    pixels = ground * (1 - inside[..., None]) + figure * inside[..., None]
    pixels += random.normal(0, 0.02, pixels.shape)
    return (pixels.clip(0, 1) * 255).astype(np.uint8)


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
        return np.maximum.reduce([-v - 0.5, 0.866 * u + 0.5 * v - 0.5, -0.866 * u + 0.5 * v - 0.5])
    arms = np.minimum(np.maximum(np.abs(u) - 1, np.abs(v) - 0.3), np.maximum(np.abs(v) - 1, np.abs(u) - 0.3))
    return np.asarray(arms)


def _tinted(amount: _Field, random: np.random.Generator) -> _Field:
    """Return amounts in [0, 1] as colours between a dark and a light grey with a random tint: `[H, W]` -> `[H, W, 3]`."""
    dark, light = 0.2 + random.uniform(-0.12, 0.12, 3), 0.8 + random.uniform(-0.12, 0.12, 3)
    return dark * (1 - amount[..., None]) + light * amount[..., None]


def _texture(texture: str, x: _Field, y: _Field, random: np.random.Generator) -> _Field:
    """Return amounts in [0, 1]."""
    u, v = _turn(x, y, random.uniform(0, math.pi))
    frequency = 2 * math.pi * random.uniform(8, 10)
    a, b = random.uniform(0, 2 * math.pi, 2)
    if texture == "stripes":
        wave = np.sin(u * frequency + a)
    elif texture == "checks":
        wave = np.sin(u * frequency + a) * np.sin(v * frequency + b)
    elif texture == "dots":
        wave = np.sin(u * frequency + a) + np.sin(v * frequency + b) - 1
    elif texture == "waves":
        wave = np.sin(u * frequency + 2.5 * np.sin(v * frequency / 2 + b) + a)
    else:
        wave = _smooth(random.normal(size=x.shape)) * 3
    return np.asarray(1 / (1 + np.exp(-5 * wave)))


def _ground(ground: str, x: _Field, y: _Field, random: np.random.Generator) -> _Field:
    """Return amounts in [0, 1]."""
    if ground == "weave":
        u, v = _turn(x, y, random.uniform(0, math.pi))
        a, b = random.uniform(0, 2 * math.pi, 2)
        frequency = 2 * math.pi * random.uniform(14, 18)
        return np.asarray(0.5 + 0.25 * (np.sin(u * frequency + a) + np.sin(v * frequency + b)))
    wave = np.zeros_like(x)
    for _ in range(4):
        u, _v = _turn(x, y, random.uniform(0, 2 * math.pi))
        wave += np.sin(u * 2 * math.pi * random.uniform(0.5, 3) + random.uniform(0, 2 * math.pi))
    return np.asarray(1 / (1 + np.exp(-wave)))


def _smooth(noise: _Field) -> _Field:
    """Return noise averaged over 3 x 3 pixels, at unit variance."""
    total = sum(np.roll(noise, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1))
    return np.asarray(total) / 3
