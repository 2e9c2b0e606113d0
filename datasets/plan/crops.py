"""Compute boxes and sizes in whole pixels: where each tool crops, and how it rounds.

A box is (x1, y1, x2, y2) with the end excluded, on a frame of `w` x `h` pixels. Random boxes take a fixed number of
uniforms in [0, 1), so that the same draws give the same box everywhere. Tools round differently. Each function follows
the tool in its name, and there is no common formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from utils.errors import UserError

Box = tuple[int, int, int, int]
Size = tuple[int, int]

RANDOM_RESIZED_TRIES = 10  # as MMAction2 and torchvision do
RANDOM_RESIZED_UNIFORMS = 2 * RANDOM_RESIZED_TRIES + 2  # an area and an aspect per try, then x and y


def _at(x: int, y: int, crop_w: int, crop_h: int) -> Box:
    return (x, y, x + crop_w, y + crop_h)


def _check(w: int, h: int, crop: int) -> None:
    if crop > min(w, h):
        raise UserError(f"a crop of {crop} pixels does not fit into a frame of {w}x{h}; crop less or scale it up")


# ---------------------------------------------------------------------------------------------------------------- sizes


def mmaction2_rescale(w: int, h: int, short: int) -> Size:
    """Return (w, h) with the short side at `short`, the long one rounded half up (MMAction2 Resize, (-1, short))."""
    factor = short / min(w, h)
    return int(w * factor + 0.5), int(h * factor + 0.5)


def pyslowfast_short_side(w: int, h: int, short: int) -> Size:
    """Return (w, h) with the short side at `short`, the long one rounded down (PySlowFast, short-side jitter)."""
    if w < h:
        return short, math.floor(h / w * short)
    return math.floor(w / h * short), short


def tsm_group_scale(w: int, h: int, short: int) -> Size:
    """Return (w, h) with the short side at `short`, the long one rounded down (TSN and TSM, GroupScale)."""
    if w < h:
        # Multiply first, unlike PySlowFast: the two can differ by one pixel.
        return short, int(short * h / w)
    return int(short * w / h), short


# --------------------------------------------------------------------------------------------------------- fixed places


def mmaction2_center(w: int, h: int, crop: int) -> Box:
    """Return the centre crop, margins rounded down (MMAction2 CenterCrop; PaddleVideo's without do_round)."""
    _check(w, h, crop)
    return _at((w - crop) // 2, (h - crop) // 2, crop, crop)


def paddle_center(w: int, h: int, crop: int) -> Box:
    """Return the centre crop, margins rounded half to even (PaddleVideo with do_round; torchvision CenterCrop)."""
    _check(w, h, crop)
    return _at(round((w - crop) / 2), round((h - crop) / 2), crop, crop)


def five_places(w: int, h: int, crop: int) -> list[Box]:
    """Return left top, right top, left bottom, right bottom and centre, in quarters of the margin rounded down.

    MMAction2's and PaddleVideo's TenCrop and GroupOverSample of the TSN and TSM repositories use these places.
    """
    _check(w, h, crop)
    return [_at(x, y, crop, crop) for x, y in _offsets(w, h, crop, crop, thirteen=False)]


def mmaction2_three(w: int, h: int, crop: int) -> list[Box]:
    """Return left, right, middle (portrait: top, bottom, middle) of MMAction2's ThreeCrop, in halves rounded down.

    Raises:
        UserError: neither side equals `crop`, which ThreeCrop requires.
    """
    _check(w, h, crop)
    if crop not in (w, h):
        raise UserError(f"three crops of MMAction2 need one side of {crop} pixels, but the frame is {w}x{h}")
    x, y = (w - crop) // 2, (h - crop) // 2
    # One margin is 0, because one side equals `crop`. So twice the half margin moves along the other side only.
    return [_at(0, 0, crop, crop), _at(2 * x, 2 * y, crop, crop), _at(x, y, crop, crop)]


def pyslowfast_uniform(w: int, h: int, crop: int) -> list[Box]:
    """Return PySlowFast's uniform_crop 0, 1, 2: left, centre, right (portrait: top to bottom), centres rounded up."""
    _check(w, h, crop)
    x, y = -(-(w - crop) // 2), -(-(h - crop) // 2)  # ceil
    if h > w:
        return [_at(x, at, crop, crop) for at in (0, y, h - crop)]
    return [_at(at, y, crop, crop) for at in (0, x, w - crop)]


def tsm_fullres(w: int, h: int, crop: int) -> list[Box]:
    """Return the crops of GroupFullResSample of the TSM repository: left, right, centre, even on portrait frames."""
    _check(w, h, crop)
    # Four times the rounded quarter: the right crop may end up to 3 pixels before the edge, as published.
    x, y = (w - crop) // 4, (h - crop) // 4
    return [_at(at, 2 * y, crop, crop) for at in (0, 4 * x, 2 * x)]


def vjepa2_uniform(w: int, h: int, crop: int) -> list[Box]:
    """Return start, middle, end of the long side (V-JEPA 2, EvalVideoTransform). An odd margin leaves out one pixel."""
    _check(w, h, crop)
    x, y = (w - crop) // 2, (h - crop) // 2
    # The larger margin is that of the long side.
    return [_at(x, at, crop, crop) if h > w else _at(at, y, crop, crop) for at in (0, max(x, y), 2 * max(x, y))]


# ------------------------------------------------------------------------------------------------------------- training


def _offsets(w: int, h: int, crop_w: int, crop_h: int, *, thirteen: bool) -> list[tuple[int, int]]:
    """Return the 5 or 13 (x, y) of fixed crops, in quarters of the margins rounded down."""
    x, y = (w - crop_w) // 4, (h - crop_h) // 4
    places = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
    if thirteen:
        places += [(0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    return [(i * x, j * y) for i, j in places]


def _pick(u: float, count: int) -> int:
    """Turn a uniform into an integer in 0..count-1."""
    # `u * count` can round up to `count` for u close to 1.
    return min(int(u * count), count - 1)


def multi_scale_sizes(w: int, h: int, input_size: int, scales: Sequence[float], max_distort: int) -> list[Size]:
    """Return (w, h) of every crop that `multi_scale` chooses from. Repeated sizes are more likely."""
    base = min(w, h)
    # A size within 3 pixels of the network's input becomes it and is not resampled, unless the frame is too small.
    near = [int(base * s) for s in scales]
    sizes = [input_size if abs(s - input_size) < 3 and input_size <= base else s for s in near]

    pairs = range(len(sizes))
    # The distance between the two scales in the list limits the aspect ratio.
    return [(sizes[j], sizes[i]) for i in pairs for j in pairs if abs(i - j) <= max_distort]


def multi_scale(
    w: int,
    h: int,
    u: Sequence[float],
    *,
    input_size: int,
    scales: Sequence[float],
    max_distort: int,
    more_fix_crop: bool,
    fix_crop: bool = True,
) -> Box:
    """Return a box by corner cropping with scale jitter (TSN, ECCV 2016, section 3.2; MMAction2 MultiScaleCrop).

    Args:
        w: width of the frame.
        h: height of the frame.
        u: 3 uniforms: size, place (or x), y.
        input_size: side of the network's input.
        scales: of the short side.
        max_distort: largest distance between width and height in `scales`.
        more_fix_crop: 13 fixed places instead of 5.
        fix_crop: use fixed places, else any place.
    """
    sizes = multi_scale_sizes(w, h, input_size, scales, max_distort)
    crop_w, crop_h = sizes[_pick(u[0], len(sizes))]

    if fix_crop:
        places = _offsets(w, h, crop_w, crop_h, thirteen=more_fix_crop)
        x, y = places[_pick(u[1], len(places))]
    else:
        x, y = _pick(u[1], w - crop_w + 1), _pick(u[2], h - crop_h + 1)

    return _at(x, y, crop_w, crop_h)


def random_resized(
    w: int,
    h: int,
    u: Sequence[float],
    *,
    area: Sequence[float],
    aspect: Sequence[float],
) -> Box:
    """Return an Inception-style crop (Szegedy et al., CVPR 2015, section 6; MMAction2 RandomResizedCrop).

    The area is uniform and the aspect (w / h) log-uniform. After 10 tries that do not fit, it is the central square of
    the short side.

    Args:
        w: width of the frame.
        h: height of the frame.
        u: `RANDOM_RESIZED_UNIFORMS` uniforms: 10 areas, 10 aspects, x, y.
        area: smallest and largest share of the frame.
        aspect: smallest and largest width / height.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for i in range(RANDOM_RESIZED_TRIES):
        # Tries use fixed indices of `u`, so that a failed try does not shift the numbers of the next one.
        pixels = (area[0] + u[i] * (area[1] - area[0])) * w * h
        ratio = math.exp(low + u[RANDOM_RESIZED_TRIES + i] * (high - low))
        crop_w, crop_h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < crop_w <= w and 0 < crop_h <= h:
            return _at(_pick(u[-2], w - crop_w + 1), _pick(u[-1], h - crop_h + 1), crop_w, crop_h)

    # No try fits: the fallback of the published transform.
    side = min(w, h)
    return _at((w - side) // 2, (h - side) // 2, side, side)


def random_crop(w: int, h: int, u: Sequence[float], crop: int) -> Box:
    """Return a square anywhere. `crop` is limited to the short side of a small frame, so that every video can be used.

    Args:
        w: width of the frame.
        h: height of the frame.
        u: 2 uniforms: x, y.
        crop: side in pixels.
    """
    crop = min(crop, w, h)
    return _at(_pick(u[0], w - crop + 1), _pick(u[1], h - crop + 1), crop, crop)


def short_side_jitter(w: int, h: int, u: Sequence[float], *, crop: int, sides: tuple[int, int] = (256, 320)) -> Box:
    """Return PySlowFast's training crop as one box: short side scaled to U(sides), then a random square.

    One resize does both steps. The box is the square mapped back to the source frame and rounded to whole pixels.

    Args:
        w: width of the frame.
        h: height of the frame.
        u: 3 uniforms: short side, x, y.
        crop: side of the square after scaling; at most `sides[0]`.
        sides: smallest and largest short side in pixels.
    """
    short = round(sides[0] + u[0] * (sides[1] - sides[0]))
    scaled_w, scaled_h = pyslowfast_short_side(w, h, short)

    x, y, right, bottom = random_crop(scaled_w, scaled_h, u[1:], crop)
    # Map back to the source frame.
    x, y = round(x * w / scaled_w), round(y * h / scaled_h)
    right, bottom = round(right * w / scaled_w), round(bottom * h / scaled_h)

    # Upscaling a very small frame may round both edges to the same pixel.
    x, y = min(x, w - 1), min(y, h - 1)
    return (x, y, max(right, x + 1), max(bottom, y + 1))


def multi_scale_random(
    w: int,
    h: int,
    u: Sequence[float],
    *,
    crop: int,
    side: int,
    scales: Sequence[float],
    max_distort: int,
    more_fix_crop: bool,
) -> Box:
    """Return PP-TSM's training crop as one box: a multi-scale crop scaled to a square, then a random square of it.

    The short side is scaled to `side` first, as PaddleVideo does, so that sizes are shares of it in whole pixels. One
    resize does all of it. The box is the last square mapped back to the source frame and rounded to whole pixels.

    Args:
        w: width of the frame.
        h: height of the frame.
        u: 5 uniforms: the three of `multi_scale`, x, y.
        crop: side of the last square in pixels; at most `side`.
        side: side of the multi-scale crop after scaling.
        scales: of the short side.
        max_distort: largest distance between width and height in `scales`.
        more_fix_crop: 13 fixed places instead of 5.
    """
    scaled_w, scaled_h = pyslowfast_short_side(w, h, side)
    x1, y1, x2, y2 = multi_scale(
        scaled_w, scaled_h, u, input_size=side, scales=scales, max_distort=max_distort, more_fix_crop=more_fix_crop
    )

    inner = random_crop(side, side, u[3:], crop)

    # Map back: from the square to the multi-scale crop, then to the source frame.
    to_x, to_y = w / scaled_w, h / scaled_h
    x, right = (round((x1 + at / side * (x2 - x1)) * to_x) for at in inner[::2])
    y, bottom = (round((y1 + at / side * (y2 - y1)) * to_y) for at in inner[1::2])
    # Rounding may give an empty box or one past the edge.
    x, y = min(x, w - 1), min(y, h - 1)
    return (x, y, min(max(right, x + 1), w), min(max(bottom, y + 1), h))
