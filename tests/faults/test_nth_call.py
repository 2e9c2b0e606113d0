"""A stratified sample of the faults of tests/benchmarks/reliability/nth_call.py, and the injector's own promises."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.faults import warm
from tests.faults.inject import Fault, Injector

ROOT = Path(__file__).resolve().parents[2]


def in_child(folder: Path, action) -> warm.Outcome:
    """Run a function in a forked child, since an injector stays for the rest of its process."""
    return warm.forked(action, folder)


def test_calls_are_counted_by_kind_and_only_below_the_folders(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()

    def action() -> int:
        injector = Injector([inside])
        injector.install()
        for folder in (inside, outside):
            with open(folder / "a", "w") as file:
                file.write("x" * 10)
                file.flush()
                os.fsync(file.fileno())
            os.replace(folder / "a", folder / "b")
            os.link(folder / "b", folder / "c")
            (folder / "d").mkdir()
            np.save(folder / "e.npy", np.arange(10))
            (folder / "b").unlink()
        kinds = [kind for kind, _ in injector.calls]
        assert kinds[:6] == ["open", "write", "fsync", "rename", "link", "mkdir"], kinds
        assert kinds[6] == "open"
        assert kinds[-1] == "unlink"
        assert "write" in kinds[7:-1], "an array that is saved goes through the counted file too"
        return 0

    done = in_child(tmp_path, action)
    assert done.code == 0, done.err


@pytest.mark.parametrize(("kind", "number"), [("open", 2), ("write", 1), ("fsync", 1), ("rename", 1)])
def test_exactly_the_wanted_call_fails(tmp_path: Path, kind: str, number: int) -> None:
    (tmp_path / "in").mkdir()

    def attempt(name: str) -> str:
        try:
            with open(tmp_path / "in" / name, "w") as file:
                file.write("x")
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp_path / "in" / name, tmp_path / "in" / "final")
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "ok"

    def action() -> int:
        Injector([tmp_path / "in"], Fault(kind, number, errno.ESTALE), tmp_path / "note").install()
        print(json.dumps([attempt("a"), attempt("b"), attempt("c")]))
        return 0

    expected = ["ok", "ok", "ok"]
    expected[number - 1] = "ESTALE"
    assert json.loads(in_child(tmp_path, action).out) == expected
    assert (tmp_path / "note").read_text().startswith(kind)


@pytest.mark.parametrize(
    ("counts", "least"),
    [
        pytest.param("train=2,eval=2,dump-frames=1,scan=1", 5, id="6 faults"),
        pytest.param(
            "train=8,eval=8,dump-frames=3,dump-shards=3,dump-clips=2,scan=6",
            28,
            id="30 faults",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_sample_of_faults_in_every_command(counts: str, least: int, motion_videos: Path) -> None:
    """Faults spread over the kinds of calls of train, eval, dump and scan; in a process that can be forked from."""
    command = [sys.executable, "-m", "tests.benchmarks.reliability.nth_call", "--counts", counts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--data", str(motion_videos)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["holds"], (figures, done.stderr)
    assert figures["measured"]["all"] >= least, figures  # a call of a thread may come once more or less
