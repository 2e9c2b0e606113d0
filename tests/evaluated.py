"""Result folders as an evaluation leaves them, made without one: chosen predictions for chosen videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anal_tools.evaluate import results
from anal_tools.evaluate.protocols import Protocol
from datasets.plan.metadata import VideoMetadata
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec, resolve_eval, view_table
from utils import files, metrics


def summary_of(result: results.Results) -> Mapping[str, Any]:
    """Return the summary, which has all keys when this version wrote it."""
    return result.summary


def write_results(
    exp: Path,
    *,
    labels: Sequence[int],
    logits: np.ndarray,
    names: Sequence[str],
    ids: Sequence[str] | None = None,
    frames: np.ndarray | None = None,
    views: Sequence[dict[str, Any]] = ({"clip": 0, "crop": 0, "place": "centre", "box": None, "flip": False},),
    name: str = "best",
    **summary: Any,
) -> Path:
    """Write `results/<name>/` and its summary; `logits` is (N, V, K), nan where a video could not be read."""
    parts = exp / "results" / name
    parts.mkdir(parents=True)
    count, width, _ = logits.shape
    ids = [f"dir with space/video {row} 7 8.mp4" for row in range(count)] if ids is None else ids
    frames = np.zeros((count, width, 1), np.int32) if frames is None else frames
    scores = metrics.merge_views(logits).astype(np.float32)
    (parts / "ids.txt").write_text("".join(json.dumps(path) + "\n" for path in ids))
    (parts / "views.json").write_text(json.dumps(list(views)))
    (parts / "ledger.jsonl").write_text("")
    arrays = {
        "labels": np.array(labels, np.int32),
        "logits": logits.astype(np.float32),
        "scores": scores,
        "frames": frames,
    }
    for key, array in arrays.items():
        np.save(parts / f"{key}.npy", array)
    failed = int(np.isnan(scores).any(axis=1).sum())
    text = {
        "class_names": list(names),
        "metrics": {},
        "protocol": Protocol(EvalSpec(Sampling("mmaction2_1x", 1, 8, 8), width, "centre")).to_dict(),
        "counts": {"videos": count, "scored": count - failed, "failed": failed},
        "failures": {},
        **summary,
    }
    (exp / "results" / f"{name}.json").write_text(json.dumps(text))
    return exp


def guessed(guesses: Sequence[int | None], classes: int, *, seed: int = 0, views: int = 1) -> np.ndarray:
    """Logits (N, V, K) with the wanted predictions, later videos a little more confident; None: could not be read."""
    noise = np.random.default_rng(seed).normal(0, 0.05, (len(guesses), views, classes))
    logits = noise.astype(np.float32)
    for row, guess in enumerate(guesses):
        if guess is None:
            logits[row] = np.nan
        else:
            logits[row, :, guess] += 2 + row / len(guesses)
    return logits


def motion_results(exp: Path, data: Path, guesses: Sequence[int | None], *, name: str = "best", **summary: Any) -> Path:
    """Results for the validation list of a small motion8 in `data`: real videos, real plans, chosen predictions."""
    text = (data / "lists/val.txt").read_text("utf-8", errors="surrogateescape")
    lines = [line.rsplit(" ", 2) for line in text.split("\n")[:-1]]
    spec = EvalSpec(Sampling("tsn", 8), scale=64, crop_size=56)
    plan = resolve_eval(VideoMetadata(16, 64, 64, 16.0), spec, 0)
    frames = np.tile(plan.frames[plan.clip_rows], (len(lines), 1, 1)).astype(np.int32)
    return write_results(
        exp,
        labels=[int(line[-1]) for line in lines],
        logits=guessed(guesses, 8),
        names=(data / "lists/classInd.txt").read_text().split()[1::2],
        ids=[line[0] for line in lines],
        frames=frames,
        views=view_table(spec, plan.boxes),
        name=name,
        protocol=Protocol(spec).to_dict(),
        list=str(data / "lists/val.txt"),
        list_hash=hashlib.sha256((data / "lists/val.txt").read_bytes()).hexdigest(),
        root=str(data),
        **summary,
    )


def sealed(exp: Path) -> Path:
    """Give results that a test has written the checksums that an evaluation writes."""
    file = exp / "results/best.json"
    summary = json.loads(file.read_text())
    names = ("ids.txt", "ledger.jsonl", "views.json", "labels.npy", "logits.npy", "scores.npy", "frames.npy")
    summary["files"] = {name: files.sha256(exp / "results/best" / name) for name in names}
    summary["checksum"] = results.summary_checksum(summary)
    file.write_text(json.dumps(summary))
    return exp


#: Ways of `broken`, which no checksum notices in results of earlier versions.
BROKEN = ("{}", "[]", "", "null", "[" * 100_000, "{", "longer ids", "ids of numbers", "fewer names", "label 7")
BROKEN += ("short labels", "short scores", "short logits", "other classes", "odd metrics", "odd protocol")
BROKEN += ("without class_names", "without protocol", "without metrics")


def broken(exp: Path, kind: str) -> None:
    """Break a result that `write_results` wrote, with labels of six videos in three classes; `kind`: of BROKEN."""
    parts, file = exp / "results/best", exp / "results/best.json"
    summary = json.loads(file.read_text())
    if kind in ("{}", "[]", "", "null", "[" * 100_000, "{"):
        file.write_text(kind)
    elif kind == "longer ids":
        (parts / "ids.txt").write_text((parts / "ids.txt").read_text() + '"more"\n')
    elif kind == "ids of numbers":
        (parts / "ids.txt").write_text("1\n2\n3\n4\n5\n6\n")
    elif kind.startswith("short "):
        name = f"{kind.split()[1]}.npy"
        np.save(parts / name, np.load(parts / name)[:-1])
    elif kind.startswith("without "):
        del summary[kind.split()[1]]
        file.write_text(json.dumps(summary))
    elif kind.startswith("odd "):
        summary[kind.split()[1]] = {"top1": "x"}
        file.write_text(json.dumps(summary))
    elif kind == "fewer names":
        file.write_text(json.dumps(summary | {"class_names": ["a"]}))
    elif kind == "other classes":
        np.save(parts / "scores.npy", np.load(parts / "scores.npy")[:, :2])
    elif kind == "label 7":
        np.save(parts / "labels.npy", np.full(6, 7, np.int32))
    else:
        raise AssertionError(kind)
