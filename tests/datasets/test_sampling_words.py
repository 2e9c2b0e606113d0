"""The words of docs/sampling.md: who follows them gets the frames that the network gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datasets.plan import described
from datasets.plan.sampling import PRESETS, Sampling, most_clips, test_frames
from utils.errors import UserError

LENGTHS = (1, 3, 7, 8, 9, 12, 30, 61, 64, 65, 100, 299, 300)
Formula = Callable[[int, int], list[int]]  # (n, num_clips) -> frames of all clips, one after the other


def tsn(n: int, clips: int) -> list[int]:
    places = [(n - 3 + 1) / 4 * (k + half) for half in (1 / 2, 0)[:clips] for k in range(4)]
    return [min(max(int(place) + i, 0), n - 1) for place in places for i in range(3)]


def tsm_dense(n: int, clips: int) -> list[int]:
    room = max(n - 64, 0)
    starts = [room // 2] if clips == 1 else [int(room * v / (clips - 1)) for v in range(clips)]
    return [(a + k * (64 // 8)) % n for a in starts for k in range(8)]


def mmaction2_0x(n: int, clips: int) -> list[int]:
    starts = [0 if n < 32 else int((n - 32 + 1) / clips * (v + 1 / 2)) for v in range(clips)]
    return [(a + 4 * i) % n for a in starts for i in range(8)]


def mmaction2_1x(n: int, clips: int) -> list[int]:
    m = max(n - 7 * 4 - 1, 0)
    starts = [m // 2] if clips == 1 else [round(v * m / (clips - 1)) for v in range(clips)]
    return [(a + 4 * i) % n for a in starts for i in range(8)]


def pyslowfast(n: int, clips: int) -> list[int]:
    w = 8 * 4 * 30 / 30
    room = max(n - w, 0)
    starts = [room / 2] if clips == 1 else [room * v / clips for v in range(clips)]
    return [min(int(np.float32(a + j * (w - 1) / 7)), n - 1) for a in starts for j in range(8)]


def pp(n: int, clips: int) -> list[int]:
    return [0 if n <= 8 else int(n / 8 * (k + 1 / 2)) for k in range(8)]


def pp_tsm(n: int, clips: int) -> list[int]:
    p = n // 8
    return [p * k + (p - 1) // 2 if p else k % n for k in range(8)]


def spread(n: int) -> list[int]:
    if n > 32:
        a = (n - 32) // 2
        return [min(int(a + j * 32 / 7), a + 31) for j in range(8)]
    some = [int(frame) for frame in np.linspace(0, n, n // 4)] if n // 4 > 1 else [0][: n // 4]
    return [max(min(frame, n - 1), 0) for frame in (some + [n] * 8)[:8]]


def one_per_segment(n: int, clips: int) -> list[int]:
    return [0 if n <= 8 else int((n - 8 + 1) / 8 * (k + 1 / 2)) for k in range(8)]


FORMULAS: dict[str, tuple[Sampling, tuple[int, ...], Formula]] = {
    "tsn": (Sampling("tsn", 4, 3), (1, 2), tsn),
    "tsm_dense": (Sampling("tsm_dense", 8), (1, 3, 10), tsm_dense),
    "mmaction2_0x": (Sampling("mmaction2_0x", 1, 8, 4), (1, 3, 10), mmaction2_0x),
    "mmaction2_1x": (Sampling("mmaction2_1x", 1, 8, 4), (1, 3, 10), mmaction2_1x),
    "pyslowfast": (Sampling("pyslowfast", 1, 8, 4), (1, 4, 10), pyslowfast),
    "pp": (Sampling("pp", 8), (1,), pp),
    "pp_tsm": (Sampling("pp_tsm", 8), (1,), pp_tsm),
    "videomae": (Sampling("videomae", 1, 8, 4), (1,), lambda n, clips: spread(n)),
    "vjepa2": (Sampling("vjepa2", 1, 8, 4), (1,), lambda n, clips: spread(n - 1 if n <= 32 else n)),
    "one_per_segment": (Sampling("one_per_segment", 8), (1,), one_per_segment),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_who_follows_the_words_gets_the_frames(preset: str) -> None:
    sampling, clips, formula = FORMULAS[preset]
    for n in LENGTHS:
        for count in clips:
            assert test_frames(sampling, n, 30.0, count).reshape(-1).tolist() == formula(n, count), (n, count)


def test_the_page_has_the_tables(repo_root: Path) -> None:
    page = (repo_root / "docs/sampling.md").read_text(encoding="utf-8")
    assert described.table() in page
    assert described.examples() in page


@pytest.mark.parametrize("preset", PRESETS)
def test_the_number_of_test_clips_in_words(preset: str) -> None:
    row = next(row for row in described.table().splitlines() if row.startswith(f"| `{preset}`"))
    clips = row.split(" | ")[3].partition(":")[0]
    expected = {None: "any V", 1: "1", 2: "1 or 2"}[most_clips(Sampling(preset, 8))]
    assert clips == expected or (
        clips == f"any V with S = 1, else {expected}" and most_clips(Sampling(preset, 1)) is None
    )


def test_too_many_clips_say_what_can_be_asked() -> None:
    with pytest.raises(UserError, match=r"3 test clips .* at most 2: give --views 2x1, 2x3 or 2x10; or .*tsm_"):
        test_frames(Sampling("tsn", 4), 100, 30.0, 3)
    with pytest.raises(UserError, match=r"give --views 1x1, 1x3 or 1x10; or train with data.sampling: tsn or"):
        test_frames(Sampling("one_per_segment", 4), 100, 30.0, 2)
    with pytest.raises(UserError, match=r"or train with data.sampling: pyslowfast or videomae or vjepa2 \("):
        test_frames(Sampling("mmaction2_1x", 4, 2, 3), 100, 30.0, 3)  # tsm_dense has no clip_len
    with pytest.raises(UserError, match="at least 1"):
        test_frames(Sampling("pyslowfast", 4), 100, 30.0, 0)
