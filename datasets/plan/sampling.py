"""Choose the frames of a clip: the presets that a configuration names, over the formulas of `rules.py`.

A clip has T = num_segments * clip_len frames. Some tools validate on a random clip (`tsm_dense`, `pyslowfast`,
`videomae`, `vjepa2`). There one test clip is the middle one of the clips that could be drawn, so that a validation
always gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datasets.plan import rules
from datasets.plan.rules import Floats, Ints
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.config import Config


_NO_FRAMES = "a video of {} frames gives no clip"


@dataclass(frozen=True)
class Sampling:
    """A preset and its numbers.

    Args:
        preset: one of `PRESETS`.
        num_segments: S, segments of the video, with `clip_len` frames each.
        clip_len: L, frames per segment.
        frame_interval: tau, distance in frames between neighbours in a segment.

    Raises:
        UserError: unknown preset, a number below 1, or a number that the preset does not use.
    """

    preset: str
    num_segments: int
    clip_len: int = 1
    frame_interval: int = 1

    def __post_init__(self) -> None:
        if self.preset not in _PRESETS:
            raise UserError(f"data.sampling: unknown preset {self.preset!r}; choose one of {', '.join(PRESETS)}")

        used = _PRESETS[self.preset]
        for name in ("num_segments", "clip_len", "frame_interval"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"{name}: {value} frames; give at least 1")
            if value > 1 and name not in used.numbers:
                raise UserError(f"{name}: {value} has no effect with sampling preset {self.preset!r}; leave it at 1")

    @property
    def frames_per_clip(self) -> int:
        """T, frames of one clip."""
        return self.num_segments * self.clip_len


def sampling_of(cfg: Config) -> Sampling:
    """Return the Sampling of a loaded configuration."""
    return Sampling(cfg.data.sampling, cfg.model.num_segments, cfg.data.clip_len, cfg.data.frame_interval)


def train_frames(s: Sampling, num_frames: int, fps: float, u: Floats) -> Ints:
    """Return the frames of one training clip.

    Args:
        s: the preset.
        num_frames: n >= 1, frames of the video.
        fps: frame rate of the video (used by `pyslowfast`; 0 if unknown).
        u: (S,) numbers in [0, 1); a preset that draws one window takes the first.

    Returns:
        (T,) 0-based ordinals, all in 0..n-1.

    Raises:
        ValueError: no frames.
    """
    if num_frames < 1:
        raise ValueError(_NO_FRAMES.format(num_frames))
    return _PRESETS[s.preset].train(s, num_frames, fps, u).reshape(-1)


def test_frames(s: Sampling, num_frames: int, fps: float, num_clips: int = 1) -> Ints:  # noqa: PT028
    """Return the frames of the test clips: (num_clips, T) 0-based ordinals, all in 0..n-1.

    Raises:
        UserError: the preset does not define that many clips.
        ValueError: no frames.
    """
    check_clips(s, num_clips)
    if num_frames < 1:
        raise ValueError(_NO_FRAMES.format(num_frames))
    return _PRESETS[s.preset].test(s, num_frames, fps, num_clips).reshape(num_clips, s.frames_per_clip)


test_frames.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]  # else pytest collects it by its name


def most_clips(s: Sampling) -> int | None:
    """Return how many test clips of a video the preset defines; None = any number."""
    return _PRESETS[s.preset].most_clips(s)


def check_clips(s: Sampling, num_clips: int) -> None:
    """Raise UserError if the preset does not define that number of test clips."""
    most = most_clips(s)
    if num_clips >= 1 and (most is None or num_clips <= most):
        return
    if num_clips < 1 or most is None:
        raise UserError(f"num_clips: {num_clips} clips per video; give at least 1")

    # Suggest what this experiment allows, and the presets that define as many clips as requested.
    wider = [name for name, preset in _PRESETS.items() if preset.fits(s, num_clips)]
    others = f"; or train with data.sampling: {' or '.join(wider)} (docs/sampling.md)" if wider else ""

    raise UserError(
        f"{num_clips} test clips are not defined for sampling preset {s.preset!r} with {s.num_segments} segments, at "
        f"most {most}: give --views {most}x1, {most}x3 or {most}x10{others}"
    )


def _mmaction2_test(rule: Callable[..., Ints], s: Sampling, n: int, clips: int) -> Ints:
    """Return MMAction2's test frames. With S > 1 its clips are our segments, and a second clip is twice_sample's."""
    if s.num_segments == 1:
        return rule(n, clips, s.clip_len, s.frame_interval)

    return rule(n, s.num_segments, s.clip_len, s.frame_interval, twice=clips == 2)


def _mmaction2_train(s: Sampling, n: int, fps: float, u: Floats) -> Ints:
    return rules.mmaction2_train(n, s.num_segments, s.clip_len, s.frame_interval, u)


def _dense_test(s: Sampling, n: int, fps: float, clips: int) -> Ints:
    if clips == 1:
        # u = 0.5 of the training rule: the window in the middle.
        return rules.tsm_dense_train(n, s.num_segments, 0.5)
    return rules.tsm_dense_test(n, s.num_segments, clips)


def _pyslowfast_test(s: Sampling, n: int, fps: float, clips: int) -> Ints:
    if clips == 1:
        return rules.pyslowfast_train(n, s.frames_per_clip, s.frame_interval, fps, 0.5)
    return rules.pyslowfast_test(n, s.frames_per_clip, s.frame_interval, fps, views=clips)


def _videomae_test(s: Sampling, n: int, fps: float, clips: int) -> Ints:
    if clips == 1:
        return rules.videomae_train(n, s.frames_per_clip, s.frame_interval, 0.5)
    return rules.videomae_test(n, s.frames_per_clip, s.frame_interval, views=clips)


def _at_most(clips: int | None) -> Callable[[Sampling], int | None]:
    return lambda s: clips


def _mmaction2_clips(s: Sampling) -> int | None:
    return None if s.num_segments == 1 else 2


@dataclass(frozen=True)
class _Preset:
    """A train rule, a test rule, and the fields of Sampling that it uses."""

    train: Callable[[Sampling, int, float, Floats], Ints]
    test: Callable[[Sampling, int, float, int], Ints]
    most_clips: Callable[[Sampling], int | None]  # None: any number
    numbers: tuple[str, ...] = ("num_segments",)

    def fits(self, s: Sampling, num_clips: int) -> bool:
        """Return True if this preset allows the numbers of `s` with `num_clips` test clips."""
        most = self.most_clips(s)
        used = all(getattr(s, name) == 1 or name in self.numbers for name in _ALL)
        return used and (most is None or num_clips <= most)


_ALL = ("num_segments", "clip_len", "frame_interval")

_PRESETS: dict[str, _Preset] = {
    "tsn": _Preset(
        lambda s, n, fps, u: rules.tsn_train(n, s.num_segments, u, s.clip_len),
        lambda s, n, fps, clips: rules.tsm_test(n, s.num_segments, s.clip_len, twice=clips == 2),
        _at_most(2),
        ("num_segments", "clip_len"),
    ),
    "tsm_dense": _Preset(
        lambda s, n, fps, u: rules.tsm_dense_train(n, s.num_segments, float(u[0])),
        _dense_test,
        _at_most(None),
    ),
    "mmaction2_0x": _Preset(
        _mmaction2_train,
        lambda s, n, fps, clips: _mmaction2_test(rules.mmaction2_0x_test, s, n, clips),
        _mmaction2_clips,
        _ALL,
    ),
    "mmaction2_1x": _Preset(
        _mmaction2_train,
        lambda s, n, fps, clips: _mmaction2_test(rules.mmaction2_1x_test, s, n, clips),
        _mmaction2_clips,
        _ALL,
    ),
    "pyslowfast": _Preset(
        lambda s, n, fps, u: rules.pyslowfast_train(n, s.frames_per_clip, s.frame_interval, fps, float(u[0])),
        _pyslowfast_test,
        _at_most(None),
        _ALL,
    ),
    "pp": _Preset(
        lambda s, n, fps, u: rules.pp_tsn_train(n, s.num_segments, u),
        lambda s, n, fps, clips: rules.pp_tsn_valid(n, s.num_segments),
        _at_most(1),
    ),
    "pp_tsm": _Preset(
        # Short videos give frames past the end, which wrap around as in PaddleVideo.
        lambda s, n, fps, u: rules.pp_tsm_train(n, s.num_segments, u) % n,
        lambda s, n, fps, clips: rules.pp_tsm_valid(n, s.num_segments) % n,
        _at_most(1),
    ),
    "videomae": _Preset(
        lambda s, n, fps, u: rules.videomae_train(n, s.frames_per_clip, s.frame_interval, float(u[0])),
        _videomae_test,
        _at_most(None),
        _ALL,
    ),
    "vjepa2": _Preset(
        lambda s, n, fps, u: rules.vjepa2(n, s.frames_per_clip, s.frame_interval, u[:1]),
        lambda s, n, fps, clips: rules.vjepa2(n, s.frames_per_clip, s.frame_interval, np.full(clips, 0.5)),
        _at_most(None),
        _ALL,
    ),
    "one_per_segment": _Preset(
        lambda s, n, fps, u: rules.one_per_segment_train(n, s.num_segments, u),
        lambda s, n, fps, clips: rules.one_per_segment_val(n, s.num_segments),
        _at_most(1),
    ),
}

PRESETS = tuple(_PRESETS)
