"""Folds: trials of a sweep that are trained and evaluated for real, killed and started again, and pooled."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anal_tools import analyze, compare, folds, predict
from anal_tools.evaluate.results import Results
from anal_tools.report import build
from launch import __main__ as launch
from launch import attempts
from tests.evaluated import summary_of
from tests.experiment import fingerprint, make
from tests.slurm.cluster import until
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def experiment(folder: Path, data: Path, argv: str = "folds: 2", **changes: object) -> Path:
    """A tiny experiment with folds of the videos of motion8's validation list."""
    exp = make(folder, data, **({"steps": 4, "val_freq": 4, "print_freq": 1} | changes))
    file = exp / "config.yaml"
    text = file.read_text().replace("sampling: tsn}", f"sampling: tsn, {argv}}}")
    file.write_text(text.replace("lists/train.txt", "lists/val.txt"))
    return exp


def train(exp: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "launch", "train", str(exp), "local", "0"]
    return subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def events(exp: Path) -> list[tuple[str, str, int | None]]:
    return [(row["trial"], row["event"], row.get("code")) for row in attempts.read(exp / "folds")]


@pytest.mark.system
@pytest.mark.slow
def test_killed_and_started_again_the_numbers_are_the_same(tmp_path: Path, motion_videos: Path, capfd) -> None:
    calm, killed = (
        experiment(tmp_path / "calm", motion_videos),
        experiment(tmp_path / "killed", motion_videos, steps=40),
    )
    assert train(calm).wait() == 0
    text = (killed / "config.yaml").read_text()
    (killed / "config.yaml").write_text(text.replace("max_iter: 40", "max_iter: 4"))

    # Stopped with all its processes in the middle of the second fold.
    process = train(killed)
    log = killed / "folds/02/log.txt"
    until(lambda: log.is_file() and "Iter: [1/4]" in log.read_text(), 120)
    trial = attempts.read(killed / "folds")[-1]["pid"]
    for pid in (process.pid, trial):
        os.killpg(pid, signal.SIGKILL)
    process.wait()
    assert [event for event in events(killed) if event[0] == "01"] == [("01", "start", None)] * 2 + [("01", "end", 0)]
    before = {file: file.stat().st_mtime_ns for file in (killed / "folds/01").glob("ckpt*")}

    assert train(killed).wait() == 0
    assert "2 trials (1 done, 1 failed), 1 to run" in capfd.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in before} == before, "a fold that is done never runs again"
    assert fingerprint(killed / "folds/02") == fingerprint(calm / "folds/02")

    first, second = (Results.load(exp, "latest") for exp in (calm, killed))
    assert first.ids == second.ids
    assert (first.scores == second.scores).all()
    assert first.summary.get("folds") == second.summary.get("folds")
    assert train(killed).wait() == 0
    assert "2 trials (2 done), 0 to run" in capfd.readouterr().out

    # What reads results reads the pooled one.
    index = build.build([str(calm)], pictures=23, clips=0, cam=True)
    text = re.search(r'id="report-data">(.*?)</script>', index.read_text(), re.DOTALL)
    assert text
    data = json.loads(text.group(1))
    assert len(data["media"]) == 23, "held-out videos of all folds have pictures"
    looked = {int(row) for row, one in data["media"].items() if "maps" in one}
    wrong = set(map(int, (first.scores.argmax(axis=1) != first.labels).nonzero()[0]))
    assert looked == wrong, "each by the network of its fold"
    assert min(looked) < len(Results.load(calm / "folds/01").ids) <= max(looked)
    assert "differently" not in data["maps"][0]
    table = data["experiments"][0]["folds"]
    assert [row[1] for row in table["rows"]] == [about["videos"] for about in summary_of(first)["folds"].values()]
    assert table["mean"][0] == pytest.approx(sum(row[2][0] for row in table["rows"]) / 2, abs=1e-3)
    assert data["experiments"][0]["curves"]["loss_train"], "the mean of the folds"
    assert analyze.main([str(calm)]) == 0
    assert compare.main([str(calm), str(killed)]) == 0
    output = capfd.readouterr().out
    assert "of 2 folds the second is better in 0, the first in 0: mean difference +0.00, std 0.00" in output
    assert "McNemar p = 1" in output


