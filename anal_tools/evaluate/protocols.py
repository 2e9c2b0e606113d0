"""Define the ways to evaluate by name: which clips and crops, at which size, and how their scores are averaged.

A protocol makes a number comparable. So each has a name, is written into every result, and follows the tool that
published it to the rounding of a pixel. Tests compare the crops and test clips with the tools' own tables.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.plan.sampling import Sampling, sampling_of, test_frames
from datasets.plan.views import EVAL_CROPS, EvalSpec, eval_spec
from utils import renamed
from utils.errors import UserError, did_you_mean
from utils.metrics import AVERAGES

if TYPE_CHECKING:
    from utils.config import Config

#: {tool: {number of crops: key of EVAL_CROPS}}. "plain" is not of a tool: its centre is one of its three crops, and
#: these are among its ten.
FAMILIES: dict[str, dict[int, str]] = {
    "plain": {1: "centre", 3: "three", 10: "ten"},
    "pyslowfast": {1: "centre_pyslowfast", 3: "three_pyslowfast", 10: "ten"},
    "mmaction2": {1: "centre", 3: "three_mmaction2", 10: "ten"},
    "tsm": {1: "centre_tsm", 3: "three_tsm", 10: "ten"},
    "vjepa2": {1: "centre", 3: "three_vjepa2", 10: "ten"},
}
_WORDS = {"centre": (1, 1), "center": (1, 1), "3crop": (1, 3), "10crop": (1, 10)}  # (clips, crops)
_LARGEST = 100_000  # number of views, frames or pixels that a file may have; larger ones are damage


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Describe one way to evaluate.

    Attributes:
        spec: clips, crops and sizes.
        average: how the views of a video are joined, one of `AVERAGES`.
        family: a key of `FAMILIES`, from which a smaller number of views takes its crops.
        name: of the preset it started from; None for a config's own views.
        window: side of the windows of PySlowFast's test per position, in places of the map; 0 for a plain average.
    """

    spec: EvalSpec
    average: str = "prob"
    family: str = "plain"
    name: str | None = None
    window: int = 0

    @property
    def text(self) -> str:
        """The protocol in words."""
        spec = self.spec
        joined = {"prob": "mean of softmax", "logit": "mean of logits", "sum": "sum of softmax"}[self.average]
        name = f"{self.name}: " if self.name else ""
        return (
            f"{name}{spec.num_clips} clip(s) x {spec.crops_per_clip} crop(s) = {spec.views} view(s) of "
            f"{spec.sampling.frames_per_clip} frames, {spec.crop_size} pixels from short side {spec.scale} "
            f"({spec.crops}), {joined}" + (f", softmax per {self.window}x{self.window} window" if self.window else "")
        )

    def to_dict(self) -> dict[str, object]:
        """Return plain values for the results' JSON file."""
        spec = self.spec
        return {
            "text": self.text,
            "preset": self.name,
            "views": spec.views,
            "average": self.average,
            "family": self.family,
            "window": self.window,
            **dataclasses.asdict(spec),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """Return the protocol from the values of `to_dict`, even for results of earlier versions.

        Raises:
            ValueError, TypeError, KeyError, UserError: the values are not those of a protocol.
        """
        values = renamed.protocol(dict(values))
        names = {field.name for field in dataclasses.fields(EvalSpec)}
        spec = {key: value for key, value in values.items() if key in names}

        # Earlier versions used `three` for PySlowFast's crops, which now have their own name.
        if "family" not in values and spec.get("crops") == "three":
            spec["crops"] = "three_pyslowfast"

        spec["sampling"] = Sampling(**spec["sampling"])
        # results of earlier versions lack it: take the first family with these crops
        family = values.get("family") or next(
            (key for key, crops in FAMILIES.items() if spec["crops"] in crops.values()), "plain"
        )

        protocol = cls(EvalSpec(**spec), values["average"], family, values.get("preset"), values.get("window", 0))
        protocol.check_numbers()
        return protocol

    def check_numbers(self) -> None:
        """Raise ValueError for values of a file that no evaluation can have."""
        if self.average not in AVERAGES:
            raise ValueError(f"average {self.average!r} is not one of {', '.join(AVERAGES)}")

        sampling = self.spec.sampling
        numbers = [self.spec.num_clips, self.spec.scale, self.spec.crop_size]
        numbers += [sampling.num_segments, sampling.clip_len, sampling.frame_interval]
        # `type` and not `isinstance`: True is an int
        if any(type(number) is not int or not 0 < number <= _LARGEST for number in numbers):
            raise ValueError(f"numbers of views or frames that are not between 1 and {_LARGEST:,}")


def parse_views(text: str) -> tuple[int, int]:
    """Return (clips, crops) of `centre`, `3crop`, `10crop` or CLIPSxCROPS.

    Raises:
        UserError: the text is none of these.
    """
    if text in _WORDS:
        return _WORDS[text]

    match = re.fullmatch(r"(\d{1,4})x(\d{1,2})", text)
    if not match or int(match[1]) < 1 or int(match[2]) not in FAMILIES["plain"]:
        raise UserError(
            f"--views {text}: give centre, 3crop, 10crop, or CLIPSxCROPS with 1, 3 or 10 crops, such as 10x3"
        )
    return int(match[1]), int(match[2])


def choose(
    cfg: Config,
    *,
    protocol: str | None = None,
    views: str | None = None,
    scale: int | None = None,
    crop_size: int | None = None,
    average: str | None = None,
    per_position: bool = False,
) -> Protocol:
    """Return the protocol that a command line selects for an experiment.

    Args:
        cfg: a loaded configuration; its own views count if no option is given (ten crops with `val_dense`, else the
            centre).
        protocol: a key of `PRESETS`.
        views: replaces the number of clips and crops (crops of the protocol's tool).
        scale: replaces the short side, pixels.
        crop_size: replaces the side of the crops, pixels.
        average: replaces the way in which views are joined.
        per_position: PySlowFast's softmax per position.

    Raises:
        UserError: an unknown name, or views that the experiment's sampling does not define.
    """
    # where to start: the experiment's views or a preset
    if protocol is None:
        base = Protocol(eval_spec(cfg))
    elif protocol in PRESETS:
        base = dataclasses.replace(PRESETS[protocol](cfg), name=protocol)
    else:
        raise UserError(
            f"--protocol {protocol}: no such protocol{did_you_mean(protocol, PRESETS)}; "
            f"choose one of {', '.join(PRESETS)}"
        )

    # Options replace parts of it; crops stay those of the same tool.
    changes: dict[str, int | str] = {}
    if views is not None:
        clips, crops = parse_views(views)
        changes |= {"num_clips": clips, "crops": FAMILIES[base.family][crops]}
    changes |= {key: value for key, value in (("scale", scale), ("crop_size", crop_size)) if value is not None}
    # full-height crops stay full-height at a different scale
    if scale is not None and crop_size is None and base.spec.crop_size == base.spec.scale:
        changes["crop_size"] = scale

    if average is not None and average not in AVERAGES:
        raise UserError(f"--average {average}: give one of {', '.join(AVERAGES)}")
    if per_position and (average or base.average) == "logit":
        raise UserError("--per-position gives probabilities, which have no mean of logits; add --average prob")

    return dataclasses.replace(
        base,
        spec=dataclasses.replace(base.spec, **changes),
        average=average or base.average,
        # PySlowFast's window: the map of a training clip, whose side is a 32nd of the input's, rounded up
        window=-(-cfg.augmentation.input_size // 32) if per_position else 0,
    )


def _tsn_25x10(cfg: Config) -> Protocol:
    """Return TSN's test (Wang et al. 2016, section 3.3): 25 frames, 4 corners and the centre, mirrored; logits."""
    sampling = Sampling("tsn", 25, clip_len=cfg.data.clip_len)
    # scale 256, crop 224, rounded as the TSM repository does it
    return Protocol(EvalSpec(sampling, 1, "ten", 256, 224, "tsm"), "logit", "tsm")


def _tsm_sampling(cfg: Config) -> Sampling:
    """Return the TSM repository's test clips: dense if the experiment samples densely, else one frame per segment."""
    return Sampling("tsm_dense" if cfg.data.sampling == "tsm_dense" else "tsn", cfg.model.num_segments)


def _tsm_efficient(cfg: Config) -> Protocol:
    """Return the efficient test of TSM (Lin et al. 2019, section 5.1): one clip, one centre crop of 224."""
    return Protocol(EvalSpec(_tsm_sampling(cfg), 1, "centre_tsm", 256, 224, "tsm"), "logit", "tsm")


def _tsm_accurate(cfg: Config) -> Protocol:
    """Return TSM's accurate test: full resolution, three crops of 256, of ten dense clips (Kinetics) or two."""
    sampling = _tsm_sampling(cfg)
    # two clips: the repository's option `twice_sample`
    clips = 10 if sampling.preset == "tsm_dense" else 2
    return Protocol(EvalSpec(sampling, clips, "three_tsm", 256, 256, "tsm"), "logit", "tsm")


def _sth_2x3(cfg: Config) -> Protocol:
    """Return the Something-Something test of the TSM paper: two clips, three crops of 256."""
    sampling = Sampling("tsn", cfg.model.num_segments)
    return Protocol(EvalSpec(sampling, 2, "three_tsm", 256, 256, "tsm"), "logit", "tsm")


def _k400_10x3(cfg: Config) -> Protocol:
    """Return SlowFast's test (Feichtenhofer et al. 2019, section 4.1): ten clips, three crops of 256."""
    # the crops follow the tool whose clips the experiment samples
    family = {
        "pyslowfast": "pyslowfast",
        "mmaction2_0x": "mmaction2",
        "mmaction2_1x": "mmaction2",
        "tsm_dense": "tsm",
    }.get(cfg.data.sampling, "plain")
    rounding = family if family in ("pyslowfast", "tsm") else "mmaction2"
    return Protocol(EvalSpec(sampling_of(cfg), 10, FAMILIES[family][3], 256, 256, rounding), "prob", family)


def _pptsn_tencrop(cfg: Config) -> Protocol:
    """Return PP-TSN's test (PaddleVideo, docs/en/model_zoo/recognition/pp-tsn.md): segment centres, ten crops."""
    sampling = Sampling("pp_tsm" if cfg.data.sampling == "pp_tsm" else "pp", cfg.model.num_segments)
    # averaged features and averaged logits are the same, since the classifier is linear
    return Protocol(EvalSpec(sampling, 1, "ten", 256, 224, "tsm"), "logit", "plain")


def _videomae(clips: int) -> Callable[[Config], Protocol]:
    """Return VideoMAE's test (Tong et al. 2022, kinetics.py and ssv2.py): three crops of 224 along the long side."""
    return lambda cfg: Protocol(EvalSpec(sampling_of(cfg), clips, "three", 224, 224, "tsm"))


def _vjepa2(clips: int) -> Callable[[Config], Protocol]:
    """Return V-JEPA 2's test (Assran et al. 2025, configs/eval): three training-size crops along the long side."""

    def protocol(cfg: Config) -> Protocol:
        side = cfg.augmentation.input_size
        return Protocol(EvalSpec(sampling_of(cfg), clips, "three_vjepa2", side, side, "tsm"), family="vjepa2")

    return protocol


#: {value of --protocol: the function that makes it for an experiment}. Sources: each tool's published test settings.
PRESETS: dict[str, Callable[[Config], Protocol]] = {
    "tsn-25x10": _tsn_25x10,
    "tsm-efficient": _tsm_efficient,
    "tsm-accurate": _tsm_accurate,
    "k400-10x3": _k400_10x3,
    "pptsn-tencrop": _pptsn_tencrop,
    "sth-2x3": _sth_2x3,
    "videomae-5x3": _videomae(5),
    "videomae-2x3": _videomae(2),
    "vjepa2-8x3": _vjepa2(8),
    "vjepa2-2x3": _vjepa2(2),
}


@functools.cache
def nested_clips(sampling: Sampling, kept: int, clips: int) -> list[int] | None:
    """Return where the `clips` clips of a smaller evaluation are among `kept` ones; None if they are not.

    The sampling rule itself decides, on videos of many lengths and frame rates.
    """
    # possible[i, j]: clip i of the smaller evaluation was clip j of the larger one in all videos so far
    possible = np.ones((clips, kept), bool)
    for fps in (25.0, 30.0, 59.94):
        # every short length, where clips overlap or repeat frames, and some long ones
        for frames in (*range(1, 150), 173, 250, 251, 299, 300, 301, 750, 1001):
            large = test_frames(sampling, frames, fps, kept)
            small = test_frames(sampling, frames, fps, clips)
            possible &= (small[:, None] == large[None]).all(axis=2)
        if not possible.any(axis=1).all():
            return None
    return possible.argmax(axis=1).tolist()


@functools.cache
def nested_crops(kept: str, rule: str) -> list[int] | None:
    """Return the indices of the crops of `rule` among those of rule `kept`; None if they are not."""
    large, small = EVAL_CROPS[kept], EVAL_CROPS[rule]
    possible = np.ones((len(small), len(large)), bool)
    # videos of many shapes, wide and tall: equal rounding on one shape may be chance
    for long in range(256, 470, 7):
        for w, h in ((long, 256), (256, long)):
            crop = 256 if large.whole_side or small.whole_side else 224
            there = [(box, flip) for _, box, flip in large.views(w, h, crop)]
            for row, (_, box, flip) in enumerate(small.views(w, h, crop)):
                possible[row] &= [view == (box, flip) for view in there]

    return possible.argmax(axis=1).tolist() if possible.any(axis=1).all() else None
