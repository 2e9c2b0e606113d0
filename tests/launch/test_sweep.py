"""Sweeps: trials and their names, what runs and what does not, on this machine and as a job array; and the table."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import attempts, collect, grid, job, sweep
from launch.grid import Sweep, Trial
from utils import config
from utils.errors import UserError
from utils.schedulers import Place, slurm

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """\
common:
    model: {type: tsn, backbone: resnet18, num_segments: 3, num_class: 4}  # small
    batch_size: 8
    lr_scheduler: {type: COSINE, base_lr: 0.01, max_epoch: 3}
    val_freq: 50
    train_root: .
    train_source: train.txt
    val_root: .
    val_source: val.txt
"""
# Stands in for `python -m launch`: trains nothing, leaves what training leaves, fails and waits as the config says.
STAND_IN = """\
import os, sys, time
from pathlib import Path
from utils import config
verb, exp, partition, ranks = sys.argv[1:5]
cfg = config.load(Path(exp))
with open(os.environ["RAN"], "a") as file:
    file.write(Path(exp).name + "\\n")
time.sleep(float(os.environ.get("WAIT", "0")))
if cfg.seed == 3 and not os.environ.get("FIXED"):
    sys.exit("error: seed 3 is unlucky")
with open(Path(exp) / "log.txt", "a") as file:
    file.write("[t] Iter: [10/10] x\\n[t] INFO run: finished iteration=10 metric=Prec@1 best=50\\n")
(Path(exp) / "events").mkdir(exist_ok=True)
(Path(exp) / "events/scalars.jsonl").write_text('{"step": 10, "top1_val": %g, "loss_val": 1}\\n' % (50 + cfg.seed))
"""


@pytest.mark.parametrize(
    ("lines", "is_trained"),
    [
        (["Iter: [9/10] x", "INFO run: finished iteration=10 metric=Prec@1 best=50"], True),
        (["Iter: [9/10] x", "finished: 10 iterations, best"], True),
        (["nothing to do: this run finished at iteration 10"], True),
        (["INFO run: nothing_to_do iteration=10"], True),
        (["INFO run: finished iteration=10 metric=Prec@1", "Iter: [11/20] x"], False),
        (["finished: 10 iterations, best", "Iter: [11/20] x"], False),
        (["Iter: [9/10] x", "INFO run: stopped iteration=9 by=SIGTERM"], False),
    ],
)
def test_a_log_tells_if_a_run_has_finished(tmp_path: Path, lines: list[str], is_trained: bool) -> None:
    (tmp_path / "log.txt").write_text("".join(f"[t] {line}\n" for line in lines))
    assert sweep.is_trained(tmp_path) is is_trained


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    """An experiment with relative lists beside it, in a folder with a hostile name."""
    folder = tmp_path / "it's $(touch canary); é" / "one exp"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    for name in ("train.txt", "val.txt"):
        (folder / name).write_text("a 1 0\n")
    return folder


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trials run the stand-in; returns the file that lists them in the order in which they started."""
    program, ran = tmp_path / "stand_in.py", tmp_path / "ran"
    program.write_text(STAND_IN)
    real = subprocess.Popen

    def start(argv: list[str], **options: Any) -> subprocess.Popen:
        if argv[1:3] == ["-m", "launch"]:
            argv = [sys.executable, str(program), *argv[3:]]
        return real(argv, **options)

    monkeypatch.setattr(sweep.subprocess, "Popen", start)
    monkeypatch.setenv("RAN", str(ran))
    return ran


def run(tmp_path: Path, *words: object, name: str = "s1", n: str = "0") -> int:
    return sweep.main([name, "local", n, "--into", str(tmp_path / "sweeps"), *map(str, words)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("common.seed=1,2", ("seed", ["1", "2"])),
        ("a.b=[1, 2],[3,4]", ("a.b", ["[1, 2]", "[3,4]"])),
        ("x='a,b',c", ("x", ["'a,b'", "c"])),
        ("x=1", ("x", ["1"])),
    ],
)
def test_grid_texts(text: str, expected: tuple) -> None:
    assert grid.parse(text) == expected


