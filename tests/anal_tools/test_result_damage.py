"""Damaged part files are scored again, damaged results are one sentence; never another number, never a trace."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import main
from anal_tools.evaluate import part_file, result_parts
from anal_tools.evaluate.results import Results
from tests.evaluated import BROKEN, broken, guessed, sealed, write_results
from tests.fuzz import result_parts as fuzz
from utils.errors import UserError

VERBS = ("score", "compare", "analyze", "report", "dense-sweep", "get_reference_results")
OWNER = result_parts.owner_of({"weights": "w"})


def arrays(count: int = 3) -> dict[str, np.ndarray]:
    """The columns of a part with one video that failed and one that was repaired."""
    rng = np.random.default_rng(0)
    failed = np.array([""] * count + ["torn"])
    return {
        "samples": np.arange(count + 1),
        "failed": failed,
        "repaired": np.array(["two frames"] + [""] * count),
        "logits": rng.normal(size=(count, 2, 4)).astype(np.float32),
        "frames": rng.integers(0, 9, (count, 2, 5)).astype(np.int32),
        "boxes": np.zeros((2, 4), np.int64),
    }


def test_every_bit_of_a_part_file_counts(tmp_path: Path) -> None:
    path, expected = tmp_path / "part-0000-0000-000000.npz", arrays()
    part_file.write(path, expected, OWNER)
    whole = path.read_bytes()
    rng, detected = random.Random(3), 0
    for place in rng.sample(range(len(whole)), 400):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            read = part_file.read(path, OWNER)
        except part_file.DamagedPart:
            detected += 1
            continue
        for name, array in expected.items():  # a bit that says nothing, such as a date in the zip
            assert np.array_equal(read[name], array), f"bit of byte {place}: other {name}"
    assert detected > 200
    path.write_bytes(whole)
    with pytest.raises(part_file.Stranger):
        part_file.read(path, result_parts.owner_of({}))
    for folder in (tmp_path / "folder.npz", tmp_path / "none.npz"):
        with pytest.raises(part_file.DamagedPart):
            part_file.read(folder, OWNER)


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    """Results of six videos in three classes."""
    folder = tmp_path / "exp"
    logits = guessed([0, 1, 2, 0, None, 2], 3)
    return write_results(folder, labels=[0, 1, 2, 1, 0, 2], logits=logits, names=["a", "b", "c"])


def read_all(exp: Path) -> Results:
    """Read every file of a result."""
    results = Results.load(exp)
    _ = results.frames, results.views, results.ledger
    return results


def test_results_of_earlier_versions_open_unverified(exp: Path) -> None:
    assert not read_all(exp).verified
    assert read_all(sealed(exp)).verified


@pytest.mark.parametrize("name", ["ids.txt", "labels.npy", "logits.npy", "scores.npy", "frames.npy", "views.json"])
def test_a_flipped_bit_of_a_finished_file_is_one_sentence(exp: Path, name: str) -> None:
    sealed(exp)
    path = exp / "results/best" / name
    whole, rng = path.read_bytes(), random.Random(name)
    for place in rng.sample(range(len(whole)), min(20, len(whole))):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{name} does not have the checksum.*run the evaluation again"):
            read_all(exp)


@pytest.mark.parametrize("name", ["best.json", "best/ids.txt", "best/logits.npy", "best/frames.npy"])
def test_a_pipe_in_the_place_of_a_file_is_refused_unopened(exp: Path, name: str) -> None:
    path = exp / "results" / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError):
        read_all(exp)


def test_a_summary_that_says_something_else_is_one_sentence(exp: Path) -> None:
    sealed(exp)
    file = exp / "results/best.json"
    expected, whole, rng = json.loads(file.read_text()), file.read_bytes(), random.Random(5)
    for place in rng.sample(range(len(whole)), 200):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(7)
        file.write_bytes(data)
        try:
            summary = Results.load(exp).summary
        except UserError:
            continue
        assert summary == expected, place


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind[:20] or "empty")
def test_broken_results_are_one_sentence_in_every_verb(exp: Path, tmp_path: Path, kind: str, capsys) -> None:
    broken(exp, kind)
    other = tmp_path / "other"
    shutil.copytree(exp, other)
    for verb in VERBS:
        words = [str(exp), str(other)] if verb == "compare" else [str(exp)]
        capsys.readouterr()
        assert main.main([verb, *words]) == 2, verb
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1, message
        assert "Traceback" not in message


def test_the_fuzz_target_of_result_parts(tmp_path: Path) -> None:
    """A few mutants of what tests/fuzz runs thousands of: refused or as it was, nothing else."""
    rng = random.Random(1)
    seeds = fuzz.seeds()
    assert [fuzz.run(seed, tmp_path) for seed in seeds] == ["ok"] * len(seeds)
    seen = [fuzz.run(fuzz.mutate(rng, rng.choice(seeds)), tmp_path) for _ in range(200)]
    assert set(seen) <= {"ok", "refused", "stage0"}
    assert seen.count("stage0") < 140
