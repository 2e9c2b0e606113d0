"""Pick frames as each tool does: one function per tool and phase, on plain numbers.

Common arguments: `n` frames in the video (at least 1), `segments` S, `length` L frames per segment, `interval` tau
between them. Ordinals are 0-based; readers add the base of the file names. Functions for training take uniforms in
[0, 1), one per random number. An integer in lo..hi is lo + floor(u * (hi - lo + 1)). Results are int64. They may point
past the end only where the docstring says so.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_DENSE_RANGE = 64  # frames that a dense clip spans (TSM, section 5.1: "64 consecutive frames")


def _pick(u: Floats, low: Ints | int, high: int) -> Ints:
    """Return integers in low..low + high, both ends included. `low` is one start or an array of starts."""
    # `u * (high + 1)` can round up to `high + 1` for u close to 1.
    return np.minimum((u * (high + 1)).astype(np.int64), high) + low


def _runs(starts: Ints, length: int, last: int) -> Ints:
    """Return `length` consecutive frames from each start, held at the last frame: (S,) -> (S * length,)."""
    if length == 1:
        return np.clip(starts, 0, last)
    # (S, 1) + (L,) -> (S, L) -> (S * L,)
    return np.clip(starts[:, None] + np.arange(length), 0, last).reshape(-1)


# ------------------------------------------------------------------------------------------------- TSN and TSM authors


def tsn_train(n: int, segments: int, u: Floats, length: int = 1) -> Ints:
    """Return one random frame in each of S equal segments (TSN, Wang et al., ECCV 2016, section 3.1, training).

    A video with fewer frames than segments gives frame 0. If the segments are empty nevertheless, S sorted draws come
    from the whole video. Source: tsn-pytorch and temporal-shift-module, `_sample_indices`.
    """
    room = n - length + 1
    span = room // segments

    if span > 0:
        starts = _pick(u, np.arange(segments) * span, span - 1)
    elif n > segments:  # `length` leaves no room for S segments
        starts = np.sort(_pick(u, 0, max(room - 1, 0)))
    else:
        starts = np.zeros(segments, np.int64)

    return _runs(starts, length, n - 1)


def tsn_val(n: int, segments: int, length: int = 1) -> Ints:
    """Return segment centres, or frame 0 unless n > S + L - 1 (TSN and TSM repositories, `_get_val_indices`)."""
    if n <= segments + length - 1:
        return np.zeros(segments * length, np.int64)
    return tsm_test(n, segments, length)


def tsm_test(n: int, segments: int, length: int = 1, *, twice: bool = False) -> Ints:
    """Return segment centres, without a guard for short videos (TSN and TSM repositories, `_get_test_indices`).

    `twice` (twice_sample) appends a second clip with the start of each segment.
    """
    tick = (n - length + 1) / segments
    steps = np.arange(segments)
    starts = (tick / 2.0 + tick * steps).astype(np.int64)

    if twice:
        starts = np.concatenate([starts, (tick * steps).astype(np.int64)])
    return _runs(starts, length, n - 1)


def tsm_dense_train(n: int, segments: int, u: float) -> Ints:
    """Return S frames at stride 64 // S of a random window of 64 frames, modulo n (TSM repository, dense training)."""
    positions = max(1, 1 + n - _DENSE_RANGE)
    # The published draw is randint(0, positions - 1), whose upper end is excluded: the last window is never drawn.
    start = 0 if positions == 1 else min(int(u * (positions - 1)), positions - 2)
    return (start + np.arange(segments) * (_DENSE_RANGE // segments)) % n


def tsm_dense_test(n: int, segments: int, positions: int = 10) -> Ints:
    """Return (positions, S) dense test clips with evenly spaced starts (TSM; MMAction2 DenseSampleFrames)."""
    starts = np.linspace(0, max(0, n - _DENSE_RANGE), positions, dtype=np.int64)
    # (P, 1) + (S,) -> (P, S)
    return (starts[:, None] + np.arange(segments) * (_DENSE_RANGE // segments)) % n


# ------------------------------------------------------------------------------------------------------------ MMAction2


def _mmaction2_frames(starts: NDArray, steps: Ints, n: int, out_of_bound: str) -> Ints:
    """Return (clips, L) frames from clip starts. Past the end they wrap (loop) or repeat the last frame in range."""
    # (clips, 1) + (L,) -> (clips, L)
    frames = (starts[:, None] + steps).astype(np.int64)
    if out_of_bound == "loop":
        return frames % n

    inside = frames < n
    # Frames outside count as 0, so the maximum is the last one inside.
    last = np.max(frames * inside, axis=1, keepdims=True)
    return np.where(inside, frames, last)


def mmaction2_train(
    n: int,
    segments: int,
    length: int,
    interval: int,
    u: Floats,
    *,
    keep_tail: bool = False,
    out_of_bound: str = "loop",
) -> Ints:
    """Return (S, L) training frames of MMAction2's SampleFrames (0.x and 1.x alike).

    `keep_tail` (keep_tail_frames) uses segments of fractional length, so that the last frames can be drawn.
    """
    span = length * interval
    room = n - span + 1
    each = room // segments
    steps = np.arange(segments)

    # The order of the branches is MMAction2's: it decides which rule a short video gets.
    if keep_tail:
        if n > span - 1:
            starts = (steps * (room / segments) + u * (room / segments)).astype(np.int64)
        else:
            starts = np.zeros(segments, np.int64)
    elif each > 0:
        starts = _pick(u, steps * each, each - 1)
    elif n > max(segments, span):
        starts = np.sort(_pick(u, 0, n - span))
    elif each == 0:
        starts = np.around(steps * (room / segments)).astype(np.int64)
    else:
        starts = np.zeros(segments, np.int64)

    return _mmaction2_frames(starts, np.arange(length) * interval, n, out_of_bound)


def mmaction2_0x_test(
    n: int, clips: int, length: int, interval: int, *, twice: bool = False, out_of_bound: str = "loop"
) -> Ints:
    """Return (clips, L) test frames of MMAction2 0.x SampleFrames in segment centres; (2 * clips, L) with `twice`."""
    span = length * interval
    base = np.arange(clips) * ((n - span + 1) / clips)
    starts = (base + (n - span + 1) / clips / 2.0).astype(np.int64)

    if twice:
        starts = np.concatenate([starts, base.astype(np.int64)])
    if n <= span - 1:  # too short for one clip: all start at 0 and wrap around
        starts = np.zeros_like(starts)

    return _mmaction2_frames(starts, np.arange(length) * interval, n, out_of_bound)


def mmaction2_1x_test(
    n: int,
    clips: int,
    length: int,
    interval: int,
    *,
    twice: bool = False,
    out_of_bound: str = "loop",
    target_fps: float | None = None,
    fps: float = 0.0,
) -> Ints:
    """Return (clips, L) test frames of MMAction2 1.x SampleFrames; (2 * clips, L) with `twice`.

    Single frames are in segment centres. Longer clips are spread from the first to the last possible start.
    `target_fps` stretches a clip by fps / target_fps and spaces starts as PySlowFast does. With L > 1 `twice` keeps the
    spacing, as published, so that later clips run past the end and wrap around.
    """
    # Frames of one clip, relative to its start.
    steps = np.arange(length) * interval
    if target_fps is not None:
        span = length * interval * (fps / target_fps if fps else 1.0)  # in frames of the video, not rounded
        steps = np.linspace(0, span - 1, length).astype(np.int64)
    else:
        span = (length - 1) * interval + 1

    # Starts of the clips.
    total = 2 * clips if twice else clips
    if length == 1:
        base = np.arange(clips) * (n / clips)
        starts = base + n / clips / 2.0
        if twice:
            starts = np.concatenate([starts, base])
    elif total == 1:
        # One clip: in the middle.
        starts = np.array([max(n - span, 0) // 2])
    else:
        between = max(n - span, 0) / max(clips - 1, 1)
        starts = np.arange(total) * (between if target_fps is None else math.floor(between))
        starts = np.round(starts)

    return _mmaction2_frames(starts.astype(np.int64), steps, n, out_of_bound)


def mmaction2_uniform_test(n: int, length: int, clips: int) -> Ints:
    """Return (clips, L) test frames of MMAction2's UniformSample: L equal segments, each clip a little later."""
    segment = (n - 1) / length  # in frames, not rounded
    starts = np.round(segment * np.arange(length)).astype(np.int64)
    shifts = (segment / (clips + 1) * np.arange(1, clips + 1)).astype(np.int64)
    return starts + shifts[:, None]  # (L,) + (clips, 1) -> (clips, L)


# ----------------------------------------------------------------------------------------------------------- PySlowFast


def _pyslowfast_clip(start: float, size: float, count: int, n: int) -> Ints:
    """Return `count` frames over `size` frames from `start`: torch.linspace in float32, truncated."""
    # torch computes in float32 with fused multiply-add, from both ends to the middle. Plain float64 gives other
    # integers in 1.4 % of the clips. A product of two float32 is exact in float64, so one rounding at the end gives
    # torch's result.
    first, last = float(np.float32(start)), float(np.float32(start + size - 1))
    if count == 1:
        return np.clip(np.array([int(first)]), 0, n - 1)

    step = float(np.float32(np.float32(last) - np.float32(first)) / np.float32(count - 1))
    i = np.arange(count)
    points = np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)
    return np.clip(points, 0, n - 1).astype(np.int64)


def _pyslowfast_size(count: int, rate: int, fps: float, target_fps: float) -> float:
    # rate * count frames at `target_fps`, in frames of this video. It may be fractional.
    return max(1.0, rate * count / target_fps * (fps or target_fps))


def pyslowfast_train(n: int, count: int, rate: int, fps: float, u: float, *, target_fps: float = 30.0) -> Ints:
    """Return (count,) frames from a random start, for training and validation (SlowFast, ICCV 2019; PySlowFast).

    The clip covers rate * count / target_fps seconds. An unknown frame rate (0) counts as `target_fps`.
    """
    size = _pyslowfast_size(count, rate, fps, target_fps)
    return _pyslowfast_clip(u * max(n - size, 0.0), size, count, n)


def pyslowfast_test(
    n: int, count: int, rate: int, fps: float, *, views: int, target_fps: float = 30.0, use_offset: bool = False
) -> Ints:
    """Return (views, count) test frames as PySlowFast does.

    Without `use_offset` (DATA.USE_OFFSET_SAMPLING), view k starts at delta * k / views and never reaches the end.
    """
    size = _pyslowfast_size(count, rate, fps, target_fps)
    delta = max(n - size, 0.0)  # the last possible start, not rounded

    if not use_offset:
        starts = [delta * k / views for k in range(views)]
    elif views == 1:
        starts = [math.floor(delta / 2)]
    else:
        starts = [k * math.floor(delta / (views - 1)) for k in range(views)]

    return np.stack([_pyslowfast_clip(start, size, count, n) for start in starts])


# ------------------------------------------------------------------------------------------- VideoMAE and V-JEPA 2


def _spread(start: int, size: int, count: int) -> Ints:
    """Return `count` frames from the first to the last of a window, or its first frame if count is 1."""
    # The published linspace ends at start + size, one past the window. Only that last point is clipped.
    return np.clip(np.linspace(start, start + size, count), start, start + size - 1).astype(np.int64)


def _held(room: int, count: int, rate: int) -> Ints:
    """Return every rate-th frame of `room` frames, then the last one repeatedly, for a window longer than the video."""
    points = np.linspace(0, room, room // rate)[:count]
    points = np.concatenate((points, np.full(count - len(points), room)))
    return np.clip(points, 0, max(room - 1, 0)).astype(np.int64)


def videomae_train(n: int, count: int, rate: int, u: float) -> Ints:
    """Return (count,) training frames over count * rate frames (VideoMAE, kinetics.py, `loadvideo_decord`)."""
    size = count * rate
    return _held(n, count, rate) if n <= size else _spread(int(_pick(np.array(u), 0, n - size - 1)), size, count)


def videomae_test(n: int, count: int, rate: int, *, views: int) -> Ints:
    """Return (views, count) test frames: windows of every rate-th frame, spread evenly to the end (VideoMAE)."""
    frames = np.arange(0, n, rate)
    # A short video repeats its last frame.
    frames = np.concatenate((frames, np.full(max(count - len(frames), 0), frames[-1])))
    step = (len(frames) - count) / max(views - 1, 1)
    return np.stack([frames[int(view * step) :][:count] for view in range(views)])


def vjepa2(n: int, count: int, rate: int, u: Floats) -> Ints:
    """Return (clips, count) frames: a window in each of `clips` equal parts (V-JEPA 2, VideoDataset, overlap allowed).

    If the parts are shorter than a window, the windows are evenly spread over the whole video and overlap.
    """
    size, clips = count * rate, len(u)
    part = n // clips

    if part > size:
        starts = _pick(u, np.arange(clips) * part, part - size - 1)
        return np.stack([_spread(int(start), size, count) for start in starts])

    step = (n - size) // (clips - 1) if n > size and clips > 1 else 0
    # (count,) + (clips, 1) -> (clips, count)
    return _held(min(size, n) - 1, count, rate) + step * np.arange(clips)[:, None]


# ---------------------------------------------------------------------------------------------------------- PaddleVideo


def pp_tsn_train(n: int, segments: int, u: Floats) -> Ints:
    """Return training frames of PaddleVideo's Sampler with select_left (PP-TSN): `tsn_train`, one frame per segment."""
    return tsn_train(n, segments, u)


def pp_tsn_valid(n: int, segments: int) -> Ints:
    """Return segment centres, or frame 0 unless n > S (PaddleVideo Sampler with select_left, PP-TSN, validation)."""
    if n <= segments:
        return np.zeros(segments, np.int64)
    return (n / segments / 2.0 + n / segments * np.arange(segments)).astype(np.int64)


def pp_tsm_train(n: int, segments: int, u: Floats) -> Ints:
    """Return training frames of PaddleVideo's Sampler without select_left (PP-TSM). With n < S take them mod n."""
    span = n // segments
    return _pick(u, np.arange(segments) * span, span - 1) if span else np.arange(segments)


def pp_tsm_valid(n: int, segments: int) -> Ints:
    """Return validation frames of PaddleVideo's Sampler without select_left (PP-TSM). With n < S take them mod n."""
    span = n // segments
    return np.arange(segments) * span + (span - 1) // 2 if span else np.arange(segments)


def pp_linspace(n: int, segments: int) -> Ints:
    """Return S frames from the first to the last (PaddleVideo Sampler with linspace_sample, both phases)."""
    return np.linspace(0, n - 1, segments).astype(np.int64)


# ----------------------------------------------------------------------------------------------- Pytorch Video Analysis


def one_per_segment_train(n: int, segments: int, u: Floats) -> Ints:
    """Return `tsn_train` with one frame per segment (pytorch-video-recognition, Pytorch Video Analysis, training)."""
    return tsn_train(n, segments, u)


def one_per_segment_val(n: int, segments: int) -> Ints:
    """Return centres of S ticks of (n - S + 1) / S frames, or frame 0 unless n > S (the same, validation)."""
    if n <= segments:
        return np.zeros(segments, np.int64)
    tick = (n - segments + 1) / segments
    return (tick / 2.0 + tick * np.arange(segments)).astype(np.int64)
