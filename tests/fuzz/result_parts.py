"""Fuzz target: part files of an evaluation, and finished results with and without checksums.

An input is one byte for its kind and a payload: `P` and a part file, or `R` and the files of a result, framed as a JSON
line {name: length} and their bytes. Mutants flip, cut and copy bytes, or change an array or a value and seal the file
again, so that readers meet well-formed files with contents that no evaluation writes.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from anal_tools import analyze, compare, score
from anal_tools.evaluate import part_file, result_parts, results
from anal_tools.evaluate.protocols import Protocol
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec
from tests.evaluated import guessed, write_results
from utils.errors import UserError

NAME = "result_parts"
MODULES = ["anal_tools/evaluate/part_file.py", "anal_tools/evaluate/results.py"]

_KEY = {"weights": "w"}
_VIDEOS = 6
_CLASSES = ["a", "b", "c"]
_PART = "part-0000-0000-000000.npz"
_SUMMARY = "best.json"
_ODD: tuple[Any, ...] = (None, -1, 1e308, "x", "\ud800", [], {}, [[]], True, 2**70, float("nan"))


def seeds() -> list[bytes]:
    """Valid inputs: parts with failed and repaired videos, results sealed and of earlier versions."""
    rng = np.random.default_rng(0)
    inputs = []
    for failed, dtype in ((0, np.float32), (2, np.float16)):
        good = _VIDEOS - failed
        arrays = {
            "samples": np.arange(_VIDEOS),
            "failed": np.array([""] * good + ["torn"] * failed, dtype=str),
            "repaired": np.array(["short"] + [""] * (_VIDEOS - 1)),
            "logits": rng.normal(size=(good, 2, 3)).astype(dtype),
            "frames": rng.integers(0, 9, (good, 2, 8)).astype(np.int32),
            "boxes": np.zeros((2, 4), np.int64),
        }
        inputs.append(b"P" + _part(arrays))
    with tempfile.TemporaryDirectory() as name:
        exp = Path(name)
        logits = guessed([0, 1, 2, 0, None, 2], 3, views=2)
        views = [{"clip": clip, "crop": 0, "place": "centre", "box": [0, 0, 4, 4], "flip": False} for clip in (0, 1)]
        about = {"protocol": Protocol(EvalSpec(Sampling("mmaction2_1x", 1, 8, 8), 2, "centre")).to_dict(), "config": {}}
        about |= {"metrics": {"top1": 50.0, "top5": 100.0}, "cost": {"gmacs_per_view": 1.5}}
        write_results(exp, labels=[0, 1, 2, 1, 0, 2], logits=logits, names=_CLASSES, views=views, **about)
        files = {path.name: path.read_bytes() for path in sorted((exp / "results/best").iterdir())}
        files[_SUMMARY] = (exp / "results" / _SUMMARY).read_bytes()
    inputs.append(b"R" + _framed(files))
    inputs.append(b"R" + _framed(_sealed(files)))
    multi_label = files | {"targets.npy": _npy(np.eye(3, dtype=bool)[[0, 1, 2, 1, 0, 2]])}
    inputs.append(b"R" + _framed(_sealed(multi_label)))
    return inputs


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Return a mutant of a valid input."""
    kind, payload = data[:1], data[1:]
    if kind == b"P":
        return kind + (_mutated_part(rng, payload) if rng.random() < 0.5 else _mutated_bytes(rng, payload))
    files = _unframed(payload)
    was_sealed = b'"checksum"' in files[_SUMMARY]
    name = rng.choice(sorted(files))
    how = rng.random()
    if how < 0.4:
        files[name] = _mutated_bytes(rng, files[name])
    elif name.endswith(".npy"):
        files[name] = _npy(_mutated_array(rng, np.load(io.BytesIO(files[name]))))
    elif name == _SUMMARY:
        files[name] = json.dumps(_mutated_value(rng, json.loads(files[name]))).encode()
    else:
        rows = files[name].splitlines(keepends=True) or [b"{}\n"]
        rows[rng.randrange(len(rows))] = json.dumps(rng.choice(_ODD)).encode() + b"\n"
        files[name] = b"".join(rows[: rng.randrange(len(rows) + 1)] if rng.random() < 0.3 else rows)
    if was_sealed and rng.random() < 0.5:  # a writer's mistake instead of damage: checksums are right
        with contextlib.suppress(ValueError, TypeError, RecursionError):  # the summary is no JSON object any more
            files = _sealed(files)
    return kind + _framed(files)


def run(data: bytes, folder: Path) -> str:
    """Read an input as the verbs do; "ok", "refused" or "stage0"."""
    shutil.rmtree(folder / "results", ignore_errors=True)
    if data[:1] == b"P":
        return _run_part(data[1:], folder / "results/best")
    try:
        files = _unframed(data[1:])
    except (ValueError, KeyError, TypeError, AttributeError):
        return "stage0"
    return _run_result(files, folder)


