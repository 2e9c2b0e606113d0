"""Frame indices: every golden row of the peers, and what must hold for all videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.plan import rules
from datasets.plan.sampling import PRESETS, Sampling, check_clips, test_frames, train_frames
from tests import golden
from utils.errors import UserError

BELOW_ONE = float(np.nextafter(1.0, 0.0))


def test_mm1_test_rows() -> None:
    for row in golden.rows("mma_sample_frames_test"):
        got = rules.mmaction2_1x_test(
            row["num_frames"],
            row["num_clips"],
            row["clip_len"],
            row["frame_interval"],
            twice=row.get("twice_sample", False),
            out_of_bound=row.get("out_of_bound_opt", "loop"),
            target_fps=row.get("target_fps"),
            fps=row.get("fps", 0.0),
        )
        assert got.reshape(-1).tolist() == row["inds"], {k: v for k, v in row.items() if k != "inds"}


def test_dense_rows() -> None:
    for row in golden.rows("mma_dense_sample_frames_test"):
        got = rules.tsm_dense_test(row["num_frames"], row["num_clips"], row["positions"])
        assert got.reshape(-1).tolist() == row["inds"], row


def test_uniform_rows() -> None:
    for row in golden.rows("mma_uniform_sample_test"):
        got = rules.mmaction2_uniform_test(row["num_frames"], row["clip_len"], row["num_clips"])
        assert got.reshape(-1).tolist() == row["inds"], row


def test_pysf_rows() -> None:
    for row in golden.rows("psf_temporal_test"):
        got = rules.pyslowfast_test(
            row["video_frames"],
            row["num_frames_out"],
            row["sampling_rate"],
            row["fps"],
            views=row["views"],
            target_fps=row["target_fps"],
            use_offset=row["use_offset"],
        )
        assert got.tolist() == row["inds"], {k: v for k, v in row.items() if k != "inds"}


def test_tsm_rows() -> None:
    for row in golden.rows("tsm_orig_indices"):
        n, s = row["num_frames"], row["num_segments"]
        assert rules.tsn_val(n, s).tolist() == row["val"], row
        assert rules.tsm_test(n, s).tolist() == row["test"], row
        assert rules.tsm_test(n, s, twice=True).tolist() == row["test_twice"], row
        assert rules.tsm_dense_test(n, s).reshape(-1).tolist() == row["test_dense"], row


def test_paddle_rows() -> None:
    for row in golden.rows("paddle_sampler_valid"):
        n, s = row["num_frames"], row["num_seg"]
        if row.get("select_left"):
            got = rules.pp_tsn_valid(n, s)
        elif row.get("dense_sample"):
            got = rules.tsm_dense_test(n, s).reshape(-1)
            assert (got + 1).tolist() == row["video"], row  # published 1-based in both columns
            assert (got + 1).tolist() == row["frame"], row
            continue
        elif row.get("linspace_sample"):
            got = rules.pp_linspace(n, s)
        else:
            got = rules.pp_tsm_valid(n, s)
        assert (got % n).tolist() == row["video"], row
        assert (got + 1).tolist() == row["frame"], row


def test_mm_train_support() -> None:
    rng = np.random.default_rng(0)
    for row in golden.rows("mma_sample_frames_train_support"):
        n, clips, length, interval = row["num_frames"], row["num_clips"], row["clip_len"], row["frame_interval"]
        keep = row.get("keep_tail_frames", False)
        draws = 3000
        got = np.array(
            [
                rules.mmaction2_train(n, clips, length, interval, rng.random(clips), keep_tail=keep).reshape(-1)
                for _ in range(draws)
            ]
        )
        assert got.min(0).tolist() == row["lo"], row
        assert got.max(0).tolist() == row["hi"], row
        error = got.std(0) * np.sqrt(1 / draws + 1 / row["draws"])
        assert np.all(np.abs(got.mean(0) - row["mean"]) <= 4 * error + 0.006), row  # means are rounded to 0.01


@pytest.mark.parametrize(("n", "expected"), [(1, [0, 0, 0]), (3, [0, 0, 0]), (4, [0, 1, 1]), (30, [4, 14, 23])])
def test_one_per_segment_validation_uses_its_own_tick(n: int, expected: list[int]) -> None:
    # n = 30: tick = 28 / 3, so 4.67, 14.0, 23.33; the TSN repository would give 5, 15, 25.
    assert rules.one_per_segment_val(n, 3).tolist() == expected


def test_tsn_train_covers_each_segment_and_nothing_else() -> None:
    low, high = np.zeros(3), np.full(3, BELOW_ONE)
    assert rules.tsn_train(31, 3, low).tolist() == [0, 10, 20]
    assert rules.tsn_train(31, 3, high).tolist() == [9, 19, 29]
    assert rules.tsn_train(2, 3, high).tolist() == [0, 0, 0]
    # five frames per segment (flow stacks): d = (31 - 5 + 1) // 3 = 9
    assert rules.tsn_train(31, 3, high, 5).tolist() == [8, 9, 10, 11, 12, 17, 18, 19, 20, 21, 26, 27, 28, 29, 30]


def test_tsn_train_between_is_sorted_draws() -> None:
    # n - L + 1 = 3 gives no whole segment of 4, and n = 7 > 4
    got = rules.tsn_train(7, 4, np.array([0.9, 0.0, 0.5, 0.4]), 5).reshape(4, 5)
    assert got[:, 0].tolist() == [0, 1, 1, 2]


def test_dense_train_never_draws_the_last_window() -> None:
    assert rules.tsm_dense_train(64, 8, BELOW_ONE).tolist() == list(range(0, 64, 8))
    assert rules.tsm_dense_train(100, 8, BELOW_ONE)[0] == 35  # starts 0..35; 36 = n - 64 is left out, as published
    assert rules.tsm_dense_train(20, 8, 0.7).tolist() == [0, 8, 16, 4, 12, 0, 8, 16]


def test_mm0_and_mm1_differ_in_test() -> None:
    assert rules.mmaction2_0x_test(100, 1, 8, 8).tolist() == [list(range(18, 81, 8))]
    assert rules.mmaction2_1x_test(100, 1, 8, 8).tolist() == [list(range(21, 84, 8))]
    assert rules.mmaction2_0x_test(40, 1, 8, 8)[0, 0] == 0  # shorter than 64 frames: from 0, modulo n


def test_pp_variants() -> None:
    assert rules.pp_tsm_train(30, 3, np.full(3, BELOW_ONE)).tolist() == [9, 19, 29]
    assert train_frames(Sampling("pp_tsm", 8), 5, 0, np.full(8, 0.5)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert train_frames(Sampling("pp", 8), 5, 0, np.full(8, 0.5)).tolist() == [0] * 8


SETTINGS = [
    Sampling("tsn", 8),
    Sampling("tsn", 3, 5),
    Sampling("tsm_dense", 8),
    Sampling("mmaction2_0x", 8),
    Sampling("mmaction2_0x", 1, 32, 2),
    Sampling("mmaction2_1x", 8),
    Sampling("mmaction2_1x", 3, 4, 4),
    Sampling("mmaction2_1x", 1, 8, 8),
    Sampling("pyslowfast", 1, 8, 8),
    Sampling("pyslowfast", 1, 1, 1),
    Sampling("videomae", 1, 16, 4),
    Sampling("videomae", 1, 2, 1),
    Sampling("vjepa2", 1, 16, 4),
    Sampling("vjepa2", 1, 2, 3),
    Sampling("pp", 7),
    Sampling("pp_tsm", 8),
    Sampling("one_per_segment", 3),
]


def test_settings_cover_all_presets() -> None:
    assert {s.preset for s in SETTINGS} == set(PRESETS)


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_every_length_stays_in_range(s: Sampling) -> None:
    count = s.num_segments
    rng = np.random.default_rng(1)
    for n in range(1, 201):
        for u in (np.zeros(count), np.full(count, BELOW_ONE), rng.random(count)):
            frames = train_frames(s, n, 29.97, u)
            assert frames.shape == (s.frames_per_clip,)
            assert frames.dtype == np.int64
            assert frames.min() >= 0
            assert frames.max() < n
        for clips in (1, 2, 10):
            try:
                check_clips(s, clips)
            except UserError:
                continue
            frames = test_frames(s, n, 29.97, clips)
            assert frames.shape == (clips, s.frames_per_clip)
            assert frames.dtype == np.int64
            assert frames.min() >= 0
            assert frames.max() < n


@settings(deadline=None)
@given(
    s=st.sampled_from(SETTINGS),
    n=st.integers(1, 5000),
    fps=st.sampled_from([0.0, 1.0, 15.0, 60.0]),
    seed=st.integers(0),
)
def test_any_draw_stays_in_range(s: Sampling, n: int, fps: float, seed: int) -> None:
    u = np.random.default_rng(seed).random(s.num_segments)
    for frames in (train_frames(s, n, fps, u), test_frames(s, n, fps)):
        assert frames.min() >= 0
        assert frames.max() < n


def test_videomae_dense_clips() -> None:
    """By hand from kinetics.py: 64 of 100 frames; 16 x 4 of 100; 3 of every 4th frame of a short video."""
    # The last start that can be drawn is 35 (numpy.random.randint leaves its end out), linspace includes frame 64.
    first, last = (rules.videomae_train(100, 16, 4, u) for u in (0.0, BELOW_ONE))
    assert first.tolist() == [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    assert last.tolist() == [35 + frame for frame in first.tolist()]
    assert rules.videomae_train(10, 4, 4, 0.3).tolist() == [0, 9, 9, 9]  # linspace(0, 10, 2), then the last frame
    assert rules.videomae_train(3, 4, 4, 0.3).tolist() == [2, 2, 2, 2]  # no 4th frame at all: the last one
    clips = rules.videomae_test(300, 16, 4, views=5)  # 75 frames, windows of 16 from 0, 14.75, 29.5, 44.25 and 59
    assert [clip[0] for clip in clips] == [0, 56, 116, 176, 236]
    assert clips[4].tolist() == list(range(236, 300, 4))
    assert rules.videomae_test(9, 4, 4, views=2).tolist() == [[0, 4, 8, 8]] * 2


def test_vjepa2_clips() -> None:
    """By hand from video_dataset.py: windows in the halves of a long video, overlapping ones in a short one."""
    long = rules.vjepa2(200, 16, 4, np.array([0.0, BELOW_ONE]))
    assert long[0].tolist() == [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    assert long[1].tolist() == [100 + 35 + frame for frame in long[0].tolist()]
    short = rules.vjepa2(80, 16, 4, np.full(2, 0.5))  # parts of 40: linspace(0, 63, 15), frame 62, then 16 later
    assert short[0].tolist() == [0, 4, 9, 13, 18, 22, 27, 31, 36, 40, 45, 49, 54, 58, 62, 62]
    assert (short[1] - short[0]).tolist() == [16] * 16
    assert rules.vjepa2(1, 4, 4, np.full(2, 0.5)).tolist() == [[0] * 4] * 2


def test_one_dense_clip_is_the_middle_one() -> None:
    assert test_frames(Sampling("videomae", 1, 16, 4), 164, 30.0)[0, 0] == 50
    assert test_frames(Sampling("vjepa2", 1, 16, 4), 164, 30.0)[0, 0] == 50
    assert test_frames(Sampling("tsm_dense", 8), 100, 30.0)[0, 0] == 18
    assert test_frames(Sampling("pyslowfast", 1, 8, 8), 164, 30.0)[0, 0] == 50


def test_twice_sample_is_the_second_clip() -> None:
    s = Sampling("tsn", 8)
    two = test_frames(s, 100, 30.0, 2)
    assert two[0].tolist() == test_frames(s, 100, 30.0)[0].tolist()
    assert two[1].tolist() == [0, 12, 25, 37, 50, 62, 75, 87]
    assert test_frames(Sampling("mmaction2_1x", 8), 100, 30.0, 2)[1].tolist() == two[1].tolist()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sampling("tns", 3), "unknown preset 'tns'"),
        (lambda: Sampling("tsn", 0), "num_segments"),
        (lambda: Sampling("tsm_dense", 8, 4), "clip_len"),
        (lambda: Sampling("one_per_segment", 3, 1, 2), "frame_interval"),
        (lambda: test_frames(Sampling("tsn", 8), 100, 30.0, 3), "at most 2"),
        (lambda: test_frames(Sampling("one_per_segment", 8), 100, 30.0, 2), "at most 1"),
        (lambda: test_frames(Sampling("mmaction2_1x", 8), 100, 30.0, 0), "at least 1"),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_no_frames_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 frames"):
        test_frames(Sampling("tsn", 8), 0, 30.0)