@pytest.mark.parametrize("text", ["seed", "seed=", "seed=1,,2", "seed=1,1", "se ed=1", "=1", "a..b=1", "$(x)=1"])
def test_grid_texts_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--grid"):
        grid.parse(text)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "-x", "x;y", "$(x)", "a\nb", "é", "x" * 65])
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NAME"):
        grid.folder_of(name, tmp_path)


def test_trials_are_all_choices_with_names_of_their_own(tmp_path: Path) -> None:
    exps = (tmp_path / "a/b", tmp_path / "c/b", tmp_path / "x y/b")
    new_sweep = Sweep(tmp_path / "s", "train", exps, ("seed=1,2", "data.on_bad=skip,error"))
    trials = new_sweep.trials()
    assert len(trials) == len({trial.name for trial in trials}) == 12
    assert trials[1].overrides == ["seed=1", "data.on_bad=error"]
    assert trials[0].name.startswith("a-b_seed=1_on_bad=skip-")
    assert all(set(trial.name) <= set(grid.re.sub(r"\W", "", trial.name) + "-_.=+") for trial in trials)
    larger = Sweep(tmp_path / "s", "train", exps[::-1], ("seed=2,1,5", "data.on_bad=skip,error"))
    assert {trial.name for trial in trials} < {trial.name for trial in larger.trials()}
    with pytest.raises(UserError, match="seed is given twice"):
        Sweep(tmp_path / "s", "train", exps, ("seed=1", "common.seed=2")).trials()


def test_a_cell_is_an_experiment_with_the_values_written_in(exp: Path, tmp_path: Path) -> None:
    new_sweep = Sweep(tmp_path / "s", "train", (exp,), ("lr_scheduler.max_iter=7", "common.augmentation.area=[0.5, 1]"))
    (trial,) = new_sweep.trials()
    folder = grid.make(new_sweep, trial)
    text = (folder / "config.yaml").read_text()
    assert text.startswith(
        f"# Trial of the sweep s, made from {exp}/config.yaml with\n#   common.lr_scheduler.max_iter=7\n"
    )
    assert "max_iter: 7" in text
    assert "# sweep s" in text
    cfg = config.load(folder)
    assert (cfg.lr_scheduler.max_iter, cfg.lr_scheduler.max_epoch, cfg.augmentation.area) == (7, None, (0.5, 1))
    assert cfg.train_source == str(exp / "train.txt"), "relative paths still lead beside the experiment"
    assert os.access(folder / "train.sh", os.X_OK)
    (exp / "config.yaml").write_text(CONFIG.replace("batch_size: 8", "batch_size: 4"))
    grid.make(new_sweep, trial)
    assert config.load(folder).batch_size == 4, "a trial that has not begun follows its experiment"
    (folder / "log.txt").touch()
    (exp / "config.yaml").write_text(CONFIG)
    with pytest.raises(UserError, match="was trained with a different config"):
        grid.make(new_sweep, trial)


def test_only_what_is_missing_runs(exp: Path, tmp_path: Path, stand_in: Path, monkeypatch, capsys) -> None:
    words = ("--exp", exp, "--grid", "seed=1,2,3,4", "--parallel", 2)
    assert run(tmp_path, *words) == 1
    output = capsys.readouterr().out
    assert "4 trials (4 new), 4 to run" in output
    assert "exit code 1: error: seed 3 is unlucky" in output
    assert len(stand_in.read_text().split()) == 4
    assert run(tmp_path, *words, "--dry-run") == 0
    assert "4 trials (3 done, 1 failed), 1 to run" in capsys.readouterr().out
    monkeypatch.setenv("FIXED", "1")
    assert run(tmp_path, "--retry") == 0, "without --exp the sweep resumes as it was defined"
    assert "seed=3" in stand_in.read_text().split()[-1]
    assert len(stand_in.read_text().split()) == 5
    assert run(tmp_path, *words) == 0
    assert run(tmp_path, "--exp", exp, "--grid", "seed=1,2,3,4,5") == 0, "a larger grid runs the new trial only"
    assert len(stand_in.read_text().split()) == 6
    assert not list(tmp_path.rglob("canary"))


