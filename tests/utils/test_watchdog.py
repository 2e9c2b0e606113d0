"""A run that hangs says where, names the rank that it waits for, and ends with exit code 70."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import forked
from tests.experiment import make
from tests.ranks import ROOT
from utils import watchdog
from utils.stragglers import find_stragglers

PROGRAM = """\
import sys, time
from pathlib import Path
from utils.watchdog import Watchdog
folder, seconds, sleep = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
watch = Watchdog(folder, seconds=seconds, say=lambda text: (folder / "log.txt").write_text(text))
with watch:
    watch.phase("data", 6, lambda: ["sample 3: a.mp4"])
    (folder / "ready").touch()
    time.sleep(sleep)
"""


def start(folder: Path, seconds: float, sleep: float) -> subprocess.Popen:
    argv = [sys.executable, "-c", PROGRAM, str(folder), str(seconds), str(sleep)]
    return subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def hang_files(folder: Path) -> list[Path]:
    return sorted((folder / "jobs").glob("hang-*.txt"))


def test_a_phase_that_lasts_too_long_ends_the_process_and_is_described(tmp_path: Path) -> None:
    process = start(tmp_path, 0.5, 60)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == watchdog.EXIT_HUNG == 70
    (report,) = hang_files(tmp_path)
    text = report.read_text()
    for part in ("rank: 0", "phase: data", "iteration: 7", "sample: sample 3: a.mp4", 'File "<string>", line 9'):
        assert part in text
    line = (tmp_path / "log.txt").read_text()
    assert "hangs: data of iteration 7 has taken" in line
    assert "sample 3: a.mp4" in line
    assert report.name in line
    assert line in errors
    assert not list((tmp_path / "jobs").glob("heartbeat-*"))


def test_a_run_that_was_suspended_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, 4, 3)
    until((tmp_path / "ready").exists)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert not list((tmp_path / "jobs").iterdir())


def test_silent_ranks_are_named_before_those_behind(tmp_path: Path) -> None:
    first, second = (watchdog.Watchdog(tmp_path, seconds=6, rank=rank, ranks=3) for rank in (0, 1))
    second.phase("data", 4, lambda: ["sample 9: late.mp4"])
    with first, second:
        # By size: a file that has just been created is still empty
        until(lambda: sum(path.stat().st_size > 0 for path in (tmp_path / "jobs").glob("heartbeat-train-[01]")) == 2)
        first.phase("data", 4)
        first.phase("forward/backward", 4)
        assert first.suspects(2) == ["rank 2 has left no sign of life"]
        silent = tmp_path / "jobs" / "heartbeat-train-2"
        silent.write_bytes((tmp_path / "jobs" / "heartbeat-train-1").read_bytes())
        behind = first.suspects(2)
        assert len(behind) == 2
        assert behind[0].startswith("rank 1 on ")
        assert all("has been in data of iteration 5" in suspect for suspect in behind)
        past = time.time() - 100
        os.utime(silent, (past, past))
        (suspect,) = first.suspects(2)
        assert suspect.startswith("rank 2 on ")
        assert "has been silent for 100 s; it was in data of iteration 5" in suspect
    assert not list((tmp_path / "jobs").glob("heartbeat-train-[01]"))


def test_signs_of_ranks_that_are_no_more_are_swept(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("heartbeat-train-1", "heartbeat-train-7", "heartbeat-eval-best-7"):
        (tmp_path / "jobs" / name).write_text("{}")
    with watchdog.Watchdog(tmp_path, seconds=60, ranks=2):
        names = {path.name for path in (tmp_path / "jobs").iterdir()}
    assert names - {"heartbeat-train-0"} == {"heartbeat-train-1", "heartbeat-eval-best-7"}


STUCK = """\
import sys, time, main
from datasets.loading.workers import ReadHandler
clip = ReadHandler._clip
def stuck(handler, number, task, reader):
    if task.position == 9:
        time.sleep(1000)
    return clip(handler, number, task, reader)
ReadHandler._clip = stuck
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_decode_that_hangs_in_the_rank_is_named(tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "stuck", motion_videos)
    argv = [sys.executable, "-c", STUCK, "train", str(exp), "--set", "watchdog_minutes=0.05"]
    done = forked.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 70, done.stderr
    from datasets.lists.records import Records
    from datasets.plan.order import Order

    records = Records.load(motion_videos / "lists/train.txt", motion_videos, num_class=8)
    name = records.path(Order("shuffled", 0, records)(9).sample)
    assert "hangs: data of iteration 3 has taken" in done.stderr
    assert name in (exp / "log.txt").read_text()
    (report,) = hang_files(exp)
    assert f"{name}\n" in report.read_text()
    assert "in stuck" in report.read_text(), "the stack shows where"


def test_a_frozen_rank_is_named_by_the_others(tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "frozen", motion_videos, steps=2000, val_freq=2000, print_freq=1)
    argv = [sys.executable, "-m", "launch", "train", str(exp), "local", "2", "--set", "watchdog_minutes=0.08"]
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    until(lambda: (exp / "log.txt").exists() and "Iter: [3/" in (exp / "log.txt").read_text(), 120)
    sign = json.loads((exp / "jobs" / "heartbeat-train-1").read_text())
    os.kill(sign["pid"], signal.SIGSTOP)
    try:
        until(lambda: not (exp / "jobs" / "heartbeat-train-0").exists())
        time.sleep(1)
        os.kill(sign["pid"], signal.SIGKILL)  # what torchrun does 30 s later
        assert process.wait(timeout=60) == 70
    finally:
        os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
    text = (exp / "log.txt").read_text()
    assert "rank 0 on " in text
    assert f"Waiting for: rank 1 on {sign['host']} (process {sign['pid']}) has been silent for" in text


def kinds(data: list[float], forward: list[float], step: float, span: int = 1) -> list[str]:
    return [kind for kind, _, _ in find_stragglers(data, forward, step, span)]


def test_what_stands_out() -> None:
    assert kinds([0.0, 0.01], [0.2, 0.21], 0.5) == []
    assert kinds([0.0], [0.2], 0.5) == []
    assert kinds([0.3], [0.2], 0.5) == ["data"]
    assert kinds([0.01, 0.01, 0.15, 0.01], [0.2] * 4, 0.5) == ["data of 2"]
    assert kinds([0.0] * 4, [0.2, 0.2, 0.2, 0.4], 0.5) == ["forward of 3"]
    assert kinds([0.0] * 4, [0.2, 0.2, 0.4, 0.4], 0.5, span=2) == ["forward of 1"]
    assert kinds([0.0] * 4, [0.2, 0.2, 0.2, 0.4], 0.5, span=4) == []
    (finding,) = find_stragglers([0.0] * 4, [0.2, 0.2, 0.4, 0.4], 0.5, 2)
    assert finding[1] == 2
    assert "0.400 s per step (with the 1 other ranks of its BN group), that of the others 0.200 s" in finding[2]
    (finding,) = find_stragglers([0.01, 0.01, 0.15, 0.01], [0.2] * 4, 0.5)
    assert "waits 0.150 s per step for clips, the others 0.010 s, of 0.500 s" in finding[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_while_all_is_well_nothing_is_left(ranks: int, tmp_path: Path) -> None:
    watches = [watchdog.Watchdog(tmp_path, seconds=0.6, rank=rank, ranks=ranks) for rank in range(ranks)]
    for watch in watches:
        watch.__enter__()
    for _ in range(12):
        time.sleep(0.1)
        for watch in watches:
            watch.progress()
    for watch in watches:
        watch.__exit__()
    time.sleep(0.3)
    assert not list((tmp_path / "jobs").iterdir())
