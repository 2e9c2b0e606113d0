"""Boxes and sizes: every golden row of the peers, and what must hold for all frames."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.plan import crops
from tests import golden
from utils.errors import UserError

BELOW_ONE = float(np.nextafter(1.0, 0.0))
SIDES = st.integers(1, 2000)
SCALES = {"scales": (1, 0.875, 0.75, 0.66), "max_distort": 1}  # of TSN
WHOLE, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of Inception
UNIFORMS = st.lists(st.floats(0, BELOW_ONE), min_size=22, max_size=22)


def as_lists(boxes: list[crops.Box]) -> list[list[int]]:
    return [list(box) for box in boxes]


def inside(box: crops.Box, w: int, h: int) -> bool:
    x1, y1, x2, y2 = box
    return all(isinstance(v, int) for v in box) and 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h


def test_crop_rows() -> None:
    for row in golden.rows("crop_boxes"):
        w, h, crop = row["w"], row["h"], row["crop"]
        five = as_lists(crops.five_places(w, h, crop))
        assert [list(crops.mmaction2_center(w, h, crop))] == row["mma_center"]
        assert [box for box in five for _ in range(2)] == row["mma_ten"]
        assert five == row["tsm_oversample"]
        assert as_lists(crops.pyslowfast_uniform(w, h, crop)) == row["psf_uniform"]
        assert as_lists(crops.tsm_fullres(w, h, crop)) == row["tsm_fullres"]
        if row["mma_three"] is None:
            with pytest.raises(UserError, match="need one side"):
                crops.mmaction2_three(w, h, crop)
        else:
            assert as_lists(crops.mmaction2_three(w, h, crop)) == row["mma_three"]


def test_paddle_rows() -> None:
    for row in golden.rows("paddle_crop_boxes"):
        w, h, crop = row["w"], row["h"], row["crop"]
        ten = [[*box, flip] for box in crops.five_places(w, h, crop) for flip in (False, True)]
        assert ten == row["ten"]
        assert [[*crops.paddle_center(w, h, crop), False]] == row["center_round"]
        assert [[*crops.mmaction2_center(w, h, crop), False]] == row["center_floor"]


def test_resize_rows() -> None:
    for row in golden.rows("resize_sizes"):
        rules = {
            "mma_rescale": crops.mmaction2_rescale,
            "psf_short_side": crops.pyslowfast_short_side,
            "tsm_group_scale": crops.tsm_group_scale,
        }
        for name, rule in rules.items():
            assert list(rule(row["w"], row["h"], row["scale"])) == row[name], (name, row)


def test_multi_scale_support() -> None:
    grid = (np.arange(64) + 0.5) / 64  # finer than 13 places and 10 sizes
    for row in golden.rows("mma_multiscale_crop_support"):
        settings = {
            "input_size": row["input_size"],
            "scales": row["scales"],
            "max_distort": row["max_wh_scale_gap"],
            "more_fix_crop": row.get("num_fixed_crops", 5) == 13,
            "fix_crop": not row["random_crop"],
        }
        boxes = {crops.multi_scale(row["w"], row["h"], (a, b, 0.0), **settings) for a in grid for b in grid}
        assert sorted(boxes) == sorted(tuple(box) for box in row["boxes"]), settings


def test_multi_scale_does_not_snap_beyond_the_frame() -> None:
    # 222 is within 3 pixels of 224, but the frame has only 222.
    sizes = crops.multi_scale_sizes(300, 222, 224, (1, 0.875), 1)
    assert max(max(size) for size in sizes) == 222
    assert crops.multi_scale_sizes(300, 226, 224, (1,), 0) == [(224, 224)]
    assert crops.multi_scale_sizes(300, 227, 224, (1,), 0) == [(227, 227)]


@settings(deadline=None)
@given(w=st.integers(2, 2000), h=st.integers(2, 2000), u=UNIFORMS, fix=st.booleans(), more=st.booleans())
def test_random_boxes_stay_inside(w: int, h: int, u: list[float], fix: bool, more: bool) -> None:
    assert inside(crops.multi_scale(w, h, u, input_size=224, more_fix_crop=more, fix_crop=fix, **SCALES), w, h)
    assert inside(crops.random_resized(w, h, u, area=WHOLE, aspect=ASPECT), w, h)
    assert inside(crops.random_crop(w, h, u, 224), w, h)
    assert inside(crops.short_side_jitter(w, h, u, crop=224), w, h)


@settings(deadline=None)
@given(w=SIDES, h=SIDES, crop=SIDES)
def test_fixed_boxes_stay_inside_or_refuse(w: int, h: int, crop: int) -> None:
    makers = [crops.five_places, crops.pyslowfast_uniform, crops.tsm_fullres, lambda *a: [crops.mmaction2_center(*a)]]
    for make in makers:
        if crop > min(w, h):
            with pytest.raises(UserError, match="does not fit"):
                make(w, h, crop)
        else:
            for box in make(w, h, crop):
                assert inside(box, w, h)
                assert (box[2] - box[0], box[3] - box[1]) == (crop, crop)


@settings(deadline=None)
@given(w=SIDES, h=SIDES, short=st.integers(1, 512))
def test_scaled_short_side_is_exact(w: int, h: int, short: int) -> None:
    for scale in (crops.mmaction2_rescale, crops.pyslowfast_short_side, crops.tsm_group_scale):
        assert min(scale(w, h, short)) == short


def test_random_resized_statistics() -> None:
    """Area and log-aspect are uniform where the first try always fits."""
    rng = np.random.default_rng(0)
    got = [
        crops.random_resized(1000, 1000, rng.random(22).tolist(), area=(0.1, 0.5), aspect=ASPECT) for _ in range(4000)
    ]
    sides = np.array([(x2 - x1, y2 - y1) for x1, y1, x2, y2 in got], float)
    area = sides.prod(1) / 1e6
    aspect = np.log(sides[:, 0] / sides[:, 1])
    assert area.min() >= 0.0995
    assert area.max() <= 0.5005
    assert area.mean() == pytest.approx(0.3, abs=0.008)
    assert aspect.mean() == pytest.approx(0.0, abs=0.012)
    assert np.abs(aspect).max() <= math.log(4 / 3) + 0.01
    assert aspect.std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.05)


def test_random_resized_falls_back_to_the_central_square() -> None:
    # On a strip of 20:1 a box of nearly the whole area cannot have an aspect near 1.
    assert crops.random_resized(2000, 100, [0.99] * 22, area=(0.9, 1.0), aspect=ASPECT) == (950, 0, 1050, 100)


def test_random_crop_reaches_both_ends_and_small_frames() -> None:
    assert crops.random_crop(340, 256, (0.0, 0.0), 224) == (0, 0, 224, 224)
    assert crops.random_crop(340, 256, (BELOW_ONE, BELOW_ONE), 224) == (116, 32, 340, 256)
    assert crops.random_crop(340, 100, (0.0, BELOW_ONE), 224) == (0, 0, 100, 100)


def test_short_side_jitter_is_the_square_mapped_back() -> None:
    # 320x240 scaled by 256 / 240: a 224 square is 210 source pixels wide.
    assert crops.short_side_jitter(320, 240, (0.0, 0.0, 0.0), crop=224) == (0, 0, 210, 210)
    assert crops.short_side_jitter(320, 240, (0.0, BELOW_ONE, BELOW_ONE), crop=224) == (110, 30, 320, 240)
    # At 320 it is 168.
    assert crops.short_side_jitter(320, 240, (BELOW_ONE, 0.0, 0.0), crop=224) == (0, 0, 168, 168)


def test_multi_scale_random_is_the_inner_square_mapped_back() -> None:
    """PP-TSM on 512x512 (twice its 256): sizes 512, 448, 336 (168 of 256) or 384; 224 of 256 in each of them."""
    place = 4.5 / 13  # the centre
    whole = crops.multi_scale_random(
        512, 512, (0.0, place, 0.0, 0.0, 0.0), crop=224, side=256, more_fix_crop=True, **SCALES
    )
    assert whole == (0, 0, 448, 448)
    last = crops.multi_scale_random(
        512, 512, (0.0, place, 0.0, BELOW_ONE, BELOW_ONE), crop=224, side=256, more_fix_crop=True, **SCALES
    )
    assert last == (64, 64, 512, 512)
    # The last of the ten pairs is 168 x 168, in the middle at 44: on the source 336 from 88; 224 of its 256 is 294.
    small = crops.multi_scale_random(
        512, 512, (BELOW_ONE, place, 0.0, 0.0, 0.0), crop=224, side=256, more_fix_crop=True, **SCALES
    )
    assert small == (88, 88, 382, 382)


def test_multi_scale_random_takes_any_frame() -> None:
    rng = np.random.default_rng(1)
    for w, h in ((1, 1), (2, 300), (300, 2), (340, 256), (1920, 1080)):
        for _ in range(200):
            assert inside(
                crops.multi_scale_random(
                    w, h, rng.random(22).tolist(), crop=224, side=256, more_fix_crop=True, **SCALES
                ),
                w,
                h,
            )