def test_collect_writes_the_table(exp: Path, tmp_path: Path, stand_in: Path, capsys) -> None:
    run(tmp_path, "--exp", exp, "--grid", "seed=1,2,3", "common.label_smooth=0,0.1")
    capsys.readouterr()
    assert collect.main(["s1", "--into", str(tmp_path / "sweeps")]) == 1
    output = capsys.readouterr().out
    folder = tmp_path / "sweeps" / "s1"
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["label_smooth"], row["best_top1"], row["step"]) for row in rows] == [
        ("1", "0", "51.0", "10"), ("1", "0.1", "51.0", "10"), ("2", "0", "52.0", "10"), ("2", "0.1", "52.0", "10"),
    ]  # fmt: skip
    text = (folder / "table.md").read_text()
    assert text.startswith("# Sweep s1\n\n4 of 6 trials\n\n| trial ")
    assert text.count("- failed: ") == output.count("failed: ") == 2
    assert "seed 3 is unlucky" in text
    assert (folder / "table.png").stat().st_size > 5000


@pytest.mark.parametrize("lines", ['{"step": 5, "top1_val": "nan"}\n{"step": 10, "top1_val": 40.0}\n', ""])
def test_collect_without_a_number_in_some_validations(
    exp: Path, tmp_path: Path, stand_in: Path, capsys: pytest.CaptureFixture[str], lines: str
) -> None:
    assert run(tmp_path, "--exp", exp, "--grid", "seed=1,2") == 0
    folder = tmp_path / "sweeps" / "s1"
    first = next(path for path in sorted(folder.rglob("scalars.jsonl")) if "seed=1" in str(path))
    first.write_text(lines)
    assert collect.main(["s1", "--into", str(tmp_path / "sweeps")]) == 0
    with (folder / "table.csv").open() as file:
        assert [row["best_top1"] for row in csv.DictReader(file)] == ["40.0" if lines else "", "52.0"]
    assert (folder / "table.png").exists()
    capsys.readouterr()


def test_an_evaluation_cell_is_a_result_of_its_experiment(exp: Path, tmp_path: Path) -> None:
    new_sweep = Sweep(tmp_path / "s", "eval", (exp,), ("val_dense=true,false",), ("--checkpoint", "latest"))
    first, second = new_sweep.trials()
    name = f"s.{first.name}"
    expected = ["eval", str(exp), "--set", "val_dense=true", "--name", name, "--checkpoint", "latest"]
    assert new_sweep.argv(first) == expected
    (exp / "results").mkdir()
    summary = {"metrics": {"top1": 50.0, "top5": 75.0, "loss": 1.0, "num_videos": 8.0}, "counts": {"failed": 1}}
    (exp / "results" / f"{name}.json").write_text(json.dumps(summary))
    states = sweep.states(new_sweep, [first, second])
    assert [states[trial.name].kind for trial in (first, second)] == ["done", "new"]
    assert collect._row(new_sweep, first)["failed_videos"] == 1


def test_views_of_an_evaluation_are_swept(exp: Path, tmp_path: Path) -> None:
    new_sweep = Sweep(
        tmp_path / "s", "eval", (exp,), ("eval.views=centre,10x3", "eval.crop_size=32", "val_dense=false")
    )
    first, second = new_sweep.trials()
    assert first.overrides == ["val_dense=false"]
    words = ["--set", "val_dense=false", "--views", "centre", "--crop-size", "32", "--name"]
    assert new_sweep.argv(first)[2:-1] == words
    assert first.name != second.name
    for verb, key in (("eval", "eval.view"), ("train", "eval.views")):
        with pytest.raises(UserError, match=rf"{key} is an option of --verb eval, which has eval.checkpoint"):
            Sweep(tmp_path / "s", verb, (exp,), (f"{key}=centre",)).trials()


