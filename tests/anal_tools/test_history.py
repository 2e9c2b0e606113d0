"""The history of a run from its files, `list`, `launch status --json`, `clean` and `watch`."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anal_tools import clean, experiments, history, watch
from launch import verbs
from tests import experiment
from utils import run_lock
from utils.errors import UserError

LOG = """\
[2026-05-01T10:00:00+00:00] INFO run: start ranks=4 shards=4 global_batch=32 python=3.11 torch=2.13 experiment=/e
[2026-05-01T10:00:00+00:00] INFO run: setup device="cuda (NVIDIA A100)" threads=8 videos=100 val_videos=20 classes=8
[2026-05-01T10:00:01+00:00] Iter: [10/100] Time 1.0 (1.000) Data 0.1 (0.200) Loss 2 (2) LR 0.1 ETA 0:01:30 clips/s 32.0
[2026-05-01T10:30:00+00:00] Iter: [20/100] Time 1.0 (2.000) Data 0.1 (1.000) Loss 2 (2) LR 0.1 ETA 0:01:30 clips/s 16.0
[2026-05-01T10:30:00+00:00] WARNING loss: spike iteration=20 loss=9 mean=2 losses=20
[2026-05-01T10:30:00+00:00] WARNING fp16: skipped steps=2 after=10 loss_scale=16384
[2026-05-01T11:00:00+00:00] INFO run: start ranks=2 shards=4 global_batch=32 python=3.11 torch=2.13 experiment=/e
[2026-05-01T11:00:00+00:00] INFO run: setup device="cuda (NVIDIA A100)" threads=8 videos=100 val_videos=20 classes=8
[2026-05-01T11:15:00+00:00] INFO run: stopped iteration=24 by=SIGTERM message="saved; the same command continues"
"""
# As versions before 0.3 wrote it
OLD_LOG = """\
[2026-05-01T10:00:00+00:00] experiment /e, code abc, process 1 on n1
[2026-05-01T10:00:00+00:00] ranks 4, shards 4, global batch 32, python 3.11, torch 2.13
[2026-05-01T10:00:00+00:00] device cuda (NVIDIA A100), threads 8, videos 100 + 20, classes 8, parameters 11.18 M
[2026-05-01T10:00:01+00:00] Iter: [10/100] Time 1.0 (1.000) Data 0.1 (0.200) Loss 2 (2) LR 0.1 ETA 0:01:30 clips/s 32.0
[2026-05-01T10:30:00+00:00] Iter: [20/100] Time 1.0 (2.000) Data 0.1 (1.000) Loss 2 (2) LR 0.1 ETA 0:01:30 clips/s 16.0
[2026-05-01T10:30:00+00:00] loss spike at iteration 20: 9.0, the mean of the 20 before is 2.0
[2026-05-01T10:30:00+00:00] fp16: 2 step(s) after iteration 10 skipped, their gradients overflowed; loss scale 16384
[2026-05-01T11:00:00+00:00] experiment /e, code abc, process 2 on n2
[2026-05-01T11:00:00+00:00] ranks 2, shards 4, global batch 32, python 3.11, torch 2.13
[2026-05-01T11:00:00+00:00] device cuda (NVIDIA A100), threads 8, videos 100 + 20, classes 8, parameters 11.18 M
[2026-05-01T11:15:00+00:00] stopped by SIGTERM at iteration 24, saved; the same command continues
"""
CURVES = [
    {"step": 10, "loss_train": 2.0}, {"step": 20, "loss_train": 1.0, "top1_val": 50.0}, {"resume": 15},
    {"step": 20, "loss_train": 1.0, "top1_val": 55.0}, {"step": 24, "loss_train": 3.0},
]  # fmt: skip


@pytest.fixture
def exp(tmp_path: Path, tiny_videos: Path) -> Path:
    exp = experiment.make(tmp_path / "exp", tiny_videos)
    (exp / "log.txt").write_text(LOG)
    (exp / "events").mkdir()
    (exp / "events" / "scalars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CURVES))
    (exp / "jobs" / "code" / "one").mkdir(parents=True)
    (exp / "jobs" / "code" / "one" / "main.py").write_bytes(bytes(5000))
    (exp / "jobs" / "restarts.jsonl").write_text('{"job": "7"}\n')
    row = {"job": "7", "verb": "train", "scheduler": "local", "code": str(exp / "jobs/code/two"), "ranks": 4}
    (exp / "jobs" / "jobs.jsonl").write_text(json.dumps(row) + "\n")
    (exp / "jobs" / "code" / "two").mkdir()
    (exp / "jobs" / "code" / "new").mkdir()  # of a job that is being submitted
    os.utime(exp / "jobs" / "code" / "one", (0, 0))
    for number, name in enumerate(("first", "last")):
        (exp / "results" / name).mkdir(parents=True)
        (exp / "results" / name / clean.LOGITS).write_bytes(bytes(10_000))
        (exp / "results" / name / "scores.npy").write_bytes(b"scores")
        summary = {"metrics": {"top1": 50.0 + number}, "protocol": {"num_clips": 10, "crops": "three"}, "step": 20}
        (exp / "results" / f"{name}.json").write_text(json.dumps(summary))
        os.utime(exp / "results" / f"{name}.json", (1e9 + number, 1e9 + number))
    (exp / "old" / "20260101T000000Z").mkdir(parents=True)
    (exp / "old" / "20260101T000000Z" / "ckpt.pth.tar").write_bytes(bytes(200_000))
    return exp


@pytest.mark.parametrize("text", [LOG, OLD_LOG], ids=["now", "before 0.3"])
def test_the_history_of_a_restarted_run(exp: Path, text: str) -> None:
    (exp / "log.txt").write_text(text)
    run = history.read(exp)
    assert (run.state, run.step, run.last) == ("stopped", 24, 100)
    assert (run.best, run.criterion) == (55.0, "top-1")
    assert run.gpu_hours == run.rank_hours == 4 * 0.5 + 2 * 0.25
    assert run.waiting == pytest.approx((10 * 0.2 + 10 * 1.0) / (10 * 1.0 + 10 * 2.0))
    assert (run.restarts, run.requeues, run.lost_steps) == (1, 1, 5)
    assert (run.spikes, run.skipped) == (1, 2)
    assert run.evaluation is not None
    assert (run.evaluation["name"], run.evaluation["protocol"]) == ("last", "10xthree")
    assert history.in_words(run) == ["24/100", "55.00", "51.00 (10xthree)", "stopped", "2026-05-01 11:15"]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    assert history.in_words(history.read(tmp_path)) == [""] * 5
    assert history.read(tmp_path).gpu_hours == 0


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[x] Iter: [1/\n[2026-99] y\n", b"Iter: [5/9] Time 1 (1)\n"])
def test_broken_files_count_as_nothing_written(exp: Path, damage: bytes) -> None:
    for name in ("log.txt", "events/scalars.jsonl", "results/last.json", "jobs/restarts.jsonl"):
        (exp / name).write_bytes(damage)
    run = history.read(exp)
    assert (run.state, run.step, run.best) == ("new", None, None)


def test_an_old_log_has_rank_hours_and_no_gpu_hours(exp: Path) -> None:
    (exp / "log.txt").write_text("\n".join(line for line in OLD_LOG.splitlines() if "device" not in line))
    run = history.read(exp)
    assert run.gpu_hours is None
    assert run.rank_hours == 2.5


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("finished: 100 iterations, best Prec@1 55.000, x", "finished"),
        ("error: the loss is not finite", "failed"),
        ("INFO run: finished iteration=100 metric=Prec@1 best=55 checkpoint=x", "finished"),
        ("INFO run: nothing_to_do iteration=100", "finished"),
        ('ERROR run: failed message="the loss is not finite"', "failed"),
        ("Iter: [30/100] Time 1 (1) Data 0 (0)", "ended"),
    ],
)
def test_the_state_of_a_run(exp: Path, line: str, state: str) -> None:
    with (exp / "log.txt").open("a") as file:
        file.write(f"[2026-05-01T12:00:00+00:00] {line}\n[2026-05-01T12:00:00+00:00] loggers: mlflow: sends again\n")
        file.write('[2026-05-01T12:00:00+00:00] INFO loggers: remark message="mlflow: sends again"\n')
    assert history.read(exp).state == state
    held = run_lock.take(exp / "jobs" / "lock.json")
    try:
        assert history.read(exp).state == "running"
    finally:
        held.release()


def test_list_shows_what_was_trained_here(exp: Path, capsys: pytest.CaptureFixture) -> None:
    assert experiments.main([str(exp)]) == 0
    out = capsys.readouterr().out
    assert "last evaluation" in out.splitlines()[0]
    assert "55.00" in out
    assert "51.00 (10xthree)" in out
    assert experiments.main([str(exp), "--markdown"]) == 0  # the table of the docs has nothing of this machine
    assert "last evaluation" not in capsys.readouterr().out


@pytest.mark.system
def test_status_as_json_and_the_list_of_the_launcher(exp: Path, capsys: pytest.CaptureFixture) -> None:
    assert verbs.status([str(exp), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == 1
    assert set(answer) == {"schema", "experiment", "jobs", "run"}
    assert set(answer["run"]) == {
        "state", "step", "last", "best", "criterion", "updated", "gpu_hours", "rank_hours", "waiting", "restarts",
        "requeues", "lost_steps", "spikes", "skipped", "eta", "rate", "evaluation",
    }  # fmt: skip
    assert answer["jobs"][0]["job"] == "7"
    assert answer["jobs"][0]["state"] == "ended"
    assert verbs.list_([str(exp)]) == 0
    assert "51.00 (10xthree)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- clean
def listing(exp: Path) -> set[str]:
    return {str(path.relative_to(exp)) for path in exp.rglob("*")}


@pytest.mark.system
def test_clean_frees_what_grows_and_nothing_else(exp: Path, capsys: pytest.CaptureFixture) -> None:
    before = listing(exp)
    assert clean.main([str(exp), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert listing(exp) == before
    assert "0.2 MB can be freed" in shown
    assert clean.main([str(exp)]) == 0
    gone = {
        "old/20260101T000000Z", "old/20260101T000000Z/ckpt.pth.tar", "jobs/code/one", "jobs/code/one/main.py",
        "results/first/logits.npy",
    }  # fmt: skip
    assert before - listing(exp) == gone
    assert all(path in shown for path in ("old/20260101T000000Z", "jobs/code/one", "results/first/logits.npy"))
    assert clean.main([str(exp)]) == 0
    assert "0.0 MB freed" in capsys.readouterr().out


@pytest.mark.system
def test_clean_follows_no_link_and_keeps_code_of_jobs_that_nobody_can_judge(exp: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "precious").mkdir(parents=True)
    (exp / "old" / "link").symlink_to(tmp_path / "elsewhere")
    row = {"job": "8", "scheduler": "gone", "code": str(exp / "jobs/code/one")}
    rows = (exp / "jobs" / "jobs.jsonl").read_text()
    (exp / "jobs" / "jobs.jsonl").write_text(json.dumps(row) + "\n" + rows)
    assert clean.main([str(exp)]) == 0
    assert (tmp_path / "elsewhere" / "precious").is_dir()
    assert (exp / "jobs" / "code" / "one").is_dir()
    (exp / "old").rmdir()
    (exp / "old").symlink_to(tmp_path / "elsewhere")
    assert clean.main([str(exp)]) == 0
    assert (tmp_path / "elsewhere" / "precious").is_dir()


@pytest.mark.parametrize("verb", [clean.main, watch.main])
def test_a_folder_that_is_no_experiment_is_refused(verb: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.yaml here"):
        verb([str(tmp_path)])


# ------------------------------------------------------------------------------------------------- watch
def test_the_page_fits_every_terminal(exp: Path) -> None:
    for width, height in ((200, 60), (80, 24), (30, 8), (10, 3)):
        lines = watch.page(exp, width, height)
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
    text = "\n".join(watch.page(exp, 100, 40))
    assert "iteration 24 of 100" in text
    assert "60 % computing, 40 % waiting for clips" in text
    assert "best top-1 55.00; 1 restart(s), 5 iteration(s) done twice, 1 loss spike(s), 2 fp16 step(s)" in text
    assert "INFO run: stopped iteration=24 by=SIGTERM" in text


def test_a_log_cannot_write_to_the_terminal(exp: Path) -> None:
    with (exp / "log.txt").open("a") as file:
        file.write("[2026-05-01T12:00:00+00:00] \x1b[2Jgone \x07\n")
    text = "".join(watch.page(exp, 100, 40))
    assert "\x1b" not in text
    assert "\\x1b[2Jgone" in text


def test_the_shape_of_a_curve() -> None:
    assert watch.sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert watch.sparkline([5.0], 10) == "▁"
    assert len(watch.sparkline(range(1000), 40)) == 40


@pytest.mark.system
def test_watch_in_a_terminal_reads_only_follows_the_run_and_leaves_it_as_it_was(exp: Path, repo_root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in exp.rglob("*")}
    master, slave = pty.openpty()
    words = [sys.executable, "main.py", "watch", str(exp)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "", "LINES": ""}
    process = subprocess.Popen(words, cwd=repo_root, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    screen = ""

    def wait_for(text: str, seconds: float = 30.0) -> None:
        nonlocal screen
        end = time.monotonic() + seconds
        while text not in screen:
            assert time.monotonic() < end, screen[-2000:]
            if select.select([master], [], [], 0.2)[0]:
                screen += os.read(master, 1 << 16).decode("utf-8", "replace")

    try:
        wait_for("iteration 24 of 100")
        assert {path: path.stat().st_mtime_ns for path in exp.rglob("*")} == before
        with (exp / "log.txt").open("a") as file:
            file.write("[2026-05-01T12:00:00+00:00] Iter: [90/100] Time 1 (1.0) Data 0 (0.0) ETA 0:00:10 clips/s 3.0\n")
        wait_for("iteration 90 of 100")
        os.write(master, b"q")
        wait_for("\x1b[?1049l")
        assert process.wait(20) == 0
        assert screen.index("\x1b[?1049h") < screen.index("\x1b[?1049l")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(master)
