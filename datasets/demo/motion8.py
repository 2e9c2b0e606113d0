"""Draw the pictures of the demo data set motion8: a textured shape that moves over a grey background.

- Eight motions in four pairs. Both members of a pair share one path, which the second member plays backwards. No set
  of frames, whatever its size, shows which member it is from. Only the order of the frames does.
- The place of the shape is drawn so that one frame says little about the axis of motion either.
- The shape class, colour, textures, speed, size and place are independent of the motion.

All functions depend on (seed, index) only. They need numpy and no files; `datasets/demo/verb.py` writes the videos.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels, height and width
FRAMES = 16  # T of each clip
RADIUS = (8.0, 13.0)  # pixels; of all motions but grow and shrink
MOTIONS = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "grow", "shrink")
SHAPES = ("circle", "cross", "ring", "bar")  # distinct at a radius of 8 pixels
# Paths are drawn to the right, downwards, clockwise and growing; these are the same paths played backwards.
BACKWARDS = ("left", "up", "counter-clockwise", "shrink")

_MARGIN = 12.0  # pixels between a shape's centre and the border, so that most of it stays in a centre crop of 56


@dataclass(frozen=True)
class Path:
    """Place and size of the shape in each frame: x, y, radius (T,) in pixels."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray


def generator(seed: int, index: int) -> np.random.Generator:
    """Return the random numbers of clip `index`, independent of all other clips and of the order of creation."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))


def labels(count: int, *, seed: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the motion and shape labels of one split, both balanced and independent of each other.

    Walk a grid of the two, in which every motion meets every shape once in 32 clips, then shuffle.

    Returns:
        motion, shape: (count,) int64. If `count` is a multiple of 8, all classes of either have equally many clips.
    """
    k = np.arange(count)
    motion = k % len(MOTIONS)
    shape = (k + k // len(MOTIONS)) % len(SHAPES)

    # No clip has a number this large, so this draw is independent of those of the clips.
    order = np.argsort(generator(seed, 2**40 + split).random(count), kind="stable")
    return motion[order], shape[order]


def draw_path(rng: np.random.Generator, motion: str) -> Path:
    """Draw the path of a motion, always in the forward direction of its pair. The other member plays it backwards."""
    radius = np.full(FRAMES, _between(rng, *RADIUS))

    if motion in ("left", "right"):
        return Path(_line(rng), _standing(rng), radius)
    if motion in ("up", "down"):
        return Path(_standing(rng), _line(rng), radius)

    if motion in ("clockwise", "counter-clockwise"):
        orbit = _between(rng, 12.0, 16.0)
        start = _between(rng, 0.0, 2 * np.pi)
        angle = start + np.linspace(0.0, _between(rng, 1.5 * np.pi, 2.2 * np.pi), FRAMES)

        # The centre of the orbit keeps the whole circle inside of the margin.
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
    # Coordinates of the centres of pixels.
    pixel = np.arange(SIZE) + 0.5
    x = (pixel[None, None, :] - path.x[:, None, None]) / path.radius[:, None, None]  # (T, 1, W), in radii
    y = (pixel[None, :, None] - path.y[:, None, None]) / path.radius[:, None, None]  # (T, H, 1)
    tilt = _between(rng, -0.08, 0.08)  # radians
    x, y = x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)  # (T, H, W)
    # One pixel of anti-aliasing at the outline; the distance is in radii.
    cover = np.clip(0.5 - distance(shape, x, y) * path.radius[:, None, None], 0.0, 1.0)[..., None]  # (T, H, W, 1)

    colour = _saturated(rng)
    stripes = _stripes(rng, x, y)[..., None]
    paint = np.clip(colour * (1.0 - 0.1 * (1.0 + stripes)), 0.0, 1.0)  # (T, H, W, 3)
    picture = (1.0 - cover) * _background(rng)[None] + cover * paint
    return np.rint(picture * 255.0).astype(np.uint8)


def clip(seed: int, index: int, motion: str, shape: str) -> np.ndarray:
    """Return clip `index` of the data set: uint8 (T, H, W, 3) RGB, in playing order."""
    rng = generator(seed, index)
    frames = render(rng, draw_path(rng, motion), shape)
    return frames[::-1] if motion in BACKWARDS else frames


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance to the outline of a shape with a radius of about 1 at the origin; y points down.

    The distance is negative inside. It is exact near straight edges, as anti-aliasing needs, but not elsewhere.
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
    # random() is the only draw whose stream NumPy keeps equal from release to release.
    return low + (high - low) * float(rng.random())


def _line(rng: np.random.Generator) -> np.ndarray:
    """Return a coordinate (T,) that grows at a steady, random speed and stays in the picture."""
    span = _between(rng, 26.0, 38.0)
    start = _between(rng, _MARGIN, SIZE - _MARGIN - span)
    return start + np.linspace(0.0, span, FRAMES)


def _standing(rng: np.random.Generator) -> np.ndarray:
    """Return a coordinate (T,) that rests at a random point of a line, so that one frame cannot show the motion."""
    line = _line(rng)
    return np.full(FRAMES, line[int(rng.random() * FRAMES)])


def _saturated(rng: np.random.Generator) -> np.ndarray:
    """Return a saturated colour (3,) in 0..1 of random hue, always brighter than the background."""
    hue, bright = rng.random(), _between(rng, 0.55, 0.65)
    # From hue to RGB, as in HSV with full saturation and value.
    colour = np.clip(np.abs((hue * 6.0 + np.array([0.0, 4.0, 2.0])) % 6.0 - 3.0) - 1.0, 0.0, 1.0)
    # Add white to dark hues such as blue, until the luma (ITU-R BT.601) is the one that was drawn.
    luma = float(colour @ np.array([0.299, 0.587, 0.114]))
    white = max(0.0, (bright - luma) / (1.0 - luma))
    return colour * (1.0 - white) + white


def _stripes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a wave in -1..1 that is fixed to the shape, so that its inside moves as well."""
    angle, phase, waves = _between(rng, 0.0, np.pi), _between(rng, 0.0, 2 * np.pi), _between(rng, 2.0, 5.0)
    return np.sin(waves * (x * np.cos(angle) + y * np.sin(angle)) + phase)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return a still, nearly grey texture (H, W, 3) in 0..1: random values on a coarse grid, smoothly interpolated."""
    knots = 9
    grid = rng.random((knots, knots, 3)) - 0.5
    grey = grid.mean(axis=2, keepdims=True)

    # Value noise: interpolate the grid in both directions.
    where = np.linspace(0.0, knots - 1.001, SIZE)
    low = where.astype(np.int64)
    part = where - low
    part = part * part * (3.0 - 2.0 * part)  # smoothstep, without edges at the grid points

    texture = 0.12 * grey + 0.02 * grid
    rows = texture[low] * (1.0 - part)[:, None, None] + texture[low + 1] * part[:, None, None]
    smooth = rows[:, low] * (1.0 - part)[None, :, None] + rows[:, low + 1] * part[None, :, None]

    return _between(rng, 0.25, 0.4) + smooth
