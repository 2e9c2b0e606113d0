"""Measure UT-Interaction set 2, 60 packed XviD files: scan, three dumps, training, evaluation, prediction."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from utils.log import read_scalars

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
LISTS = SHARED / "lists" / "ut_interaction2"
CONFIG = """\
common:
    model: {{type: tsn, backbone: mobilenetv2, num_segments: 3, num_class: 6, pretrained: False}}
    augmentation: {{input_size: 64, test_resize: 72, crop: multi_scale}}
    data: {{reader: video, sampling: tsn, bad_budget: 0.0, on_bad: error, metadata: {metadata}}}
    workers: 2
    batch_size: 6
    lr_scheduler: {{type: COSINE, base_lr: 0.01, warmup_steps: 2, warmup_lr: 0.02, max_iter: {steps}}}
    val_freq: {steps}
    print_freq: 2
    train_root: {data}
    train_source: {lists}/all.txt
    val_root: {data}
    val_source: {lists}/all.txt
"""
FORMS = ("frames", "packs", "clips")
STEPS = 12  # of 6 clips: each video is seen at least once


def full_decode(path: Path) -> list[np.ndarray]:
    """Decode a file from the start with OpenCV, which shares no code with the readers: (H, W, 3) BGR each."""
    capture, images = cv2.VideoCapture(str(path)), []
    while True:
        there, image = capture.read()
        if not there:
            return images
        images.append(image)


def command(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of our commands."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = tuple(map(str, argv))
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def counts_in(list_file: Path) -> dict[str, int]:
    """Frames of each video by its name without ending, from a list `path num_frames label`."""
    rows = [line.split() for line in list_file.read_text().splitlines()]
    return {Path(row[0]).stem: int(row[1]) for row in rows}


def pixels_equal(truth: dict[str, list[np.ndarray]], rng: random.Random) -> int:
    """Return the number of videos of which frames at random differ by more than the rounding of another swscale."""
    from datasets.lists.records import Records
    from datasets.readers import open_reader
    from tests.datasets.specs import reader_spec

    records = Records.load(LISTS / "all.txt", SHARED, num_class=None)
    reader, differing = open_reader(reader_spec("video"), records), 0
    for i in range(len(records)):
        images = truth[Path(records.path(i)).stem]
        metadata = reader.probe(i)
        chosen = [0, len(images) - 1, *rng.sample(range(len(images)), 4)]
        out = np.empty((len(chosen), metadata.height, metadata.width, 3), np.uint8)
        reader.read(i, np.array(chosen), None, (metadata.height, metadata.width), out)
        apart = [np.abs(out[k, ..., ::-1].astype(int) - images[n]).mean() for k, n in enumerate(chosen)]
        differing += int(max(apart) > 1.0)
    reader.close()
    return differing


def row() -> dict:
    """Measure the row."""
    if not LISTS.is_dir():
        return {"measured": "skipped: the shared data are not here", "holds": False}
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(1 << 30))
    truth = {path.stem: full_decode(path) for path in sorted((SHARED / "ut_interaction2").glob("*.avi"))}
    counts = {name: len(images) for name, images in truth.items()}
    measured: dict[str, object] = {"seed": seed, "videos": len(counts), "frames": sum(counts.values())}
    measured["videos with other pixels"] = pixels_equal(truth, random.Random(seed))
    del truth
    lines_printed: list[str] = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)

        def run(name: str, *argv: str | Path) -> None:
            done = command(*argv)
            lines_printed.extend((done.stdout + done.stderr).splitlines())
            measured[name] = "ok" if done.returncode == 0 else f"exit {done.returncode}: {done.stderr[-300:]}"

        run("scan", "main.py", "scan", LISTS / "all.txt", "--root", SHARED, "--out", folder / "scan", "--decode", "all")
        equal = {"scan": counts_in(folder / "scan/all.clean.txt") == counts}
        for form in FORMS:
            words = ["--as", form, "--root", SHARED, "--short-side", "72"]
            run(f"dump {form}", "main.py", "dump", LISTS / "all.txt", folder / form, *words)
            equal[form] = counts_in(folder / form / "all.txt") == counts
        for name, metadata in (("exp", "null"), ("with_metadata", folder / "scan/metadata.bin")):
            exp = folder / name
            exp.mkdir()
            text = CONFIG.format(data=SHARED, lists=LISTS, steps=STEPS, metadata=metadata)
            (exp / "config.yaml").write_text(text)
            run(f"train {name}", "-m", "launch", "train", exp, "local", "2")
            run(f"eval {name}", "-m", "launch", "eval", exp, "local", "2")
        curves = [read_scalars(folder / name / "events/scalars.jsonl") for name in ("exp", "with_metadata")]
        losses = [curve.get("loss_train", []) for curve in curves]
        equal["loss with and without metadata"] = len(losses[0]) == STEPS // 2 and losses[0] == losses[1]
        words = ["--checkpoint", "latest", "--out", folder / "predicted"]
        run("predict", "main.py", "predict", folder / "exp", SHARED / "ut_interaction2", *words)
        answers = json.loads((folder / "predicted/infer.json").read_text())
        equal["predict"] = {Path(one["source"]).stem: one["frames"] for one in answers["videos"]} == counts
        log = "".join((folder / name / "log.txt").read_text() for name in ("exp", "with_metadata"))
    lines_printed += log.splitlines()
    measured["counts equal to a full decode"] = equal
    lines = [line for line in lines_printed if "bad sample" in line or "  bad: " in line or "cannot be read" in line]
    measured["bad lines"] = lines[:3]
    ok = all(value == "ok" for name, value in measured.items() if name.split()[0] in _COMMANDS)
    holds = ok and all(equal.values()) and not lines and not measured["videos with other pixels"] and len(counts) == 60
    return {"measured": measured, "holds": holds}


_COMMANDS = ("scan", "dump", "train", "eval", "predict")


if __name__ == "__main__":
    print(json.dumps(row()))
