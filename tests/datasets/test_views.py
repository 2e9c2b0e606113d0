"""The views of an evaluation: which frames, boxes and flips, in each tool's order; specs as JSON."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.loading.messages import packed, unpacked
from datasets.plan.metadata import VideoMetadata
from datasets.plan.sampling import Sampling
from datasets.plan.views import EVAL_CROPS, ROUNDINGS, EvalSpec, eval_spec, resolve_eval, view_table
from tests import golden
from utils.errors import MediaError, UserError

TSN8 = Sampling("tsn", 8)
METADATA = VideoMetadata(frames=250, height=256, width=340, fps=30.0)


def test_centre_views() -> None:
    v = resolve_eval(METADATA, EvalSpec(TSN8), 5)
    assert v.sample == 5
    assert v.size == (256, 340)
    assert v.frames.tolist() == [15, 46, 78, 109, 140, 171, 203, 234]
    assert v.clip_rows.tolist() == [list(range(8))]
    assert v.boxes.tolist() == [[58, 16, 282, 240]]
    assert v.flips.tolist() == [False]


def test_ten_crops_of_two_clips_read_each_frame_once() -> None:
    v = resolve_eval(VideoMetadata(9, 480, 640, 30.0), EvalSpec(TSN8, 2, "ten"), 0)
    assert v.size == (256, 341)
    assert v.frames.tolist() == sorted(set(v.frames.tolist()))
    assert len(v.frames) <= 9
    assert v.clip_rows.shape == (20, 8)
    assert v.boxes.shape == (20, 4)
    assert v.flips.tolist() == [False, True] * 10
    clips = v.frames[v.clip_rows]
    assert clips[:10].tolist() == [[0, 1, 2, 3, 5, 6, 7, 8]] * 10
    assert clips[10:].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] * 10
    assert v.boxes[:10].tolist() == v.boxes[10:].tolist()
    assert v.boxes[0].tolist() == v.boxes[1].tolist() == [0, 0, 224, 224]
    assert v.boxes[9].tolist() == [58, 16, 282, 240]


def test_thirty_views() -> None:
    spec = EvalSpec(Sampling("mmaction2_1x", 1, 8, 8), 10, "three", 256, 256)
    v = resolve_eval(VideoMetadata(300, 720, 1280, 30.0), spec, 0)
    assert v.clip_rows.shape == (30, 8)
    assert v.boxes[:3].tolist() == [[0, 0, 256, 256], [99, 0, 355, 256], [199, 0, 455, 256]]
    portrait = resolve_eval(VideoMetadata(300, 1280, 720, 30.0), spec, 0)
    assert portrait.boxes[:3, 1].tolist() == [0, 99, 199]


@settings(deadline=None)
@given(
    frames=st.integers(1, 300),
    w=st.integers(16, 900),
    h=st.integers(16, 900),
    views=st.sampled_from(sorted(EVAL_CROPS)),
)
def test_views_stay_inside(frames: int, w: int, h: int, views: str) -> None:
    scale = 112 if EVAL_CROPS[views].whole_side else 128
    v = resolve_eval(VideoMetadata(frames, h, w, 30.0), EvalSpec(TSN8, 1, views, scale, 112), 0)
    height, width = v.size
    assert v.clip_rows.max() < len(v.frames)
    assert v.frames.max() < frames
    assert (v.boxes[:, :2] >= 0).all()
    assert (v.boxes[:, 2] <= width).all()
    assert (v.boxes[:, 3] <= height).all()
    assert ((v.boxes[:, 2:] - v.boxes[:, :2]) == 112).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EvalSpec(TSN8, 1, "centre", 200, 224), "crop of 224 pixels does not fit .* 200"),
        (lambda: EvalSpec(TSN8, 1, "nine"), "unknown views 'nine'"),
        (lambda: EvalSpec(TSN8, 3), "at most 2"),
        (lambda: EvalSpec(TSN8, 1, "three_mmaction2", 256, 224), "224 is not 256"),
        (lambda: EvalSpec(TSN8, rounding="up"), "'up' is not one of"),
    ],
)
def test_refused_views(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_nothing_to_show_is_bad_media() -> None:
    with pytest.raises(MediaError):
        resolve_eval(VideoMetadata(10, 0, 0, 30.0), EvalSpec(TSN8), 0)


def test_views_travel_between_processes() -> None:
    spec = EvalSpec(Sampling("mmaction2_1x", 1, 8, 8), 10, "three_mmaction2", 256, 256, "tsm")
    assert unpacked(packed(spec)) == spec


def test_every_tool_has_its_crops_and_sizes() -> None:
    """The rules under the names that protocols use, against the tools' own boxes; flips where the tool mirrors."""
    names = {
        "mma_center": "centre",
        "psf_uniform": "three_pyslowfast",
        "tsm_fullres": "three_tsm",
        "mma_three": "three_mmaction2",
    }
    for row in golden.rows("crop_boxes"):
        for column, crops in names.items():
            if row[column] is not None:
                views = EVAL_CROPS[crops].views(row["w"], row["h"], row["crop"])
                assert [list(box) for _, box, _ in views] == row[column], (column, row["w"], row["h"])
        ten = EVAL_CROPS["ten"].views(row["w"], row["h"], row["crop"])
        assert [list(box) for _, box, _ in ten] == row["mma_ten"]
    for row in golden.rows("paddle_crop_boxes"):
        for column, crops in (("ten", "ten"), ("center_round", "centre_tsm"), ("center_floor", "centre")):
            views = EVAL_CROPS[crops].views(row["w"], row["h"], row["crop"])
            assert [[*box, flip] for _, box, flip in views] == row[column]
    for row in golden.rows("resize_sizes"):
        for column, rounding in (
            ("mma_rescale", "mmaction2"),
            ("psf_short_side", "pyslowfast"),
            ("tsm_group_scale", "tsm"),
        ):
            assert list(ROUNDINGS[rounding](row["w"], row["h"], row["scale"])) == row[column]


def test_the_table_of_views_says_what_the_plan_shows() -> None:
    for crops, scale in (("ten", 256), ("three_mmaction2", 224), ("centre", 256)):
        spec = EvalSpec(TSN8, 2, crops, scale)
        plan = resolve_eval(METADATA, spec, 0)
        table = view_table(spec, plan.boxes)
        assert len(table) == spec.views == len(plan.boxes)
        assert [row["flip"] for row in table] == plan.flips.tolist()
        assert [row["box"] for row in table] == plan.boxes.tolist()
        assert [row["clip"] for row in table] == sorted([0, 1] * spec.crops_per_clip)
    assert view_table(EvalSpec(TSN8, 1, "three", 224), None)[2] == {
        "clip": 0, "crop": 2, "place": "right or bottom", "box": None, "flip": False,
    }  # fmt: skip


def test_views_of_a_config() -> None:
    cfg = SimpleNamespace(
        augmentation=SimpleNamespace(input_size=224, test_resize=256),
        data=SimpleNamespace(sampling="one_per_segment", clip_len=1, frame_interval=1),
        model=SimpleNamespace(num_segments=3),
        val_dense=False,
    )
    assert eval_spec(cfg) == EvalSpec(Sampling("one_per_segment", 3), 1, "centre", 256, 224)
    assert eval_spec(cfg, "ten").crops == "ten"
    cfg.val_dense = True
    assert eval_spec(cfg).crops == "ten"
    assert len(resolve_eval(METADATA, eval_spec(cfg), 0).boxes) == 10
