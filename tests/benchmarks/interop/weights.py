"""Weights of others: logits beside the peers' own, hostile files; the demo through predict and export."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.rows import ROOT, SHARED, command, copy_experiment, environment, run_rows, train, workspace

TOOLS = SHARED.parent / "tools"
CONFIG = """\
common:
    model: {{type: {type}, backbone: resnet50, num_segments: {segments}, num_class: 400, kwargs: {kwargs}}}
    augmentation: {{input_size: {size}, test_resize: {size}}}
    data: {{sampling: mmaction2_1x, clip_len: {frames}, frame_interval: {interval}}}
    batch_size: {batch}
    lr_scheduler: {{type: COSINE, base_lr: 0.01, max_iter: 10}}
    weight_decay: 0.0001
    val_freq: 10
    train_root: .
    train_source: train.txt
    val_root: .
    val_source: val.txt
"""
# MMAction2's own configurations (`peers bench-step MODEL`) in our words.
SLOWFAST = "{alpha: 4, fusion_kernel: 5, lateral_norm: False, slow_index: strided, slow_first: False}"
MODELS = {
    "tsn": {"type": "tsn", "segments": 8, "frames": 1, "interval": 1, "kwargs": "{}"},
    "tsm": {"type": "tsm", "segments": 8, "frames": 1, "interval": 1, "kwargs": "{}"},
    "slowonly": {"type": "slowonly", "segments": 1, "frames": 8, "interval": 8, "kwargs": "{}"},
    "slowfast": {"type": "slowfast", "segments": 1, "frames": 32, "interval": 2, "kwargs": SLOWFAST},
    "tpn_slowonly": {"type": "tpn", "segments": 1, "frames": 8, "interval": 8, "kwargs": "{}"},
}


def experiment(folder: Path, model: str, *, size: int = 96, batch: int = 2) -> Path:
    """An experiment folder with nothing but a config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.format(size=size, batch=batch, **MODELS[model]))
    return folder


