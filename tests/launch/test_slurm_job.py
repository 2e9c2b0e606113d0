"""What every task does around main: signals before the first step, requeues, their limits. No SLURM, no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import job, progress
from utils import files
from utils.schedulers import Place

ROOT = Path(__file__).resolve().parents[2]
LOG = "[2026-01-01T00:00:00+00:00] Iter: [{step}/100] Time 1.0 (1.0)\n"
# A stand-in for main.py that does what the words say; the folder with it comes first on the path.
MAIN = """\
import os, pathlib, signal, sys, time
def main(words):
    print("words", words, flush=True)
    code = int(words[1])
    if code == 99:
        raise RuntimeError("crash")
    if code == -9:
        os.kill(os.getpid(), 9)
    if code == -1:
        (pathlib.Path(sys.path[0]) / "ready").write_text("")
        time.sleep(30)
    if code == 50:  # another rank was killed; SLURM ends the others while they are leaving with their error
        from utils import signals
        with signals.StopFlag():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        return 1
    return code
"""
SCONTROL = """\
#!/bin/sh
echo "$@" >> {calls}
exit {code}
"""
SQUEUE = """\
#!/bin/sh
echo asked >> {calls}
printf '12|12|{state}|None|12\n12_4|12|{state}|None|13\n'
"""
TASK = (
    "import sys; sys.path.insert(1, sys.argv[1]); from launch import job; job.KILLED_WITHIN = float(sys.argv[4])\n"
    "job.RankTask(sys.argv[2], ['train', *sys.argv[5:]], max_restarts=3, max_stalled=2)()"
)


class Task:
    """A task in a process of its own."""

    def __init__(self, folder: Path, code: int, *, state: str = "RUNNING", requeue: int = 0, wait: float = 0.5, **env):
        self.folder = folder
        (folder / "main.py").write_text(MAIN)
        (folder / "scontrol").write_text(SCONTROL.format(calls=folder / "calls", code=requeue))
        (folder / "squeue").write_text(SQUEUE.format(calls=folder / "calls", state=state))
        for name in ("scontrol", "squeue"):
            (folder / name).chmod(0o755)
        words = [sys.executable, "-c", TASK, str(ROOT), str(folder), "-", str(wait), str(code)]
        variables = {"PYTHONPATH": f"{folder}", "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
        variables |= {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", **env}
        self.process = subprocess.Popen(
            words, cwd=folder, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[int, str, str]:
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out, errors

    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(("code", "left_with"), [(0, 0), (2, 2), (1, 1), (99, 1), (-9, -9)])
def test_exit_codes_pass_and_nothing_is_requeued(tmp_path: Path, code: int, left_with: int) -> None:
    task = Task(tmp_path, code)
    assert task.end()[0] == left_with
    assert task.calls() == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_to_a_task_that_is_leaving_with_an_error_is_not_one_before_the_first_step(
    tmp_path: Path, rank: str
) -> None:
    task = Task(tmp_path, 50, SLURM_PROCID=rank)
    code, out, _ = task.end()
    assert code == 1
    assert "before the first step" not in out
    assert task.calls() == []


def test_stopped_and_saved_asks_for_another_turn_and_waits(tmp_path: Path) -> None:
    task = Task(tmp_path, 75, wait=1.5)
    began = time.monotonic()
    code, out, _ = task.end()
    assert time.monotonic() - began > 1.4
    assert code == 75
    assert task.calls() == ["asked", "requeue 12"]
    assert "job 12 will be started again" in out


def test_a_cell_of_an_array_is_requeued_alone(tmp_path: Path) -> None:
    task = Task(tmp_path, 75, SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="4")
    task.end()
    assert task.calls()[-1] == "requeue 12_4"


def test_other_ranks_only_wait(tmp_path: Path) -> None:
    task = Task(tmp_path, 75, SLURM_PROCID="3")
    assert task.end()[0] == 75
    assert task.calls() == []


@pytest.mark.parametrize(("state", "state_named"), [("COMPLETING",) * 2, ("CANCELLED", "ended"), ("PENDING",) * 2])
def test_a_job_that_was_cancelled_or_requeued_by_hand_is_left_alone(
    tmp_path: Path, state: str, state_named: str
) -> None:
    task = Task(tmp_path, 75, state=state)
    assert f"job 12 is {state_named}, so it is not requeued" in task.end()[1]
    assert task.calls() == ["asked"]


def test_a_requeue_that_is_refused_is_loud(tmp_path: Path) -> None:
    code, _, errors = Task(tmp_path, 75, requeue=1).end()
    assert code == 75
    assert "error: everything is saved, but job 12 cannot be started again" in errors


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize(("rank", "calls"), [("0", ["asked", "requeue 12"]), ("1", [])])
def test_a_signal_before_the_first_step(tmp_path: Path, number: signal.Signals, rank: str, calls: list[str]) -> None:
    task = Task(tmp_path, -1, SLURM_PROCID=rank)
    end = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    task.process.send_signal(number)
    if rank == "0":
        assert task.end()[0] == 75
    else:  # it keeps running: the step needs rank 0, which requeues the job
        time.sleep(0.5)
        assert task.process.poll() is None
        task.process.kill()
        task.end()
    assert task.calls() == calls


def run(exp: Path, words: list[str], **changes) -> job.RankTask:
    options: dict[str, Any] = {"max_restarts": 10, "max_stalled": 2, **changes}
    return job.RankTask(str(exp), words, **options)


def test_restarts_are_counted_and_limited(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    one = run(tmp_path, ["train", str(tmp_path)])
    assert one.note_restart(Place("slurm", "12", 1)) is None
    assert one.note_restart(Place("slurm", "12", 1)) is None  # the evaluation that follows a training in one job
    assert len(files.read_rows(tmp_path / "jobs/restarts.jsonl")) == 1
    log.write_text(log.read_text() + LOG.format(step=5))
    assert [one.note_restart(Place("slurm", "12", 2)), one.note_restart(Place("slurm", "12", 3))] == [None, None]
    reason = one.note_restart(Place("slurm", "12", 4))
    assert reason is not None
    assert "3 times in a row without progress" in reason
    log.write_text(log.read_text() + LOG.format(step=6))
    assert one.note_restart(Place("slurm", "12", 5)) is None
    (tmp_path / "results/best").mkdir(parents=True)
    (tmp_path / "results/best/part-0000-0000-000000.npz").write_text("")
    assert one.note_restart(Place("slurm", "12", 10)) is None
    reason = one.note_restart(Place("slurm", "12", 11))
    assert reason is not None
    assert "more than max_restarts = 10" in reason
    text = log.read_text()
    assert [f"INFO job: restart number={n} job=12 " in text for n in (1, 2, 3, 4, 5, 10, 11)] == [True] * 7
    rows = files.read_rows(tmp_path / "jobs" / job.RESTARTS)
    assert [row["progress"] for row in rows] == [[0, 0], [5, 0], [5, 0], [5, 0], [6, 0], [6, 1], [6, 1]]
    assert run(tmp_path, []).note_restart(Place("slurm", "13", 1)) is None, "another job starts with a new count"


def test_a_job_that_gives_up_leaves_with_1(tmp_path: Path) -> None:
    code, _, errors = Task(tmp_path, 0, SLURM_RESTART_COUNT="4").end()
    assert code == 1
    assert "job 12 was restarted 4 times, more than max_restarts = 3" in errors
    assert "it gives up" in (tmp_path / "log.txt").read_text()


def test_fresh_is_for_the_first_start(tmp_path: Path) -> None:
    words = ["train", str(tmp_path), "--fresh"]
    assert run(tmp_path, words).argv_of_this_start(0) == words
    assert run(tmp_path, words).argv_of_this_start(1) == words[:2], "there was nothing to move"
    (tmp_path / "ckpt.pth.tar").write_text("old")
    one = run(tmp_path, words, old_run=job.mark_of_run(tmp_path))
    assert one.argv_of_this_start(1) == words, "killed before the old run was moved away"
    (tmp_path / "ckpt.pth.tar").rename(tmp_path / "old.tar")
    assert one.argv_of_this_start(1) == words[:2]
    (tmp_path / "ckpt.pth.tar").write_text("new")
    assert one.argv_of_this_start(2) == words[:2]


def test_progress(tmp_path: Path) -> None:
    assert str(progress.read(tmp_path)) == "-  -"
    log = tmp_path / "log.txt"
    log.write_text("x" * 300_000 + "\n" + LOG.format(step=40))
    assert progress.read(tmp_path) == progress.RunProgress(40, 100, None)
    curves = tmp_path / "events" / "scalars.jsonl"
    curves.parent.mkdir()
    curves.write_text('{"step": 10, "top1_val": 73.4}\n{"step": 20, "top1_val": 30.0}\n{"step": 40, "torn')
    for top1 in ("61.000", "30.000"):  # the end of a long log does not have the best validation any more
        log.write_text(log.read_text() + f"[t]  * Prec@1 {top1}\tPrec@5 60.0\tLoss 2.0\ttotal_num = 23\n")
    before = log.read_text()
    for line in (
        "INFO run: stopped iteration=47 by=SIGUSR2",
        "stopped by SIGUSR2 at iteration 47, saved",
    ):  # new and old
        log.write_text(f"{before}[t] {line}\n")
        assert progress.read(tmp_path) == progress.RunProgress(47, 100, 73.4)
    curves.write_text(
        '{"step": 10, "top1_val": 73.4, "map_val": 20.0}\n{"step": 20, "top1_val": 30.0, "map_val": "nan"}\n'
    )
    assert progress.read(tmp_path) == progress.RunProgress(47, 100, 20.0, "mAP")
    log.unlink()
    assert progress.read(tmp_path) == progress.RunProgress(20, None, 20.0, "mAP")
    assert progress.read(tmp_path).sentence == "iteration 20 of ?, best mAP 20.00"
    log.write_text("[t] Iter: [30/100] Loss 1.0 LR 0.1 ETA 0:03:10 clips/s 3.0\n")
    assert progress.read(tmp_path).sentence == "iteration 30 of 100, 0:03:10 left, best mAP 20.00"
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n[]\n{"torn\n')
    files.append_row(file, {"a": 2})
    assert files.read_rows(file) == [{"a": 1}, {"a": 2}]
    assert json.loads(file.read_text().splitlines()[-1]) == {"a": 2}
