"""Numbers and texts that no experiment means: refused while the config is read, with the reason."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest

from utils import config
from utils.config import model_options, schema, verb
from utils.errors import UserError

BASE = """\
common:
    model: {type: tsn, backbone: resnet18, num_segments: 3, num_class: 4}
    batch_size: 8
    lr_scheduler: {type: STEP, base_lr: 0.01, max_iter: 100, lr_steps: [50], lr_mults: [0.1]}
    val_freq: 50
    train_root: /
    train_source: /nowhere/train.txt
    val_root: /
    val_source: /nowhere/val.txt
"""
HUGE = ("1e35", str(10**36), "1e308", "1e309", "-1", "-1e308", ".inf", ".nan", "9" * 5000)


def refusal(folder: Path, *overrides: str) -> str:
    """The message, of which every line is short enough to be read."""
    (folder / "config.yaml").write_text(BASE)
    with pytest.raises(UserError) as caught:
        config.load(folder, overrides)
    text = str(caught.value)
    assert max(map(len, text.splitlines())) < 700, text
    assert "Traceback" not in text
    return text


def _holds_numbers(kind: Any) -> bool:
    if kind in (int, float):
        return True
    return any(map(_holds_numbers, typing.get_args(kind)))


NUMBERS = [key for key, info in schema.leaves() if _holds_numbers(info.annotation)]
LISTS = [
    "augmentation.scales", "augmentation.area", "augmentation.aspect", "augmentation.colorjitter",
    "augmentation.random_erasing", "augmentation.mean", "augmentation.std", "lr_scheduler.lr_steps",
    "lr_scheduler.lr_epochs", "lr_scheduler.lr_mults", "data.flip_labels", "optimizer.betas",
]  # fmt: skip


def test_every_number_of_the_schema_is_looked_at() -> None:
    assert len(NUMBERS) > 40
    assert set(LISTS) < set(NUMBERS)


@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in LISTS])
@pytest.mark.parametrize("value", HUGE)
def test_no_key_takes_a_number_beyond_reason(tmp_path: Path, key: str, value: str) -> None:
    if (key, value) == ("clip_grad", "-1"):
        value = "-2"
    assert f"common.{key}: " in refusal(tmp_path, f"{key}={value}")


@pytest.mark.parametrize("key", LISTS)
@pytest.mark.parametrize("value", ["1e25", "1e308", "-1", ".nan"])
def test_no_list_takes_a_number_beyond_reason(tmp_path: Path, key: str, value: str) -> None:
    length = {"mean": 3, "std": 3, "colorjitter": 4, "random_erasing": 4, "area": 2, "aspect": 2, "betas": 2}
    count = length.get(key.rpartition(".")[2], 1)
    numbers = f"[[{value}, 2]]" if key.endswith("flip_labels") else f"[{', '.join([value] * count)}]"
    assert f"common.{key}: " in refusal(tmp_path, f"{key}={numbers}")


def test_every_upper_limit_is_documented_and_has_a_reason() -> None:
    table = dict(re.findall(r"\| `([\w.]+)` \| [^|]* \| ([^|]*) \|", verb.markdown()))
    for key, info in schema.leaves():
        if not _holds_numbers(info.annotation) or key in ("data.frame_base", "seed"):
            continue
        assert "<" in table[key] or key in ("augmentation.colorjitter", "augmentation.random_erasing"), key
        extra = info.json_schema_extra
        natural = re.search(r"<=? (1|100|2)$", table[key]) or "<= 1000" in table[key] or ">= 1e-" in table[key]
        assert isinstance(extra, dict)
        assert extra["why"] or natural or key in LISTS, key


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["workers=100000"], "must be at most 1,024, not 100000: each is a process"),
        (["batch_size=10000000"], "must be at most 100,000, not 10000000: one GPU holds all of them at once"),
        (["model.num_segments=100000000"], "at most 10,000, not 100000000: no machine has memory for a clip"),
        (["data.clip_len=100000000"], "at most 10,000"),
        (["data.prefetch=1000000000"], "at most 10,000"),
        (["shards=1000000000"], "at most 100,000, not 1000000000: there is one per GPU"),
        (["precise_bn.batches=1000000000000"], "at most 1,000,000"),
        (["augmentation.test_resize=4294967296"], "at most 8,192, not 4294967296: no video is larger"),
        (["print_freq=10000000000000000000000000"], "at most 1,000,000"),
        (["weight_decay=1e308"], "at most 100, not 1e+308: it pulls every weight to 0"),
        (["lr_scheduler.base_lr=1e308"], "at most 1e+30, not 1e+308: training diverges"),
        (["data.template=../../{:05d}"], "no leading / and no .."),
        (["data.template=/etc/{:05d}"], "no leading / and no .."),
        (["data.template='{:999999999d}'"], "a frame number has at most 20 digits"),
        (["data.template='{:0999d}'"], "a frame number has at most 20 digits"),
        (["data.template='{0.__class__}{}'"], "a file name with one frame number"),
        ([f"train_source={'x' * 5000}"], "at most 4000 characters, not 5000"),
        ([f"train_source=/a/{'x' * 300}/b"], "names a file of 300 bytes"),
        ([r'train_root="a\0b"'], "control characters"),
        ([r'val_source="a\ud800b"'], "halves of surrogate pairs"),
        ([r'data.memcached.namespace="a\nb"'], "control characters"),
        (["data.memcached.servers=['10.0.0.1:0']"], "is not a server"),
        (["data.memcached.servers=['10.0.0.1:99999']"], "is not a server"),
        ([f"data.memcached.servers=[{', '.join(['a:1'] * 5001)}]"], "at most 5,000 servers"),
        ([f"lr_scheduler.lr_steps=[{', '.join(map(str, range(1, 1002)))}]"], "at most 1000 numbers, not 1001"),
        (["lr_scheduler.lr_mults=[1e6]", "lr_scheduler.base_lr=1e25"], "the factors raise the learning rate to 1e+31"),
        (["model.kwargs.fc_std=1e308"], "must lie between -65,536 and 65,536"),
        (["model.kwargs.fc_std=.inf"], "must be a finite number"),
        ([f"model.kwargs.bn_group_size={10**9}"], "at most 100,000"),
        (["model.backbone=mobilenetv2", f"model.kwargs.t={10**9}"], "must lie between -65,536 and 65,536"),
        ([f"model.kwargs.{'x' * 5000}=1"], "not an option"),
        ([f"{'x' * 5000}=1"], "unknown key"),
        (
            ["batch_size=50000", "model.num_segments=32"],
            "50,000 clips of 32 frames of 224 x 224 pixels take 963.4 GB as 32-bit numbers (batch_size x num_segments "
            "x clip_len x input_size^2 x 12 bytes), and no GPU has more than 500.0 GB",
        ),
        (["batch_size=1024", "data.prefetch=10000"], "10,000 micro-batches read ahead take 4.6 TB of memory"),
    ],
)  # fmt: skip
def test_refusals_say_why(tmp_path: Path, overrides: list[str], says: str) -> None:
    assert says in refusal(tmp_path, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["workers=256"],
        ["shards=10000", "model.kwargs.bn_group_size=10000"],
        ["batch_size=4096", "model.num_segments=8"],
        ["model.num_segments=64", "data.clip_len=1", "batch_size=128"],
        ["model.num_segments=1", "data.clip_len=256", "data.frame_interval=30", "batch_size=64"],
        ["model.num_class=100000"],
        ["augmentation.input_size=2160", "augmentation.test_resize=2160", "batch_size=1"],
        ["lr_scheduler.base_lr=30", "lr_scheduler.max_iter=10000000"],
        ["save_minutes=1000000", "watchdog_minutes=100000"],
        ["data.template=rgb/img_{:010d}.jpg"],
        ["data.template=a..b{}.jpg"],
        ["clip_grad=1e6", "ema=0.99999"],
    ],
)
def test_what_large_experiments_use_is_accepted(tmp_path: Path, overrides: list[str]) -> None:
    (tmp_path / "config.yaml").write_text(BASE)
    config.load(tmp_path, overrides)


def test_a_run_of_billions_of_iterations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        BASE.replace("max_iter: 100, lr_steps: [50]", "max_epoch: 900, lr_epochs: [5]")
    )
    cfg = config.load(tmp_path, ["batch_size=1"])
    with pytest.raises(UserError, match="the run has 9,000,000,000 iterations; at most 1,000,000,000"):
        config.resolve_lengths(cfg, 10_000_000, 1)


def test_the_limits_of_options_hold_inside_lists_of_lists() -> None:
    assert model_options.excess(((1, 2), (3, 4))) is None
    assert "must lie between" in str(model_options.excess(((1, 2), (3, 10**9))))
    assert "must be a finite number" in str(model_options.excess(((1.0, float("nan")),)))
