"""From `train.sh PARTITION N` to the sbatch script and the job's list, with a stub in place of SLURM's commands."""

from __future__ import annotations

import functools
import json
import os
import pickletools
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import __main__ as launcher
from launch import jobs, scheduler, snapshot
from utils.errors import UserError
from utils.schedulers import slurm

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """\
common:
    model: {type: tsn, backbone: resnet18, num_segments: 3, num_class: 4}
    batch_size: 8
    lr_scheduler: {type: COSINE, base_lr: 0.01, max_iter: 100}
    val_freq: 50
    train_root: /
    train_source: train.txt
    val_root: /
    val_source: val.txt
"""
CLUSTER = "defaults: {gpus_per_node: 8, cpus_per_gpu: 4, mem: 100G, environment: {NCCL_DEBUG: it's}}\n"
HOSTILE_FOLDER = 'it\'s $(touch canary); `touch canary` & "q" é'
STUB = """\
#!{python}
import json, os, sys, pathlib
here = pathlib.Path({folder!r})
name = os.path.basename(sys.argv[0])
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answer = json.loads((here / "answers.json").read_text()).get(name, {{}})
if name == "sbatch" and not answer:
    (here / "script.sh").write_text(open(sys.argv[1]).read())
    (here / "environment.json").write_text(json.dumps(dict(os.environ)))
    answer = {{"out": "Submitted batch job 4711"}}
print(answer.get("out", ""))
print(answer.get("err", ""), file=sys.stderr)
sys.exit(answer.get("code", 0))
"""