def parity() -> dict:
    """Every case of the parity set through tests/parity_entry.py."""
    argv = [
        sys.executable,
        TOOLS / "parity-expand",
        "--check",
        "tests.parity_entry:logits",
        SHARED / "golden" / "parity",
    ]
    done = subprocess.run(
        [*map(str, argv)],
        cwd=ROOT,
        env=environment({"OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    errors = {line["case"]: line.get("rel_err") for line in lines}
    bad = [line for line in lines if not line["ok"]]
    known = [error for error in errors.values() if error is not None]
    figures = {
        "cases": len(lines),
        "worst": max(known, default=None),
        "above_1e-5": [c for c, e in errors.items() if e and e > 1e-5],
    }
    return {"measured": figures | {"failed": bad}, "holds": not bad and len(lines) >= 31 and done.returncode == 0}


class _Canary:
    """Makes a folder when its pickle is run."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def hostile(work: Path) -> dict:
    """Files that would run code, and cut ones, through convert, eval's checkpoint and predict."""
    import torch

    import main

    work.mkdir(parents=True, exist_ok=True)
    exp = experiment(work / "exp", "tsn")
    canary, files = work / "CANARY", {}
    bad = {"state_dict": {"w": torch.zeros(2)}, "extra": _Canary(canary)}
    for suffix in (".pth", ".pth.tar", ".pyth"):
        for zipped in (True, False):
            files[f"{'zip' if zipped else 'legacy'}{suffix}"] = lambda path, z=zipped: torch.save(
                bad, path, _use_new_zipfile_serialization=z
            )
    for suffix in (".pkl", ".pdparams", ".pth"):
        for protocol in (0, 2, 4, 5):
            files[f"pickle{protocol}{suffix}"] = lambda path, p=protocol: path.write_bytes(
                pickle.dumps({"blobs": {"w": _Canary(canary)}}, p)
            )
    good = work / "good.pth"
    torch.save({"state_dict": {f"layer{i}.w": torch.zeros(500) for i in range(20)}}, good)
    for suffix in (".pth", ".pyth", ".pkl", ".pdparams", ".safetensors"):
        for share in (0, 10, 50, 99):
            files[f"cut{share}{suffix}"] = lambda path, s=share: path.write_bytes(
                good.read_bytes()[: good.stat().st_size * s // 100]
            )
    wrong = []
    for name, write in files.items():
        path = work / name
        write(path)
        for argv in (
            ("convert", path),
            ("convert", path, "--config", exp, "--out", work / "out.pth.tar"),
            ("predict", exp, good, "--checkpoint", path, "--out", work / "p"),
        ):
            with contextlib.redirect_stderr(io.StringIO()) as heard, contextlib.redirect_stdout(io.StringIO()):
                code = main.main([str(word) for word in argv])
            output = heard.getvalue()
            if code != 2 or name not in output or ("mkdir" not in output and not name.startswith("cut")):
                wrong.append({"file": name, "verb": argv[0], "code": code, "said": output[:300]})
        if canary.exists():
            wrong.append({"file": name, "canary": True})
            canary.rmdir()
    return {"measured": {"files": len(files), "wrong": wrong}, "holds": not wrong}


def demo_model(work: Path) -> Path:
    """The demo's experiment with a trained checkpoint: $ZOETROPE_DEMO_EXP, the repository's own, or trained here."""
    name = "demo_exps/tsm_resnet18/motion8"
    for folder in (os.environ.get("ZOETROPE_DEMO_EXP"), ROOT / "exps" / name):
        if folder and (Path(folder) / "ckpt_best.pth.tar").is_file():
            return Path(folder)
    if not (ROOT / "data" / "motion8").is_dir():
        command("main.py", "demo-data")
    exp = copy_experiment(name, work / "demo")
    train(exp, 2)
    return exp


def predict_and_export(work: Path) -> dict:
    """All of data/single through torch and onnxruntime with the demo's model; every odd file without a crash."""
    import numpy as np

    exp = demo_model(work)
    file, predictions = work / "demo.onnx", {}
    single = SHARED / "single"
    command("main.py", "export", exp, "--to", "onnx", "--out", file, "--check", single / "mmaction2" / "demo.mp4")
    command("main.py", "export", exp, "--to", "torch", "--out", work / "demo.pt2", "--check", single / "mmaction2")
    for name, extra in (("torch", ()), ("onnx", ("--engine", "onnx", "--model", file))):
        command("main.py", "predict", exp, single, *extra, "--logits", "--out", work / name)
        predictions[name] = json.loads((work / name / "infer.json").read_text())
    pairs = list(zip(predictions["torch"]["videos"], predictions["onnx"]["videos"], strict=True))
    gap = max(float(np.abs(np.array(a["logits"]) - np.array(b["logits"])).max()) for a, b in pairs)
    same = sum([t["label"] for t in a["top"]] == [t["label"] for t in b["top"]] for a, b in pairs)
    odd = sorted(path for path in (SHARED / "odd").rglob("*") if path.is_file())
    done = command("main.py", "predict", exp, *odd, "--out", work / "odd", "--srt", check=False)
    odd_results = json.loads((work / "odd" / "infer.json").read_text())
    counts = {"single": len(pairs), "same_top5": same, "logit_gap": gap, "odd_done": len(odd_results["videos"])}
    counts |= {"odd_named": len(odd_results["failed"]), "odd_files": len(odd), "odd_exit": done.returncode}
    whole = counts["odd_done"] + counts["odd_named"] == len(odd) and done.returncode == 1
    clean = "Traceback" not in done.stderr and not [key for key in REQUIRED if key not in odd_results]
    return {"measured": counts, "holds": same == len(pairs) and len(pairs) > 0 and gap <= 1e-4 and whole and clean}


REQUIRED = ("format", "model", "protocol", "classes", "videos", "failed")  # docs/predict.md


ROWS = {
    "parity": ("31 published formats, parity-expand --check", "each <= 1e-4 of the largest logit, no key left", parity),
    "hostile": (
        ".pkl, .pdparams, .pth, .pyth that run code; truncated",
        "refused with the name or the reason",
        lambda: hostile(workspace() / "hostile"),
    ),
    "predict_export": (
        "data/single by torch and onnxruntime",
        "same top-5, logits <= 1e-4, infer.json",
        lambda: predict_and_export(workspace()),
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