def _run_part(payload: bytes, folder: Path) -> str:
    """Resume from a part file, and finish the evaluation if the part has all videos."""
    result_parts.earlier_parts(folder, _KEY, _VIDEOS)
    (folder / _PART).write_bytes(payload)
    if not zipfile.is_zipfile(folder / _PART):
        reached = "stage0"
    else:
        reached = "refused"
    _, parts = result_parts.earlier_parts(folder, _KEY, _VIDEOS)
    if not parts:
        return reached
    if len(parts[0]["samples"]) < _VIDEOS:  # the others would be scored now
        return "ok"
    spec = EvalSpec(Sampling("mmaction2_1x", 1, 8, 8), 2, "centre")
    summary: results.Summary = {"class_names": _CLASSES, "metrics": {}, "protocol": Protocol(spec).to_dict()}
    try:
        ids, labels = [f"{i}.mp4" for i in range(_VIDEOS)], np.zeros(_VIDEOS, np.int32)
        result_parts.merge(folder, ids, labels, summary, owner=result_parts.owner_of(_KEY))
        _read_all(folder.parent.parent)
    except UserError:
        return "refused"
    return "ok"


def _run_result(files: dict[str, bytes], folder: Path) -> str:
    """Read a finished result, and do with it what score, analyze and compare do."""
    parts = folder / "results/best"
    parts.mkdir(parents=True)
    for name, content in files.items():
        (folder / "results" / name if name == _SUMMARY else parts / name).write_bytes(content)
    try:
        results.read_summary(folder / "results" / _SUMMARY)
    except results.DamagedResult:
        return "stage0" if not _is_object(files[_SUMMARY]) else _refused(folder)
    try:
        result = _read_all(folder)
        row = score.row([result], resamples=10)
        score.table([row], multi_label=result.multi_label)
        if not result.multi_label:
            analyze.Analysis.of(result)
            compare.text([compare.Experiment(folder, "a", result), compare.Experiment(folder, "b", result)])
    except UserError:
        return "refused"
    return "ok"


def _refused(folder: Path) -> str:
    try:
        _read_all(folder)
    except UserError:
        return "refused"
    raise AssertionError("a summary that cannot be read was read")


def _read_all(folder: Path) -> results.Results:
    result = results.Results.load(folder)
    _ = result.frames, result.views, result.ledger, result.failed, result.class_names
    return result


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data.decode("utf-8", "surrogateescape")), dict)
    except (ValueError, RecursionError):
        return False


def _part(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    part_file.store(stream, arrays, result_parts.owner_of(_KEY))
    return stream.getvalue()


def _mutated_part(rng: random.Random, payload: bytes) -> bytes:
    """Change one array of a part file and seal it again."""
    with np.load(io.BytesIO(payload)) as file:
        arrays = {name: file[name] for name in part_file.COLUMNS}
    name = rng.choice(part_file.COLUMNS)
    arrays[name] = _mutated_array(rng, arrays[name])
    return _part(arrays)


@np.errstate(all="ignore")
def _mutated_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """Another length, shape, type or value."""
    how = rng.randrange(6)
    if how == 0:
        return array[: rng.randrange(len(array) + 1)] if array.ndim else array
    if how == 1:
        return np.concatenate([array, array]) if array.ndim else array
    if how == 2:
        return array.reshape(-1) if rng.random() < 0.5 else array[..., None]
    if how == 3:
        dtype = rng.choice(["i8", "f4", "f8", "u1", "U3", "c8", "?", "S2", "M8[s]"])
        try:
            return array.astype(dtype)
        except (ValueError, TypeError):
            return np.zeros(array.shape, dtype)
    if array.size and array.dtype.kind in "if":
        flat = array.copy().reshape(-1)
        flat[rng.randrange(flat.size)] = rng.choice([-1, 0, 99, np.iinfo(np.int32).max])
        return flat.reshape(array.shape)
    return np.zeros((0,) * rng.randrange(4), array.dtype)


def _mutated_value(rng: random.Random, value: Any) -> Any:
    """Another value somewhere in a JSON document, or a key less."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.2:
            return {name: one for name, one in value.items() if name != key}
        return value | {key: _mutated_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], _mutated_value(rng, value[place]), *value[place + 1 :]]
    return rng.choice(_ODD)


def _mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip bits, cut, repeat or zero a piece."""
    how, size = rng.randrange(5), len(data)
    if not size or how == 0:
        return data[: rng.randrange(size + 1)]
    if how == 1:
        start = rng.randrange(size)
        return data[:start] + bytes(min(16, size - start)) + data[start + 16 :]
    if how == 2:
        start, stop = sorted(rng.randrange(size) for _ in range(2))
        return data[:stop] + data[start:]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _framed(files: dict[str, bytes]) -> bytes:
    head = json.dumps({name: len(content) for name, content in files.items()}).encode()
    return head + b"\n" + b"".join(files.values())


def _unframed(payload: bytes) -> dict[str, bytes]:
    head, _, body = payload.partition(b"\n")
    files, place = {}, 0
    for name, length in json.loads(head).items():
        if "/" in name or not isinstance(length, int) or length < 0:
            raise ValueError(name)
        files[name] = body[place : place + length]
        place += length
    if not {_SUMMARY, "logits.npy"} <= files.keys():
        raise ValueError("no result")
    return files


def _sealed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with a summary that has their checksums."""
    import hashlib

    summary = json.loads(files[_SUMMARY])
    if not isinstance(summary, dict):
        raise ValueError("no summary")
    others = {name: content for name, content in files.items() if name != _SUMMARY}
    summary["files"] = {name: hashlib.sha256(content).hexdigest() for name, content in others.items()}
    summary["checksum"] = results.summary_checksum(summary)
    return files | {_SUMMARY: json.dumps(summary).encode()}
