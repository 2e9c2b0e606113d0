from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from anal_tools.evaluate import protocols
from anal_tools.evaluate.protocols import Protocol, choose, nested_clips, nested_crops, parse_views
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec
from utils.errors import UserError


def config(sampling: str = "tsn", segments: int = 8, length: int = 1, interval: int = 1, **more: Any) -> Any:
    return SimpleNamespace(
        augmentation=SimpleNamespace(input_size=224, test_resize=256),
        data=SimpleNamespace(sampling=sampling, clip_len=length, frame_interval=interval),
        model=SimpleNamespace(num_segments=segments),
        val_dense=more.get("val_dense", False),
    )


def test_without_options_it_is_what_training_validates_with() -> None:
    protocol = choose(config())
    assert protocol == Protocol(EvalSpec(Sampling("tsn", 8), 1, "centre", 256, 224))
    assert protocol.text == (
        "1 clip(s) x 1 crop(s) = 1 view(s) of 8 frames, 224 pixels from short side 256 (centre), mean of softmax"
    )
    assert choose(config(val_dense=True)).spec.crops == "ten"


VIDEOMAE, VJEPA2 = config("videomae", 1, 16, 4), config("vjepa2", 1, 16, 4)
VJEPA2.augmentation.input_size = 256
PUBLISHED = {
    # name: (config, sampling, clips, crops, scale, crop, rounding, average)
    "tsn-25x10": (config("mmaction2_0x", 3), Sampling("tsn", 25), 1, "ten", 256, 224, "tsm", "logit"),
    "tsm-efficient": (config(), Sampling("tsn", 8), 1, "centre_tsm", 256, 224, "tsm", "logit"),
    "tsm-accurate": (config("tsm_dense"), Sampling("tsm_dense", 8), 10, "three_tsm", 256, 256, "tsm", "logit"),
    "k400-10x3": (
        config("pyslowfast", 1, 8, 8),
        Sampling("pyslowfast", 1, 8, 8),
        10,
        "three_pyslowfast",
        256,
        256,
        "pyslowfast",
        "prob",
    ),
    "pptsn-tencrop": (config("pp", 3), Sampling("pp", 3), 1, "ten", 256, 224, "tsm", "logit"),
    "sth-2x3": (config("one_per_segment"), Sampling("tsn", 8), 2, "three_tsm", 256, 256, "tsm", "logit"),
    "videomae-5x3": (VIDEOMAE, Sampling("videomae", 1, 16, 4), 5, "three", 224, 224, "tsm", "prob"),
    "videomae-2x3": (config("tsn", 16), Sampling("tsn", 16), 2, "three", 224, 224, "tsm", "prob"),
    "vjepa2-8x3": (VJEPA2, Sampling("vjepa2", 1, 16, 4), 8, "three_vjepa2", 256, 256, "tsm", "prob"),
    "vjepa2-2x3": (VJEPA2, Sampling("vjepa2", 1, 16, 4), 2, "three_vjepa2", 256, 256, "tsm", "prob"),
}


@pytest.mark.parametrize("name", sorted(protocols.PRESETS))
def test_published_protocols(name: str) -> None:
    cfg, *expected = PUBLISHED[name]
    protocol = choose(cfg, protocol=name)
    spec = protocol.spec
    sizes = [spec.scale, spec.crop_size, spec.rounding]
    assert [spec.sampling, spec.num_clips, spec.crops, *sizes, protocol.average] == expected
    assert protocol.name == name
    assert name in protocol.text
    assert Protocol.from_dict(protocol.to_dict()) == protocol


def test_crops_of_ten_clips_are_those_of_the_clips_tool() -> None:
    for sampling, crops, rounding in (
        ("mmaction2_1x", "three_mmaction2", "mmaction2"),
        ("mmaction2_0x", "three_mmaction2", "mmaction2"),
        ("pyslowfast", "three_pyslowfast", "pyslowfast"),
    ):
        spec = choose(config(sampling, 1, 8, 8), protocol="k400-10x3").spec
        assert (spec.crops, spec.rounding) == (crops, rounding)
    dense = choose(config("tsm_dense"), protocol="k400-10x3").spec
    assert (dense.crops, dense.rounding) == ("three_tsm", "tsm")
    assert choose(config(), protocol="tsm-accurate").spec.num_clips == 2


def test_changes_of_a_protocol() -> None:
    cfg = config("pyslowfast", 1, 8, 8)
    small = choose(cfg, protocol="k400-10x3", views="1x1", scale=112)
    assert (small.spec.num_clips, small.spec.crops, small.spec.scale, small.spec.crop_size) == (
        1,
        "centre_pyslowfast",
        112,
        112,
    )
    assert choose(cfg, protocol="k400-10x3", scale=320, crop_size=256).spec.crop_size == 256
    assert choose(cfg, views="10x3").spec.crops == "three"
    assert choose(cfg, views="10crop").spec.num_clips == 1
    assert choose(cfg, average="sum").average == "sum"
    assert choose(cfg, per_position=True).window == 7
    cfg.augmentation.input_size = 112
    assert choose(cfg, per_position=True).window == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"views": "5crop"}, "--views 5crop: give centre, 3crop, 10crop"),
        ({"views": "0x3"}, "--views 0x3"),
        ({"views": "10x4"}, "--views 10x4"),
        ({"views": "3x1"}, "3 test clips are not defined for sampling preset 'tsn'"),
        ({"protocol": "k400-10x"}, "did you mean .*k400-10x3"),
        ({"protocol": "k400-10x3"}, "10 test clips are not defined for sampling preset 'tsn'"),
        ({"average": "mean"}, "--average mean"),
        ({"average": "logit", "per_position": True}, "--per-position gives probabilities"),
        ({"crop_size": 300}, "crop of 300 pixels does not fit"),
    ],
)
def test_what_cannot_be_done_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose(config(), **options)


def test_parse_views() -> None:
    assert [parse_views(text) for text in ("centre", "3crop", "10crop", "10x3", "25x10", "1x1")] == [
        (1, 1), (1, 3), (1, 10), (10, 3), (25, 10), (1, 1),
    ]  # fmt: skip


def test_which_clips_nest() -> None:
    pyslowfast = Sampling("pyslowfast", 1, 8, 8)
    assert nested_clips(pyslowfast, 10, 1) == [5], "PySlowFast's view 5 of 10 stands in the middle"
    assert nested_clips(pyslowfast, 10, 5) == [0, 2, 4, 6, 8]
    assert nested_clips(pyslowfast, 10, 3) is None
    assert nested_clips(Sampling("mmaction2_1x", 1, 8, 8), 10, 1) is None, "its ten clips end at the ends of the video"
    assert nested_clips(Sampling("tsn", 8), 2, 1) == [0]


def test_which_crops_nest() -> None:
    assert nested_crops("three", "centre") == [1]
    assert nested_crops("three_pyslowfast", "centre_pyslowfast") == [1]
    assert nested_crops("three_mmaction2", "centre") == [2]
    assert nested_crops("three_pyslowfast", "centre") is None, "PySlowFast rounds the centre of an odd margin up"
    assert nested_crops("three_tsm", "centre_tsm") is None
    assert nested_crops("ten", "three") is None


def test_results_of_earlier_versions_are_understood() -> None:
    old = {"text": "", "views": 3, "average": "prob", "num_clips": 1, "crops": "three", "scale": 256, "crop_size": 224}
    protocol = Protocol.from_dict(old | {"sampling": {"preset": "tsn", "num_segments": 8}})
    assert protocol.spec.crops == "three_pyslowfast"
    assert protocol.family == "pyslowfast"
    assert protocol.name is None