def test_errors_before_anything_is_made(exp: Path, tmp_path: Path, stand_in: Path) -> None:
    for words, says in (
        (("--exp", exp, "--grid", "seed=1,two"), "seed"),
        (("--exp", exp, "--grid", "sed=1"), "did you mean"),
        (("--exp", exp / "none", "--grid", "seed=1"), "no such experiment"),
        (("--exp", exp, "--grid", "val_source=/none.txt"), "no list file"),
        (("--exp", exp, "--parallel", 0), "--parallel"),
        ((), "no such sweep"),
    ):
        with pytest.raises(UserError, match=says):
            run(tmp_path, *words)
    assert not (tmp_path / "sweeps").exists()
    assert not stand_in.exists()


def test_a_signal_stops_the_trials_and_starts_no_other(exp: Path, tmp_path: Path, stand_in: Path, monkeypatch) -> None:
    monkeypatch.setenv("WAIT", "60")
    child = os.fork()
    if child == 0:
        os._exit(run(tmp_path, "--exp", exp, "--grid", "seed=1,2"))
    end = time.monotonic() + 30
    # The shell creates the file before it writes into it
    while not (stand_in.exists() and stand_in.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert len(stand_in.read_text().split()) == 1
    stopped = grid.read(tmp_path / "sweeps" / "s1")
    kinds = [state.kind for state in sweep.states(stopped, stopped.trials()).values()]
    assert kinds == ["failed", "new"], "the stand-in does not save: it was killed"


def test_waiting_tasks_of_an_array_are_live() -> None:
    is_among = [slurm._is_among(job, "12_[3-5,7%2]") for job in ("12_4", "12_7", "12_2", "12_6", "12", "1_4")]
    assert is_among == [True, True, False, False, False, False]


def test_a_task_of_an_array_notes_its_start_and_end_and_runs_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    codes = [2, 0]

    class Trial(job.RankTask):
        def _run(self, place: Place, is_main: bool) -> None:
            if codes.pop(0):
                raise SystemExit(2)

    for code in (2, 0, 0):
        task = Trial("exp", [], max_restarts=1, max_stalled=1, sweep=str(tmp_path), trial="trial")
        if code:
            with pytest.raises(SystemExit):
                task()
        else:
            task()
    rows = [json.loads(line) for line in (tmp_path / attempts.FILE).read_text().splitlines()]
    assert [(row["event"], row["job"], row.get("code")) for row in rows] == [
        ("start", "12_3", None), ("end", "12_3", 2), ("start", "12_3", None), ("end", "12_3", 0),
    ]  # fmt: skip


def test_the_launcher_knows_both_verbs(tmp_path: Path) -> None:
    for words, says in ((["sweep", "a/b", "local", "0"], "NAME"), (["collect", "none"], "no such sweep")):
        argv = [sys.executable, "-m", "launch", *words, "--into", str(tmp_path)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert says in done.stderr


def test_cell_names_fit_in_file_names(tmp_path: Path) -> None:
    new_sweep = Sweep(tmp_path / "s", "train", (tmp_path / ("é" * 80) / ("x" * 200),), (f"a={'9' * 300}",))
    (trial,) = new_sweep.trials()
    assert isinstance(trial, Trial)
    assert len(os.fsencode(trial.name)) < 100


def test_values_of_a_grid_end_where_the_partition_begins() -> None:
    from launch.sweep import _parser, one_word_each

    for words in (
        ["lrs", "--exp", "E", "--grid", "a=1,2", "b=[1, 2]", "local", "1"],
        ["lrs", "local", "1", "--exp", "E", "--grid", "a=1,2", "--grid", "b=[1, 2]"],
        ["lrs", "--exp", "E", "--grid", "a=1,2", "b=[1, 2]", "--retry", "local", "1"],
    ):
        args, left = _parser().parse_known_args(one_word_each(words))
        assert (args.name, args.partition, args.ranks, args.exp, left) == ("lrs", "local", 1, ["E"], [])
        assert [text for texts in args.grid for text in texts] == ["a=1,2", "b=[1, 2]"]