@pytest.mark.system
@pytest.mark.slow
def test_an_evaluation_of_all_folds_with_other_views(tmp_path: Path, motion_videos: Path, capfd) -> None:
    exp = experiment(tmp_path / "exp", motion_videos, "folds: groups, fold_group: '[0-9](?=[.]mp4)'")
    names = sorted({line.split()[0][-5] for line in (motion_videos / "lists/val.txt").read_text().splitlines()})
    keep = [
        line for line in (motion_videos / "lists/val.txt").read_text().splitlines() if line.split()[0][-5] in names[:2]
    ]
    (exp / "two.txt").write_text("\n".join(keep) + "\n")
    sets = [word for key in ("train", "val") for word in ("--set", f"common.{key}_source={exp / 'two.txt'}")]
    assert launch.main(["train", str(exp), "local", "0", *sets, "--set", "common.print_freq=2"]) == 0
    capfd.readouterr()
    # A fold keeps the config that it was trained with
    assert launch.main(["eval", str(exp), "local", "0", *sets, "--views", "3crop"]) == 0
    assert "failed" not in capfd.readouterr().out
    assert launch.main(["eval", str(exp), "local", "0", *sets, "--set", "common.seed=7", "--views", "10crop"]) == 2
    assert "was trained with a different config than" in capfd.readouterr().err
    results = Results.load(exp, "latest-3crop")
    assert results.logits.shape == (len(keep), 3, 8)
    assert sorted(results.ids) == sorted(line.split()[0] for line in keep)
    assert folds.main([str(exp), "--name", "latest-3crop"]) == 0
    output = capfd.readouterr().out
    assert "fold  videos  top-1" in output
    assert "bootstrap over videos" in output
    assert launch.main(["eval", str(exp), "local", "0", "--checkpoint", "best"]) == 2
    assert launch.main(["train", str(exp), "local", "0", "--fresh"]) == 2
    # The experiment has no model of its own
    with pytest.raises(UserError, match=r"each fold has a model of its own; name one of them, such as .*/folds/\S+$"):
        predict.main([str(exp), str(motion_videos / "videos")])


def test_what_is_refused(tmp_path: Path, motion_videos: Path, capfd) -> None:
    from utils.engine import setup

    exp = experiment(tmp_path / "exp", motion_videos)
    with pytest.raises(UserError, match=r"data.folds is set; start .*train.sh"), setup.start(exp):
        pass
    with pytest.raises(UserError, match="there are no folds"):
        folds.main([str(exp)])
    assert launch.main(["train", str(exp), "local", "0", "--dry-run"]) == 0
    output = capfd.readouterr().out
    assert "sweep folds: 2 trials (2 new), 2 to run" in output
    assert (
        launch.main(["sweep", "s", "local", "0", "--into", str(tmp_path), "--exp", str(exp), "--grid", "seed=1"]) == 2
    )
    assert "a sweep cannot run folds" in capfd.readouterr().err
    (exp / "folds/lists/fold01_val.txt").write_text("videos/00000.mp4 0\n")
    assert launch.main(["train", str(exp), "local", "0"]) == 2
    assert "holds the lists of other folds" in capfd.readouterr().err


def test_a_fold_without_a_folder_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.evaluated import guessed, write_results

    exp = tmp_path / "exp/folds/01"
    exp.mkdir(parents=True)
    (exp / "config.yaml").write_text(json.dumps({}))
    write_results(exp, labels=[0, 1], logits=guessed([0, 1], 2), names=["a", "b"], name="latest")
    (tmp_path / "exp/folds/lists").mkdir()
    for name in ("fold01_val.txt", "fold02_val.txt"):
        (tmp_path / "exp/folds/lists" / name).write_text("")
    assert folds.main([str(tmp_path / "exp")]) == 1
    assert "not evaluated yet: 02" in capsys.readouterr().out


def test_a_pooled_result_of_two_folds_that_differ_is_refused(tmp_path: Path) -> None:
    from tests.evaluated import guessed, write_results

    for number, name in (("01", "b"), ("02", "c")):
        exp = tmp_path / "exp/folds" / number
        exp.mkdir(parents=True)
        (exp / "config.yaml").write_text(json.dumps({}))
        write_results(exp, labels=[0, 1], logits=guessed([0, 1], 2), names=["a", name], name="latest")
    with pytest.raises(UserError, match="different class_names"):
        folds.main([str(tmp_path / "exp")])
