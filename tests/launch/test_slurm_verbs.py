"""status, log, cancel, requeue and list, with a stub in place of SLURM's commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import __main__ as launcher
from launch import jobs, verbs
from tests.launch.test_slurm_request import Stub

SHOW = "JobId=2 JobName=x JobState={state} Reason=None Requeue=1 Restarts=3 ExitCode={code} WorkDir=/a b c=d"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    new_stub = Stub(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(new_stub.folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return new_stub


@pytest.fixture
def exp(tmp_path: Path, stub: Stub) -> Path:
    folder = tmp_path / "an exp"
    folder.mkdir()
    for job, verb in (("1", "train"), ("2", "train"), ("3", "eval")):
        row = {"job": job, "verb": verb, "partition": "p", "ranks": 8, "revision": "abc", "time": "t"}
        jobs.record(folder, row)
    (folder / "log.txt").write_text("[t] Iter: [40/100] Time 1\n[t]  * Prec@1 30.000\tPrec@5 1\n")
    (folder / "events").mkdir()
    rows = ({"step": step, "top1_val": top1} for step, top1 in ((20, 31.25), (40, 30.0)))
    (folder / "events" / "scalars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_status(exp: Path, stub: Stub, capsys) -> None:
    stub.answers(
        squeue={"out": "2|2|RUNNING|None\n3|3|PENDING|Priority"},
        scontrol={"out": SHOW.format(state="FAILED", code="2:0")},
    )
    assert launcher.main(["status", str(exp)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED code 2:0 restarts 3" in lines[0]
    assert "RUNNING" in lines[1]
    assert "PENDING (Priority)" in lines[2]
    assert lines[3] == "iteration 40 of 100, best top-1 so far 31.25"
    assert stub.calls("squeue")[0][2] == "1,2,3"


def test_cancel_ends_what_lives(exp: Path, stub: Stub, capsys) -> None:
    stub.answers(squeue={"out": "2|2|RUNNING|None\n9|9|RUNNING|None"})
    assert launcher.main(["cancel", str(exp)]) == 0
    assert stub.calls("scancel") == [["2"]]
    stub.answers(squeue={"out": ""})
    assert launcher.main(["cancel", str(exp)]) == 0
    assert "no job of this experiment" in capsys.readouterr().out


def test_requeue(exp: Path, stub: Stub, capsys) -> None:
    assert launcher.main(["requeue", str(exp)]) == 0
    assert stub.calls("scontrol") == [["requeue", "3"]]
    assert launcher.main(["requeue", str(exp), "--job", "7; touch canary"]) == 2
    stub.answers(squeue={"out": "2|2|RUNNING|None"})
    assert launcher.main(["requeue", str(exp), "--job", "1"]) == 2
    assert "job 2 is training here" in capsys.readouterr().err
    stub.answers(scontrol={"code": 1, "err": "Invalid job id specified"})
    assert launcher.main(["requeue", str(exp)]) == 2


def test_log_and_follow(exp: Path, stub: Stub, capsys) -> None:
    assert launcher.main(["log", str(exp)]) == 0
    assert "job 3 has not written anything yet" in capsys.readouterr().out
    out = verbs.output(exp, {"job": "3"})
    out.parent.mkdir(parents=True)
    out.write_text("one\ntwo\nthree\n")
    stub.answers(scontrol={"out": SHOW.format(state="FAILED", code="3:0")})
    assert launcher.main(["log", str(exp), "-n", "2", "--follow"]) == 3
    shown = capsys.readouterr().out
    assert "two\nthree" in shown
    assert "one" not in shown
    assert "job 3: FAILED" in shown
    assert launcher.main(["log", str(exp), "--job", "77"]) == 2


def test_list_works_without_slurm_too(exp: Path, stub: Stub, tmp_path: Path, capsys) -> None:
    stub.answers(squeue={"out": "1|1|RUNNING|None"})
    assert launcher.main(["list"]) == 0
    assert capsys.readouterr().out.split() == ["1", "RUNNING", "40/100", "31.25", *str(exp).split()]
    stub.answers(squeue={"code": 1, "err": "Unable to contact slurm controller"})
    assert launcher.main(["list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split()[:2] == ["3", "ended"]


def test_array_trials_and_ended_jobs(stub: Stub) -> None:
    stub.answers(squeue={"out": "5_1|5|RUNNING|None\n5_[2-3]|5|PENDING|JobArrayTaskLimit\n6|6|CANCELLED|None"})
    asked = [{"job": job} for job in ("5_1", "5_3", "5_4", "6", "--help")]
    assert jobs.states(asked) == {"5_1": "RUNNING", "5_3": "PENDING (JobArrayTaskLimit)"}
    assert stub.calls("squeue")[0][2] == "5,6"
    assert jobs.states([]) == {}


def test_no_jobs_and_no_commands(tmp_path: Path, exp: Path, stub: Stub, monkeypatch, capsys) -> None:
    assert launcher.main(["status", str(tmp_path)]) == 2
    assert "no job was submitted from here" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher.main(["cancel", str(exp)]) == 2
    assert "squeue is not installed here" in capsys.readouterr().err
