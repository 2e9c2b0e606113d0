from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from datasets.plan.metadata import VideoMetadata
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec, resolve_eval
from datasets.readers.repair import read_what_decodes
from utils.errors import MediaError

ERROR = MediaError("v.mp4", "frame 7 of 40 does not decode")


class Torn:
    """A reader of a video whose frame i is grey of value i, with some frames that do not decode."""

    def __init__(self, bad: set[int]) -> None:
        self.bad, self.reads = bad, 0

    def read(self, i: int, frames: np.ndarray, box: object, size: tuple[int, int], out: np.ndarray) -> None:
        self.reads += 1
        for row, frame in enumerate(frames.tolist()):
            if frame in self.bad:
                raise MediaError("v.mp4", f"frame {frame} of 40 does not decode")
            out[row] = frame


def repair(bad: set[int]) -> tuple[list[int], np.ndarray, Torn]:
    plan = resolve_eval(VideoMetadata(40, 8, 8, 25.0), EvalSpec(Sampling("tsn", 20), scale=8, crop_size=8), 0)
    out = np.full((20, 8, 8, 3), 255, np.uint8)
    reader: Any = Torn(bad)  # nothing asks it for metadata
    frames = read_what_decodes(reader, plan, out, ERROR)
    return frames.tolist(), out[:, 0, 0, 0], reader


def test_the_nearest_frame_stands_in() -> None:
    planned = list(range(1, 40, 2))
    frames, shown, _ = repair({7, 21, 23, 39})
    assert [frames[i] for i in range(20) if planned[i] not in (7, 21, 23, 39)] == [
        f for f in planned if f not in (7, 21, 23, 39)
    ]
    assert [frames[planned.index(f)] for f in (7, 21, 23, 39)] == [5, 19, 25, 37]
    assert shown.tolist() == frames


def test_a_video_that_ends_too_early_costs_few_reads() -> None:
    frames, shown, reader = repair(set(range(30, 40)))
    assert frames[15:] == [29] * 5
    assert shown.tolist() == frames
    assert reader.reads <= 20


def test_too_much_missing_is_a_failure() -> None:
    with pytest.raises(MediaError) as caught:
        repair(set(range(15, 40)))
    assert caught.value is ERROR
    with pytest.raises(MediaError):
        repair(set(range(40)))