class Stub:
    """SLURM's commands as one script that records its calls and gives the answers set by a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "python").symlink_to(sys.executable)
        for name in ("sbatch", "squeue", "sinfo", "scontrol", "scancel"):
            (folder / name).write_text(STUB.format(python=sys.executable, folder=str(folder)))
            (folder / name).chmod(0o755)
        self.answers(sinfo={"out": "VI_SP_VA_1080TI\ndebug"})

    def answers(self, **answers: dict) -> None:
        file = self.folder / "answers.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | answers))

    def calls(self, name: str) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [row[1:] for row in rows if row[0] == name]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    environment = dict(os.environ)
    new_stub = Stub(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{new_stub.folder}:{os.environ['PATH']}")
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    monkeypatch.setenv("ZOETROPE_CLUSTER", str(tmp_path / "cluster.yaml"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield new_stub
    os.environ.clear()  # `submit` removes variables
    os.environ.update(environment)


@pytest.fixture
def exp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / HOSTILE_FOLDER
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    for name in ("train.txt", "val.txt"):
        (folder / name).write_text("a 1 0\n")
    small = tmp_path / "small-tree"
    small.mkdir()
    (small / "main.py").write_text("")
    monkeypatch.setattr(snapshot, "take", functools.partial(snapshot.take, root=small))
    return folder


@pytest.mark.parametrize(
    ("ranks", "shape"), [(1, (1, 1)), (5, (1, 5)), (8, (1, 8)), (16, (2, 8)), (32, (4, 8)), (1024, (128, 8))]
)
def test_nodes_times_gpus(ranks: int, shape: tuple[int, int]) -> None:
    assert scheduler.split(ranks, 8) == shape


@pytest.mark.parametrize(("ranks", "near"), [(9, "8 or 16"), (30, "24 or 32"), (33, "32 or 40")])
def test_a_number_that_does_not_divide(ranks: int, near: str) -> None:
    with pytest.raises(UserError, match=f"ask for {near} "):
        scheduler.split(ranks, 8)
    with pytest.raises(UserError, match="N must be 1 or more"):
        scheduler.split(0, 8)


def test_dry_run_prints_everything_and_submits_nothing(exp: Path, stub: Stub, capsys) -> None:
    words = [
        "--dry-run",
        "--time",
        "3-00:00",
        "--account",
        "a",
        "--exclude",
        "n1,n[3-4]",
        "--set",
        "seed=$(touch canary)",
    ]
    assert launcher.main(["train", str(exp), "VI_SP_VA_1080TI", "32", *words]) == 2  # the seed is not a number
    capsys.readouterr()
    words[-1] = "seed=7"
    assert launcher.main(["train", str(exp), "VI_SP_VA_1080TI", "32", *words]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=100G",
        "#SBATCH --time=4320",
        "#SBATCH --account=a",
        "#SBATCH --exclude='n1,n[3-4]'",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=USR2@120",
    ):
        assert line in lines
    assert "wckey" not in shown
    assert "--kill-on-bad-exit=1 --cpus-per-task=4" in shown
    assert "ZOETROPE_RANKS=32" in shown
    assert "# 32 tasks: 4 node(s) x 8" in shown
    assert "batch_size: 8" in shown
    assert "seed: 7" in shown
    assert [name for name in sorted(path.name for path in exp.iterdir())] == ["config.yaml", "train.txt", "val.txt"]
    assert not (stub.folder / "calls.jsonl").exists(), "no command of SLURM was run"


def test_dry_run_needs_no_slurm(exp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ZOETROPE_CLUSTER", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert launcher.main(["eval", str(exp), "VI_SP_VA_1080TI", "4", "--dry-run"]) == 0
    assert "#SBATCH --gpus-per-node=4" in capsys.readouterr().out
    assert launcher.main(["eval", str(exp), "VI_SP_VA_1080TI", "4"]) == 2
    assert "no partition called VI_SP_VA_1080TI: there is no SLURM here" in capsys.readouterr().err


def test_submitted_script_is_shell_that_does_no_more_than_it_says(
    exp: Path, stub: Stub, tmp_path: Path, capsys
) -> None:
    os.environ.update({"SLURM_NTASKS": "3", "SLURM_CONF": "/c", "SBATCH_SIGNAL": "B:INT@1", "RANK": "1"})
    assert launcher.main(["train", str(exp), "VI_SP_VA_1080TI", "16", "--set", "seed=3", "--fresh"]) == 0
    assert "submitted job 4711" in capsys.readouterr().out
    passed = json.loads((stub.folder / "environment.json").read_text())
    assert passed["SLURM_CONF"] == "/c"
    assert not {"SLURM_NTASKS", "SBATCH_SIGNAL", "RANK"} & set(passed)

    # Run the script with a stub srun: it must come to the task's command with the right words and leave no canary.
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$SEEN.words"\nenv -0 > "$SEEN.env"\npwd > "$SEEN.pwd"\nexit 7\n')
    srun.chmod(0o755)
    stub.answers(scontrol={"out": "node1\nnode2"})
    work = tmp_path / "work"
    work.mkdir()
    env = {**os.environ, "SEEN": str(tmp_path / "seen"), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]"}
    env |= {"RANK": "9", "PYTHONPATH": f"{ROOT}:/mine"}
    done = subprocess.run(["bash", str(stub.folder / "script.sh")], cwd=work, env=env, capture_output=True, check=False)
    assert done.returncode == 7, "the script leaves with srun's code"
    seen = dict(part.split("=", 1) for part in (tmp_path / "seen.env").read_text().split("\0") if part)
    assert (seen["MASTER_ADDR"], seen["MASTER_PORT"], seen["ZOETROPE_RANKS"]) == ("node1", "24711", "16")
    assert seen["NCCL_DEBUG"] == "it's"
    assert "RANK" not in seen
    (code,) = (exp / "jobs/code").iterdir()
    assert seen["PYTHONPATH"].split(":")[0] == str(code)
    assert Path((tmp_path / "seen.pwd").read_text().strip("\n")) == code
    words = (tmp_path / "seen.words").read_text().split("\0")[:-1]
    assert words[-1] == str(exp / "jobs/slurm")
    assert list(tmp_path.rglob("canary")) == []
    assert list(ROOT.glob("canary")) == []


def test_what_a_task_holds_and_what_is_noted(exp: Path, stub: Stub) -> None:
    assert launcher.main(["train", str(exp), "debug", "8", "--set", "seed=3", "--fresh"]) == 0
    (row,) = jobs.submitted(exp)
    assert row["argv"] == ["train", str(exp), "--set", "seed=3", "--fresh"]
    assert (row["job"], row["verb"], row["partition"], row["ranks"], row["nodes"]) == ("4711", "train", "debug", 8, 1)
    pickled = (exp / "jobs/slurm/4711_submitted.pkl").read_bytes()
    names = {str(argument) for opcode, argument, _ in pickletools.genops(pickled) if "UNICODE" in opcode.name}
    assert {"launch.job", "RankTask", "argv", str(exp)} <= names
    assert jobs.experiments([]) == [exp]
    assert jobs.experiments([exp.parent]) == [exp]


def test_one_live_training_job(exp: Path, stub: Stub, capsys) -> None:
    assert launcher.main(["train", str(exp), "debug", "8"]) == 0
    stub.answers(squeue={"out": "4711|4711|PENDING|Resources"})
    assert launcher.main(["train", str(exp), "debug", "8"]) == 2
    assert "job 4711 of this experiment is PENDING (Resources)" in capsys.readouterr().err
    assert launcher.main(["eval", str(exp), "debug", "8"]) == 0, "an evaluation may run beside it"
    assert launcher.main(["train", str(exp), "debug", "8", "--force"]) == 0
    stub.answers(squeue={"out": "4711|4711|COMPLETED|None"})
    assert launcher.main(["train", str(exp), "debug", "8"]) == 0
    stub.answers(squeue={"code": 1, "err": "slurm_load_jobs error: Invalid job id specified"})
    assert launcher.main(["train", str(exp), "debug", "8"]) == 0
    stub.answers(squeue={"code": 1, "err": "Unable to contact slurm controller"})
    assert launcher.main(["train", str(exp), "debug", "8"]) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["debgu", "8"], "no partition called debgu (did you mean debug?); SLURM has VI_SP_VA_1080TI, debug"),
        (["debug; touch canary", "8"], "is not allowed here"),
        (["$(touch canary)", "8"], "is not allowed here"),
        (["a\nb", "8"], "is not allowed here"),
        (["debug", "8", "--account", "a' 'b"], "--account:"),
        (["debug", "8", "--qos", "`touch canary`"], "--qos:"),
        (["debug", "8", "--constraint", "a b"], "--constraint:"),
        (["debug", "8", "--nodelist", "n1 n2"], "--nodelist:"),
        (["debug", "8", "--exclude", "n1\n#SBATCH --wrap=x"], "--exclude:"),
        (["debug", "8", "--dependency", "afterok:1;touch canary"], "--dependency:"),
        (["debug", "8", "--time", "1;touch canary"], "--time:"),
        (["debug", "8", "--time", "1"], "too short for a signal 120 s before"),
        (["debug", "12"], "ask for 8 or 16"),
        (["debug", "0"], "N must be 1 or more on a partition"),
        (["local", "2", "--account", "a"], "--account is for a partition of cluster.yaml"),
        (["local", "2", "--dry-run"], "--dry-run is for a partition of cluster.yaml"),
    ],
)
def test_refusals_write_and_run_nothing(
    words: list[str], says: str, exp: Path, stub: Stub, tmp_path: Path, capsys
) -> None:
    assert launcher.main(["train", str(exp), *words]) == 2
    assert says in capsys.readouterr().err
    assert stub.calls("sbatch") == []
    assert not (exp / "jobs").exists()
    assert list(tmp_path.rglob("canary")) == []


@pytest.mark.parametrize("name", ["new\nline", "per%cent", "back\\slash", "bell\a"])
def test_folders_that_slurm_cannot_write_to(name: str, exp: Path, stub: Stub, capsys) -> None:
    other = exp.parent / name
    exp.rename(other)
    assert launcher.main(["train", str(other), "debug", "8"]) == 2
    assert "SLURM cannot write to a folder" in capsys.readouterr().err
    assert not (other / "jobs").exists()


def test_what_sbatch_refuses_is_said(exp: Path, stub: Stub, capsys) -> None:
    stub.answers(sbatch={"code": 1, "err": "sbatch: error: Batch job submission failed: Invalid account"})
    assert launcher.main(["train", str(exp), "debug", "8"]) == 2
    assert (
        "SLURM refused the job: sbatch: error: Batch job submission failed: Invalid account" in capsys.readouterr().err
    )
    assert jobs.submitted(exp) == []


def test_a_part_of_a_node_gets_that_part_of_its_memory() -> None:
    assert slurm._share("100G", 8, 8) == "100G"
    assert slurm._share("100G", 2, 8) == "25600M"
    assert slurm._share("1000", 1, 3) == "334M"


def test_snapshot_holds_the_working_tree_and_what_git_says(tmp_path: Path) -> None:
    root = tmp_path / "a tree"
    root.mkdir()

    def git(*words: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    for name in ("main.py", "gone.py", "pkg/it's a file.py", "data/README.md", ".gitignore"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("ignored.bin\n" if name == ".gitignore" else "one\n")
    git("add", ".")
    git("commit", "-qm", "x")
    (root / "gone.py").unlink()
    (root / "main.py").write_text("two\n")
    (root / "new.sh").write_text("#!/bin/sh\n")
    (root / "new.sh").chmod(0o755)
    (root / "ignored.bin").write_text("x")
    (root / "x/jobs/code/old").mkdir(parents=True)
    (root / "x/jobs/code/old/main.py").write_text("old\n")
    (root / "link").symlink_to("main.py")
    copies = [snapshot.take(root / "x/jobs/code", root) for _ in range(2)]
    assert copies[0] != copies[1]
    copy = copies[0]
    names = sorted(str(path.relative_to(copy)) for path in copy.rglob("*"))
    kept = [
        ".gitignore",
        "REVISION",
        "data",
        "link",
        "main.py",
        "new.sh",
        "pkg",
        "pkg/it's a file.py",
        "uncommitted.diff",
    ]
    assert names == kept
    assert (copy / "main.py").read_text() == "two\n"
    assert (copy / "data").resolve() == root / "data"
    assert (copy / "new.sh").stat().st_mode & stat.S_IXUSR
    assert "+two" in (copy / "uncommitted.diff").read_text()
    assert (copy / "REVISION").read_text().strip().endswith("+dirty")
    from utils import run_dir

    assert run_dir.revision(copy) == run_dir.revision(root)
    (root / "main.py").write_text("three\n")
    assert (copy / "main.py").read_text() == "two\n"


def test_snapshot_without_git(tmp_path: Path) -> None:
    root = tmp_path / "unpacked"
    (root / "utils/__pycache__").mkdir(parents=True)
    for name in ("main.py", "utils/a.py", "utils/__pycache__/a.pyc", "notes.txt"):
        (root / name).write_text("x")
    copy = snapshot.take(tmp_path / "code", root)
    assert sorted(str(p.relative_to(copy)) for p in copy.rglob("*")) == [
        "REVISION", "main.py", "uncommitted.diff", "utils", "utils/a.py",
    ]  # fmt: skip
