"""Small experiments that several measurements train, and what their runs are compared by."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from tests.benchmarks.rows import command

SMALL = """\
common:
    model:
        type: {method}
        backbone: resnet18
        num_segments: 2
        num_class: 8
        dropout: 0.5
        pretrained: False
        kwargs: {{bn_group_size: {group}, bn_sync_stats: {sync_stats}}}
    augmentation:
        input_size: 32
        test_resize: 36
        crop: random_resized
        colorjitter: [0.2, 0.2, 0.2, 0.1]
        random_erasing: [0.5, 0.02, 0.4, 0.3]
        mix_up: 0.2
    data: {{reader: video, sampling: tsn, flip: true}}
    val_dense: False
    workers: 1
    batch_size: 4
    lr_scheduler: {{type: COSINE, base_lr: 0.01, warmup_steps: 5, warmup_lr: 0.02, min_lr: 0.0, max_iter: {steps}}}
    label_smooth: 0.1
    no_wd: True
    momentum: 0.9
    weight_decay: 0.0001
    nesterov: True
    val_freq: {val_freq}
    print_freq: {print_freq}
    train_root: {data}
    train_source: {data}/lists/train.txt
    val_root: {data}
    val_source: {data}/lists/val.txt
"""


def small_experiment(folder: Path, data: Path, extra: str = "", **changes: object) -> Path:
    """A tiny experiment with every random part on, over demo videos."""
    values = {"method": "tsn", "group": 1, "sync_stats": True, "steps": 60, "val_freq": 20, "print_freq": 5}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(SMALL.format(data=data, **(values | changes)) + extra)
    return folder


def demo_videos(folder: Path, videos: int, val: int) -> Path:
    """A small motion data set."""
    if not (folder / "lists/val.txt").exists():
        command("main.py", "demo-data", "--out", folder, "--train", str(videos), "--val", str(val))
    return folder


PEOPLE = """\
common:
    model: {{type: tsm, backbone: resnet18, num_segments: 8, num_class: 4, dropout: 0.5, pretrained: False}}
    augmentation:
        input_size: 56
        test_resize: 64
        crop: random_resized
        area: [0.7, 1.0]
        colorjitter: [0.2, 0.2, 0.2, 0.0]
    data: {{reader: {reader}, sampling: tsn, flip: true, class_names: {lists}/classInd.txt}}
    val_dense: False
    workers: 1
    batch_size: 8
    lr_scheduler: {{type: COSINE, base_lr: 0.002, warmup_steps: 20, warmup_lr: 0.01, min_lr: 0.0, max_iter: 300}}
    label_smooth: 0.0
    no_wd: False
    momentum: 0.9
    weight_decay: 0.001
    nesterov: True
    val_freq: 100
    print_freq: 20
    train_root: {root}
    train_source: {lists}/train.txt
    val_root: {root}
    val_source: {lists}/val.txt
"""


def weizmann_experiment(folder: Path, shared: Path, root: Path, reader: str) -> Path:
    """The issue's settings: random-resized crop .7-1, flip, jitter .2, batch 8, lr .01, wd 1e-3."""
    folder.mkdir(parents=True)
    lists = shared / "lists" / "weizmann4"
    if reader == "frames":  # the dump's folders are named like the videos, without the ending
        lists = root / "lists"
    (folder / "config.yaml").write_text(PEOPLE.format(reader=reader, root=root, lists=lists))
    return folder


def dump_weizmann(shared: Path, target: Path) -> Path:
    """JPEG folders (quality 95) of weizmann4 and lists with their frame counts; made once."""
    import av
    import simplejpeg

    if (target / "lists").exists():
        return target
    for path in sorted((shared / "weizmann4").rglob("*.mp4")):
        folder = target / path.relative_to(shared).with_suffix("")
        folder.mkdir(parents=True)
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0), start=1):
                pixels = frame.to_ndarray(format="rgb24")
                (folder / f"img_{number:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=95))
    (target / "lists").mkdir()
    for name in ("train.txt", "val.txt", "classInd.txt"):
        text = (shared / "lists/weizmann4" / name).read_text()
        (target / "lists" / name).write_text(text.replace(".mp4 ", " "))
    return target


def fingerprint(exp: Path) -> str:
    """sha256 over weights, BN buffers, momentum and every logged loss (of each iteration the last record)."""
    import torch

    state = torch.load(exp / "ckpt.pth.tar", weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in sorted(state["model"].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for key, values in sorted(state["optimizer"]["state"].items()):
        digest.update(str(key).encode() + values["momentum_buffer"].numpy().tobytes())
    digest.update(json.dumps(sorted(logged_losses(exp).items())).encode())
    digest.update(repr((state["step"], state["best_metric"])).encode())
    return digest.hexdigest()


def logged_losses(exp: Path) -> dict[int, str]:
    """Iteration -> the loss and accuracy text of its log line; a re-run iteration must have logged the same."""
    losses: dict[int, str] = {}
    for match in re.finditer(
        r"Iter: \[(\d+)/\d+\].*?(Loss \S+ \(\S+\)\s+Prec@1 .*?)\s+LR", (exp / "log.txt").read_text()
    ):
        step, text = int(match[1]), match[2]
        if losses.setdefault(step, text) != text:
            raise RuntimeError(f"iteration {step} logged {losses[step]!r}, and {text!r} when it was run again")
    return losses
