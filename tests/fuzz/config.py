"""Damaged `config.yaml` texts and `--set` values: each is refused in one sentence, or gives a config that prints."""

from __future__ import annotations

import copy
import functools
import json
import random
from pathlib import Path
from typing import Any

from tests.fuzz import mutators
from tests.fuzz.runner import ROOT
from utils import config
from utils.config import verb, yaml_lines
from utils.errors import UserError

NAME = "config"
MODULES = [
    "utils/config/kinds.py",
    "utils/config/lengths.py",
    "utils/config/loader.py",
    "utils/config/model_options.py",
    "utils/config/rules.py",
    "utils/config/yaml_lines.py",
]
OVERRIDES = b"\0"  # what follows it are `--set` values, one per line
_VIDEOS = 1000

_STEPS = b"""\
common:
    model:
        type: tsm
        backbone: resnet50
        num_segments: 8
        num_class: 51
        dropout: 0.5
        pretrained: false
        kwargs: {bn_group_size: 2, bn_sync_stats: true, shift_div: 8}
    augmentation: &pixels
        input_size: 224
        test_resize: 256
        scales: [1, 0.875, 0.75]
        colorjitter: [0.2, 0.2, 0.2, 0.1]
        random_erasing: [0.5, 0.02, 0.4, 0.3]
        mix_up: 0.2
        mean: [0.485, 0.456, 0.406]
    batch_size: 8
    workers: 2
    shards: 4
    lr_scheduler:
        type: STEP
        base_lr: 0.001
        warmup_epochs: 1
        warmup_lr: 0.01
        max_epoch: 50
        lr_epochs: [20, 40]
        lr_mults: [0.1, 0.1]
    val_freq_epochs: 5
    label_smooth: 0.1
    no_wd: bn
    clip_grad: 20
    ema: 0.999
    precise_bn: {batches: 10, every_epochs: 5}
    train_root: /data
    train_source: /data/train.txt
    val_root: /data
    val_source: /data/val.txt
    data:
        reader: memcached
        memcached: {servers: ["10.0.0.5:11211", "unix:/tmp/s"], namespace: a}
        template: img_{:05d}.jpg
        frame_base: 1
        sampling: tsm_dense
        flip_labels: [[left, right], [2, 3]]
    published: {top1: 70.1, gpus: 8, source: "paper"}
"""
_DISTILLED = b"""\
common:
    model: {type: slowfast, backbone: resnet50, num_segments: 1, num_class: 400}
    batch_size: 4
    lr_scheduler: {type: COSINE, base_lr: 0.01, max_iter: 1000, warmup_steps: 10, warmup_lr: 0.1}
    val_freq: 100
    train_root: a
    train_source: b
    val_root: c
    val_source: d
    data: {clip_len: 32, frame_interval: 2, sampling: pyslowfast}
    distill: {teacher: teacher.pth, kind: kd, temperature: 2, weight: 0.5}
"""
_SET = b"common.batch_size=16\nlr_scheduler.max_epoch=60\ndata.template=auto\naugmentation.mean=[0.5, 0.5, 0.5]"


@functools.cache
def seeds() -> list[bytes]:
    """The texts above, and shipped experiments of different kinds."""
    shipped = sorted((ROOT / "exps").glob("*_exps/*/*/config.yaml"))
    return [_STEPS, _DISTILLED, _STEPS + OVERRIDES + _SET, *(file.read_bytes() for file in shipped[::8])]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Change values and keys of the parsed tree, or the text."""
    text, zero, overrides = data.partition(OVERRIDES)
    how = rng.randrange(10)
    if how < 6:
        document = yaml_lines.parse(text.decode())
        tree = _changed(rng, document.value)
        text = _dumped(tree).encode("utf-8", "surrogatepass")
    elif how < 9 or not zero:
        text = mutators.some(rng, text, mutators.TEXT if how < 8 else mutators.BYTES, 3)
    if zero:
        overrides = mutators.some(rng, overrides, mutators.TEXT, 2) if rng.random() < 0.5 else overrides
        overrides = overrides.replace(OVERRIDES, b"")
    return text.replace(OVERRIDES, b"") + zero + overrides


def run(data: bytes, folder: Path) -> str:
    """Load, resolve for 1,000 videos, print, and load what was printed."""
    text, _, overrides = data.partition(OVERRIDES)
    file = folder / "config.yaml"
    file.write_bytes(text)
    values = [line for line in overrides.decode("utf-8", "replace").split("\n") if line]
    try:
        cfg = config.load(file, values)
    except UserError as error:
        _one_sentence(error)
        document = yaml_lines.read(file)
        return "stage0" if document.value is None else "refused"
    printed = folder / "printed.yaml"
    printed.write_text(verb.as_yaml(cfg), encoding="utf-8")
    config_dict = config.to_dict(cfg)
    for again in (config.from_dict(json.loads(json.dumps(config_dict))), config.load(printed)):
        if config.to_dict(again) != config_dict:
            raise AssertionError(f"another config comes back: {config.differences(config_dict, config.to_dict(again))}")
    try:
        config.resolve_lengths(cfg, _VIDEOS, cfg.batch_size * (cfg.shards or 1))
    except UserError as error:
        _one_sentence(error)
    return "ok"


def _one_sentence(error: UserError) -> None:
    """A message names a place in each line and is short enough to be read."""
    longest = max(map(len, str(error).splitlines()))
    if longest > 2000:
        raise AssertionError(f"a line of the message has {longest} characters")


_VALUES: list[Any] = [
    None, True, False, "", "auto", "false", "x" * 5000, "../../{:05d}", "{:999999999d}", "{:5d}/{:5d}", "\u202e",
    "/dev/zero", "-", [], {}, [[]], [None], {"a": 1}, 1e308, -1e308, 1e-308, 1e25, float("inf"), float("nan"),
    10**30, -1, 0, 1, 2, 0.5, "tsn", "10.0.0.1:0", "unix:/",
]  # fmt: skip


def _changed(rng: random.Random, tree: Any) -> Any:
    """A copy of a tree with 1 to 3 changes."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        place, key = _place(rng, tree)
        if place is None:
            return copy.deepcopy(rng.choice(_VALUES))
        match rng.randrange(8):
            case 0:
                del place[key]
            case 1 if isinstance(place, dict):
                place[rng.choice(("", "type", "x" * 300, f"{key}s", "common"))] = place[key]
            case 2:
                place[key] = [place[key]] * (rng.choice((1, 2, 400)) if not isinstance(place[key], (dict, list)) else 2)
            case 3:
                place[key] = {"a": place[key]}
            case 4 | 5:
                place[key] = rng.choice(mutators.NUMBERS)
            case _:
                place[key] = copy.deepcopy(rng.choice(_VALUES))  # a change of it must not change the table
    return tree


def _place(rng: random.Random, tree: Any) -> tuple[Any, Any]:
    """A drawn (container, key or index) of a tree; (None, None) where there is none."""
    place, key = None, None
    node = tree
    while isinstance(node, (dict, list)) and node and not (place is not None and rng.random() < 0.25):
        place = node
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = node[key]
    return place, key


def _dumped(tree: Any) -> str:
    """As JSON, which is YAML too, one value a line."""
    return json.dumps(tree, indent=1, ensure_ascii=False).replace("NaN", ".nan").replace("Infinity", ".inf")
