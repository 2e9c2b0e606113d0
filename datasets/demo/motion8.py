"""The pictures of the demo data set motion8: a textured shape that moves over a grey background.

What is special:

- Eight motions in four pairs. A pair shares one path: the second member plays the same frames backwards, so no set of
  frames, whatever its size, says which member it came from. Only their order does.
- Where the shape stands is drawn so that one frame says little about the axis of motion either.
- The shape class, colour, textures, speed, size and place are independent of the motion.

Pure functions of (seed, index); numpy only, no files. `datasets/demo/verb.py` writes the videos.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels, height and width
FRAMES = 16
RADIUS = (8.0, 13.0)  # pixels; of all motions but grow and shrink
MOTIONS = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "grow", "shrink")
SHAPES = ("circle", "cross", "ring", "bar")  # told apart at a radius of 8 pixels
# Paths are drawn to the right, downwards, clockwise and growing; these are the same paths played backwards.
BACKWARDS = ("left", "up", "counter-clockwise", "shrink")

_MARGIN = 12.0  # pixels between a shape's centre and the border, so that most of it stays in a centre crop of 56


@dataclass(frozen=True)
class Path:
    """Where the shape is and how big, frame by frame: x, y, radius (T,) in pixels."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray


def generator(seed: int, index: int) -> np.random.Generator:
    """The random numbers of clip `index`; independent of all other clips and of the order in which they are made."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))


def labels(count: int, *, seed: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Motion and shape labels of one split: both balanced, and independent of each other.

    Walks a grid of the two (every motion meets every shape once in 32 clips), then shuffles.

    Returns:
        motion, shape: (count,) int64. Where `count` is a multiple of 8 all classes of either have equally many clips.
    """
    k = np.arange(count)
    motion = k % len(MOTIONS)
    shape = (k + k // len(MOTIONS)) % len(SHAPES)
    # A number no clip index reaches keeps this draw apart from those of the clips.
    order = np.argsort(generator(seed, 2**40 + split).random(count), kind="stable")
    return motion[order], shape[order]


def draw_path(rng: np.random.Generator, motion: str) -> Path:
    """Draw the path of a motion, always in the pair's forward direction: play it backwards for the other member."""
    radius = np.full(FRAMES, _between(rng, *RADIUS))
    if motion in ("left", "right"):
        return Path(_line(rng), _standing(rng), radius)
    if motion in ("up", "down"):
        return Path(_standing(rng), _line(rng), radius)
    if motion in ("clockwise", "counter-clockwise"):
        orbit = _between(rng, 12.0, 16.0)
        start = _between(rng, 0.0, 2 * np.pi)
        angle = start + np.linspace(0.0, _between(rng, 1.5 * np.pi, 2.2 * np.pi), FRAMES)
        room = (_MARGIN + orbit, SIZE - _MARGIN - orbit)
        x, y = _between(rng, *room), _between(rng, *room)
        # y points down in a picture, so a growing angle turns clockwise.
        return Path(x + orbit * np.cos(angle), y + orbit * np.sin(angle), radius)
    middle, change = _between(rng, 9.5, 11.5), _between(rng, 4.5, 6.5)
    return Path(_standing(rng), _standing(rng), np.linspace(middle - change, middle + change, FRAMES))


def render(rng: np.random.Generator, path: Path, shape: str) -> np.ndarray:
    """Paint the shape along a path.

    Returns:
        uint8 (T, H, W, 3) RGB, T in the order of the path.
    """
    pixel = np.arange(SIZE) + 0.5
    x = (pixel[None, None, :] - path.x[:, None, None]) / path.radius[:, None, None]  # (T, 1, W), in radii
    y = (pixel[None, :, None] - path.y[:, None, None]) / path.radius[:, None, None]  # (T, H, 1)
    tilt = _between(rng, -0.08, 0.08)  # radians
    x, y = x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)  # (T, H, W)
    cover = np.clip(0.5 - distance(shape, x, y) * path.radius[:, None, None], 0.0, 1.0)[..., None]  # (T, H, W, 1)
    colour = _saturated(rng)
    stripes = _stripes(rng, x, y)[..., None]
    paint = np.clip(colour * (1.0 - 0.1 * (1.0 + stripes)), 0.0, 1.0)  # (T, H, W, 3)
    picture = (1.0 - cover) * _background(rng)[None] + cover * paint
    return np.rint(picture * 255.0).astype(np.uint8)


def clip(seed: int, index: int, motion: str, shape: str) -> np.ndarray:
    """Clip `index` of the data set: uint8 (T, H, W, 3) RGB, in playing order."""
    rng = generator(seed, index)
    frames = render(rng, draw_path(rng, motion), shape)
    return frames[::-1] if motion in BACKWARDS else frames


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of radius about 1 at the origin; negative inside, y points down.

    Exact near straight edges, which is what anti-aliasing needs; not an exact distance elsewhere.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.85) - 0.22
    if shape == "bar":
        return np.maximum(ax - 1.25, ay - 0.36)
    if shape == "cross":
        return np.minimum(np.maximum(ax - 1.15, ay - 0.3), np.maximum(ax - 0.3, ay - 1.15))
    raise ValueError(f"unknown shape {shape!r}")


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    # random() is the one draw whose stream NumPy keeps the same from release to release.
    return low + (high - low) * float(rng.random())


def _line(rng: np.random.Generator) -> np.ndarray:
    """A coordinate (T,) that grows at a steady, random speed and stays in the picture."""
    span = _between(rng, 26.0, 38.0)
    start = _between(rng, _MARGIN, SIZE - _MARGIN - span)
    return start + np.linspace(0.0, span, FRAMES)


def _standing(rng: np.random.Generator) -> np.ndarray:
    """A coordinate (T,) that rests at a random point of a line: in one frame it looks like a moving one."""
    line = _line(rng)
    return np.full(FRAMES, line[int(rng.random() * FRAMES)])


def _saturated(rng: np.random.Generator) -> np.ndarray:
    """A saturated colour (3,) in 0..1 of random hue, always brighter than the background."""
    hue, bright = rng.random(), _between(rng, 0.55, 0.65)
    colour = np.clip(np.abs((hue * 6.0 + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
    # White is added to dark hues such as blue, until the luma (ITU-R BT.601) is the one drawn.
    luma = float(colour @ np.array([0.299, 0.587, 0.114]))
    white = max(0.0, (bright - luma) / (1.0 - luma))
    return colour * (1.0 - white) + white


def _stripes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A wave in -1..1 fixed to the shape, so that its inside moves as well."""
    angle, phase, waves = _between(rng, 0.0, np.pi), _between(rng, 0.0, 2 * np.pi), _between(rng, 2.0, 5.0)
    return np.sin(waves * (x * np.cos(angle) + y * np.sin(angle)) + phase)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A still, nearly grey texture (H, W, 3) in 0..1: random values on a coarse grid, smoothly joined."""
    knots = 9
    grid = rng.random((knots, knots, 3)) - 0.5
    grey = grid.mean(axis=2, keepdims=True)
    where = np.linspace(0.0, knots - 1.001, SIZE)
    low = where.astype(np.int64)
    part = where - low
    part = part * part * (3.0 - 2.0 * part)
    texture = 0.12 * grey + 0.02 * grid
    rows = texture[low] * (1.0 - part)[:, None, None] + texture[low + 1] * part[:, None, None]
    smooth = rows[:, low] * (1.0 - part)[None, :, None] + rows[:, low + 1] * part[None, :, None]
    return _between(rng, 0.25, 0.4) + smooth
