"""Ranks on this machine: what they get, what comes back, and what a signal does. torchrun is the real one."""

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

from launch import local
from utils import processes
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("rank_script.py")
START = (
    "import sys; from pathlib import Path; from launch import local;"
    "sys.exit(local.run(sys.argv[3:], int(sys.argv[2]), script=Path(sys.argv[1])))"
)


def start(folder: Path, ranks: int, *words: str, **env: str) -> subprocess.Popen[str]:
    """The launcher in a process of its own, with rank_script.py as the script."""
    argv = [sys.executable, "-c", START, str(SCRIPT), str(ranks), str(folder), *words]
    variables = {"PYTHONPATH": str(ROOT), "SLURM_PROCID": "3", "SLURM_NTASKS": "7", **env}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(argv, env=os.environ | variables, text=True, preexec_fn=at_a_terminal, **pipes)


def at_a_terminal() -> None:
    """The tests themselves may run under nohup, and what is ignored is inherited."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def started(folder: Path, ranks: int):
    return lambda: len(list(folder.glob("started.*"))) == ranks


@pytest.mark.parametrize(("ranks", "mode", "code"), [(0, "0", 0), (1, "75", 75), (1, "2", 2)])
def test_one_process(tmp_path: Path, ranks: int, mode: str, code: int) -> None:
    process = start(tmp_path, ranks, mode, "a b'c")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "")
    about = json.loads((tmp_path / "started.0").read_text())
    assert about["argv"] == [str(tmp_path), mode, "a b'c"]
    assert (about["RANK"], about["ZOETROPE_RANKS"]) == (None, "1")
    if ranks == 0:
        assert about["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("mode", "code"), [("0", 0), ("75", 75), ("2", 2)])
def test_two_ranks_their_exit_code_comes_back_without_noise(tmp_path: Path, mode: str, code: int) -> None:
    process = start(tmp_path, 2, mode)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == ""
    for rank in range(2):
        about = json.loads((tmp_path / f"started.{rank}").read_text())
        assert (about["RANK"], about["WORLD_SIZE"], about["ZOETROPE_RANKS"]) == (str(rank), "2", "2")
        assert about["PYTHONPATH"].split(":")[0] == str(ROOT)
        assert int(about["OMP_NUM_THREADS"]) >= 1


def test_a_rank_that_crashes_ends_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "exitcode" in errors  # torchrun's table: which rank


@pytest.mark.parametrize("mode", ["error", "alike", "lost"])
def test_what_only_another_rank_knows_is_said_once_and_last(tmp_path: Path, mode: str) -> None:
    process = start(tmp_path, 2, mode)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("b.mp4 does not decode") == 1
    last = errors.splitlines()[-1]
    assert last == f"error: {'' if mode == 'alike' else 'rank 1: '}b.mp4 does not decode"
    assert len(errors.splitlines()) == (2 if mode == "lost" else 1), "no table of torchrun's"


def test_a_closed_terminal_stops_the_ranks_unless_nohup_said_otherwise(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "wait", "0")
    until(started(tmp_path, 2))
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (tmp_path / "saved.1").read_text() == "SIGTERM"

    variables = {"PYTHONPATH": str(ROOT)}
    argv = ["nohup", sys.executable, "-c", START, str(SCRIPT), "2", str(tmp_path), "wait", "0"]
    for file in tmp_path.glob("*.?"):
        file.unlink()
    process = subprocess.Popen(argv, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(started(tmp_path, 2))
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    assert not list(tmp_path.glob("saved.*"))
    process.terminate()
    assert process.wait(timeout=60) == 75


def test_ctrl_c_lets_the_ranks_save_and_leave(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "wait", "2")
    until(started(tmp_path, 2))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert [(tmp_path / f"saved.{rank}").read_text() for rank in range(2)] == ["SIGINT"] * 2
    assert errors.splitlines() == ["stopping: the ranks save and leave; press Ctrl-C again to kill them"]


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "wait", "1000")
    until(started(tmp_path, 2))
    below = processes.descendants(process.pid)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate(timeout=20)
    assert process.returncode == 130
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 10)


def test_ctrl_c_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "early")
    until(started(tmp_path, 2))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "wait", "0")
    until(started(tmp_path, 2))
    below = processes.descendants(process.pid)
    process.kill()
    process.communicate(timeout=60)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 60)
    assert (tmp_path / "saved.0").read_text() == "SIGTERM"


def test_ranks_do_not_outlive_a_killed_torchrun(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "wait", "0")
    until(started(tmp_path, 2))
    (torchrun,) = processes.children(process.pid)
    ranks = processes.children(torchrun)
    os.kill(torchrun, signal.SIGKILL)
    _, errors = process.communicate(timeout=10)
    assert errors == "error: torchrun was ended by SIGKILL; its ranks stop\n"
    assert process.returncode == 75, "they have saved"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert (tmp_path / "saved.1").read_text() == "SIGTERM"


def test_ranks_that_cannot_save_in_time_are_killed_without_their_torchrun(tmp_path: Path) -> None:
    process = start(tmp_path, 2, "wait", "1000")
    until(started(tmp_path, 2))
    (torchrun,) = processes.children(process.pid)
    ranks = processes.children(torchrun)
    os.kill(process.pid, signal.SIGSTOP)  # the launcher cannot help
    os.kill(torchrun, signal.SIGKILL)
    until(lambda: all(processes.start_ticks(pid) < 0 for pid in ranks), 10)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=10)
    assert process.returncode == 137


def test_environment_of_another_launcher_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    inherited = {"RANK": "3", "MASTER_ADDR": "x", "SLURM_STEP_ID": "0", "PYTHONPATH": "/mine", "HOME": "/h"}
    env = local.environment(inherited, 4)
    assert env == {
        "HOME": "/h",
        "PYTHONPATH": f"{ROOT}:/mine",
        "PYTHONUNBUFFERED": "1",
        "ZOETROPE_RANKS": "4",
        "OMP_NUM_THREADS": "4",
    }
    assert local.environment({"OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"


@pytest.mark.system
def test_more_ranks_than_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\necho 'GPU 0: A (UUID: GPU-1)'\necho '  MIG 1g: (UUID: MIG-1)'\necho 'GPU 1: A (UUID: GPU-2)'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="3 ranks need 3 GPUs, and there are 2 here"):
        local.run(["train", "x"], 3)
    assert processes.gpu_count({"CUDA_VISIBLE_DEVICES": "1"}) == 1
    assert processes.gpu_count({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert processes.gpu_count({"CUDA_VISIBLE_DEVICES": "0,-1,1"}) == 1


def test_half_written_exit_codes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "code.0").write_text("75\n")
    (tmp_path / "code.1").write_text("7")
    assert local.exit_codes(str(tmp_path / "code"), 3) == {0: 75}
