"""The commands that faults are put into, each in a small folder of its own: what to run, and what it must leave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.experiment import make
from tests.faults import warm

STEPS = 4


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: its name.
        prepare: fills an empty folder with what the command needs.
        argv: of main.py, for that folder.
        watched: the folders whose calls count.
        fingerprint: a sha256 over what the command must leave; it does not depend on the folder, time or host.
        inside: called in the child before the command.
    """

    name: str
    prepare: Callable[[Path], object]
    argv: Callable[[Path], list[str]]
    watched: Callable[[Path], list[Path]]
    fingerprint: Callable[[Path], str]
    inside: Callable[[], object] = lambda: None


def of(data: Path, template: Path) -> dict[str, Command]:
    """All commands.

    Args:
        data: a small data set (`datasets.demo.verb`).
        template: an empty folder; gets the experiment that the evaluations start from.
    """
    lists = template / "lists"
    lists.mkdir(parents=True)
    for name, count in (("train", 8), ("val", 4)):
        lines = (data / f"lists/{name}.txt").read_text().splitlines(keepends=True)[:count]
        (lists / f"{name}.txt").write_text("".join(lines))
    shutil.copy(data / "lists/classInd.txt", lists)
    trained = _experiment(template / "trained", data, lists)
    done = warm.verb(["train", str(trained)], template)
    assert done.code == 0, done.err

    def scored(folder: Path) -> None:
        _experiment(folder / "exp", data, lists)
        shutil.copy(trained / "ckpt_best.pth.tar", folder / "exp")

    def listed(folder: Path) -> None:
        shutil.copytree(lists, folder / "lists")

    def dump(form: str) -> Callable[[Path], list[str]]:
        words = ["--as", form, "--root", str(data), "--short-side", "32", "--workers", "1"]
        return lambda folder: ["dump", str(folder / "lists/val.txt"), str(folder / "out"), *words]

    exp = [lambda folder: [folder / "exp"]]
    out = lambda folder: [folder / "out", folder / "lists"]  # noqa: E731
    scan = lambda folder: [  # noqa: E731
        *("scan", str(folder / "lists/val.txt"), "--root", str(data)),
        *("--out", str(folder / "out"), "--workers", "1"),
    ]
    commands = [
        Command(
            "train",
            lambda folder: _experiment(folder / "exp", data, lists),
            lambda folder: ["train", str(folder / "exp")],
            exp[0],
            lambda folder: trained_state(folder / "exp"),
        ),
        Command(
            "eval",
            scored,
            lambda folder: ["eval", str(folder / "exp"), "--name", "n"],
            exp[0],
            lambda folder: result(folder / "exp/results", "n"),
            _part_for_each_video,
        ),
        *(
            Command(f"dump-{form}", listed, dump(form), out, lambda folder: dumped(folder / "out"), _read_here)
            for form in ("frames", "packs", "clips")
        ),
        Command("scan", listed, scan, out, lambda folder: scanned(folder / "out"), _read_here),
    ]
    return {command.name: command for command in commands}


def _experiment(folder: Path, data: Path, lists: Path) -> Path:
    """An experiment of few steps on few videos, small in bytes: every save is verified byte for byte."""
    changes = {"steps": STEPS, "val_freq": 2, "print_freq": 1, "backbone": "mobilenetv2"}
    make(folder, data, **changes)
    config = folder / "config.yaml"
    text = config.read_text().replace(f"{data}/lists/", f"{lists}/")
    config.write_text(text.replace("batch_size: 4", "batch_size: 2"))
    return folder


def _part_for_each_video() -> None:
    """Let an evaluation write a part file for each video, as a slow one does."""
    from anal_tools.evaluate import result_parts

    result_parts.PART_SECONDS = -1.0


def _read_here() -> None:
    """Let dump and scan read in this process, where faults can be injected, instead of in reader processes."""
    import datasets.dump.verb
    import datasets.scan.same
    import datasets.scan.work
    from datasets.loading.pool import Inline

    class Here(Inline):
        def __init__(self, setup: Any, records: Any, slots: Any, workers: int, deadline: float) -> None:
            super().__init__(setup, records, slots)

    for module in (datasets.dump.verb, datasets.scan.work, datasets.scan.same):
        if hasattr(module, "Pool"):
            setattr(module, "Pool", Here)  # noqa: B010  not every module has it


def trained_state(exp: Path) -> str:
    """sha256 over weights, buffers, momentum, counters and the best checkpoint's weights."""
    import torch

    digest = hashlib.sha256()
    for name in ("ckpt.pth.tar", "ckpt_best.pth.tar"):
        state = torch.load(exp / name, weights_only=True)
        for key, tensor in sorted(state["model"].items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
        for key, values in sorted(state["optimizer"]["state"].items()):
            digest.update(str(key).encode() + values["momentum_buffer"].numpy().tobytes())
        counters = {key: state[key] for key in ("step", "validated_step", "best_metric", "lists", "classes")}
        losses = {key: values for key, values in state["window"].items() if key in ("loss", "top1", "top5")}
        digest.update(json.dumps([counters, losses], sort_keys=True).encode())
    return digest.hexdigest()


def result(results: Path, name: str) -> str:
    """sha256 over the finished files of an evaluation, and what its summary says of the videos."""
    digest = hashlib.sha256()
    for path in sorted((results / name).iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    summary = json.loads((results / f"{name}.json").read_text())
    kept = ("metrics", "counts", "failures", "protocol", "list_hash", "weights_hash", "files")
    digest.update(json.dumps({key: summary[key] for key in kept}, sort_keys=True).encode())
    return digest.hexdigest()


def dumped(out: Path) -> str:
    """sha256 over the files of a dump; of its own notes only those that a next dump reads."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not name.startswith(".dump/"):
            digest.update(name.encode() + _without_folder(path))
    rows = {}
    for line in (out / ".dump/manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["target"]] = {key: row[key] for key in ("frames", "digest", "target", "path")}
    digest.update(json.dumps(rows, sort_keys=True).encode())
    return digest.hexdigest()


def scanned(out: Path) -> str:
    """sha256 over what a scan leaves, without its time and folders."""
    digest = hashlib.sha256((out / "val.clean.txt").read_bytes())
    summary = json.loads((out / "scan.json").read_text())
    del summary["seconds"]
    for part in summary["lists"]:
        part["list"] = os.path.basename(part["list"])
    digest.update(json.dumps(summary, sort_keys=True).encode() + (out / "metadata.bin").read_bytes())
    digest.update(bytes((out / "index.html").is_file()))
    rows = [json.loads(line) for line in (out / "files.jsonl").read_text().splitlines()]
    known = {str((row["path"], row["start"])): row for row in rows if "path" in row}
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()


def _without_folder(path: Path) -> bytes:
    """The bytes of a file; of a list as well, since its paths are relative."""
    return path.read_bytes()
