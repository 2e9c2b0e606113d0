"""What a run finds in its folder at the start: videos fixed since, an old run, files of others, another process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from datasets.loading import loader
from datasets.plan import order
from tests.experiment import few_videos, fingerprint, make
from tests.ranks import ROOT
from utils import config

SMALL = ["common.model.backbone=mobilenetv2", "common.lr_scheduler.warmup_steps=1"]


def ours(folder: Path, data: Path, videos: int, **changes: object) -> tuple[Path, list[str]]:
    """An experiment with copies of some videos, which a test may spoil, and the words of its command."""
    exp = make(folder, data, **changes)
    lines = (data / "lists/train.txt").read_text().splitlines(keepends=True)[:videos]
    for line in lines:
        target = exp / line.split()[0]
        target.parent.mkdir(exist_ok=True)
        shutil.copy(data / line.split()[0], target)
    (exp / "train.txt").write_text("".join(lines))
    settings = [*SMALL, f"common.train_source={exp}/train.txt", f"common.train_root={exp}", few_videos(exp, data)]
    return exp, ["train", str(exp), *(word for setting in settings for word in ("--set", setting))]


def spoil(exp: Path, samples: list[int]) -> Callable[[], None]:
    """Put junk into videos of the list; return a function that restores them."""
    lines = (exp / "train.txt").read_text().splitlines()
    paths = [exp / lines[sample].split()[0] for sample in samples]
    good = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"no video at all")

    def fix() -> None:
        for path, data in zip(paths, good, strict=True):
            path.write_bytes(data)

    return fix


def step_of(exp: Path) -> int:
    return torch.load(exp / "ckpt.pth.tar", weights_only=True)["step"]


@pytest.mark.parametrize("words", [[], ["--fresh"]])
def test_videos_fixed_since_do_not_stop_the_run_again(
    words: list[str], tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture
) -> None:
    exp, command = ours(tmp_path / "exp", motion_videos, 10, steps=3)
    fix = spoil(exp, [1, 4, 7])
    assert main.main(command) == 2
    assert "data.bad_budget allows 1" in capsys.readouterr().err
    assert "no video" not in (exp / "log.txt").read_text()
    fix()
    assert main.main([*command, *words]) == 0
    assert not list((exp / "jobs").glob("bad_samples*"))
    (old,) = (exp / "old").iterdir()
    assert "stopped" in (old / "jobs/bad_samples.jsonl").read_text()
    assert (old / "log.txt").exists() == bool(words)


def test_bad_videos_before_the_checkpoint_are_complained_of_once(
    tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture
) -> None:
    """12 videos are three steps; three are bad in the two that are saved, which is allowed, and one in the third."""
    exp, command = ours(tmp_path / "exp", motion_videos, 12, steps=6, val_freq=2)
    command += ["--set", "common.data.bad_budget=0.25"]
    cfg = config.load(exp, [word for word in command if "=" in word])
    turn_at = order.Order(cfg.data.order, cfg.seed, loader.records_of(cfg, "train"))
    fix = spoil(exp, [turn_at(position).sample for position in (0, 3, 5, 9)])
    assert main.main(command) == 2
    assert "data.bad_budget allows 3" in capsys.readouterr().err
    assert step_of(exp) == 2

    unfixed = tmp_path / "unfixed"
    shutil.copytree(exp, unfixed)
    words = [word.replace(str(exp), str(unfixed)) for word in command]
    assert main.main(words) == 2, "the next epoch is beyond the budget too"
    assert step_of(unfixed) == 4

    fix()
    assert main.main(command) == 0
    bad_samples = json.loads((exp / "jobs/bad_samples.json").read_text())
    assert len(bad_samples["bad"]) == 3, "what was bad in the steps that are done has happened"
    assert 'epoch=1 message="3 of 12 videos could not be read' in (exp / "log.txt").read_text()


def test_fresh_leaves_the_old_run_alone_until_the_new_one_is_known_to_be_right(
    tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture
) -> None:
    exp, command = ours(tmp_path / "exp", motion_videos, 8, steps=2, val_freq=2)
    assert main.main(command) == 0
    before = fingerprint(exp)
    good = (exp / "train.txt").read_text()
    (exp / "train.txt").write_text(good + "videos/00000.mp4 16 8\n")
    assert main.main([*command, "--fresh"]) == 2
    assert "train.txt:9" in capsys.readouterr().err
    (exp / "train.txt").write_text(good)
    assert main.main([*command, "--fresh", "--set", "common.model.backbone=mobilenetv3"]) == 2
    assert main.main([*command, "--fresh", "--set", f"common.model.pretrained={exp}/absent.pth"]) == 2
    assert fingerprint(exp) == before
    assert not (exp / "old").exists()
    assert main.main([*command, "--fresh"]) == 0
    assert fingerprint(exp) == before
    (old,) = (exp / "old").iterdir()
    assert fingerprint(old) == before


def test_a_run_whose_folder_was_taken_stops_before_it_writes(
    tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    exp, command = ours(tmp_path / "exp", motion_videos, 8, steps=4, val_freq=1)
    code = f"from utils.run_dir import RunDir; RunDir.open({str(exp)!r}); print(1, flush=True); input()"
    others: list[subprocess.Popen[Any]] = []
    train_step = main.train_step

    def meanwhile(run: Any, step: int, *batches: Any, **wishes: Any) -> Any:
        if step in (1, 3):
            (exp / "jobs/lock.json").unlink()
        if step == 3:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            others.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ, **pipes))
            assert others[0].stdout is not None
            assert others[0].stdout.readline() == b"1\n"
        return train_step(run, step, *batches, **wishes)

    monkeypatch.setattr(main, "train_step", meanwhile)
    try:
        assert main.main(command) == 2
        assert "another process has taken this folder" in capsys.readouterr().err
        assert step_of(exp) == 3, "a lock that was only removed was put back, and the run went on"
        assert json.loads((exp / "jobs/lock.json").read_text())["pid"] == others[0].pid
    finally:
        for other in others:
            other.communicate(b"\n")


def without(state: dict[str, Any], key: str) -> None:
    del state[key]


def other_groups(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"].pop()


def other_shapes(state: dict[str, Any]) -> None:
    momentum = next(iter(state["optimizer"]["state"].values()))
    momentum["momentum_buffer"] = momentum["momentum_buffer"][:1]


def other_weights(state: dict[str, Any]) -> None:
    state["model"] = {"conv.weight": torch.zeros(3)}


FOREIGN = {
    "no shards": (lambda state: without(state, "shards"), "it has no: shards"),
    "no optimizer": (lambda state: without(state, "optimizer"), "it has no: optimizer"),
    "no config": (lambda state: state.update(config=None), "not what a run writes: config"),
    "other parameter groups": (other_groups, "the optimiser's state is from a different model or recipe"),
    "other shapes": (other_shapes, "the optimiser's state is from a different model or recipe"),
    "other weights": (other_weights, "weights of a different model"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> tuple[Path, list[str]]:
    """A finished run, whose checkpoint the tests spoil in copies of the state that it holds."""
    exp, command = ours(tmp_path_factory.mktemp("done") / "exp", motion_videos, 8, steps=2, val_freq=2)
    assert main.main(command) == 0
    return exp, command


@pytest.mark.parametrize("case", FOREIGN)
def test_a_checkpoint_of_others_is_one_clear_text_that_names_it(
    case: str, done: tuple[Path, list[str]], capsys: pytest.CaptureFixture
) -> None:
    exp, command = done
    good = {path: path.read_bytes() for path in exp.glob("ckpt*")}
    change, expected = FOREIGN[case]
    state = torch.load(exp / "ckpt.pth.tar", weights_only=True)
    change(state)
    try:
        for path in good:
            path.unlink()
        torch.save(state, exp / "ckpt.pth.tar")
        assert main.main(command) == 2
    finally:
        for path, data in good.items():
            path.write_bytes(data)
    message = capsys.readouterr().err
    assert expected in message
    assert "ckpt.pth.tar" in message
    assert "Traceback" not in message


def test_all_ranks_stop_when_their_folder_was_taken(tmp_path: Path, motion_videos: Path) -> None:
    exp, command = ours(tmp_path / "exp", motion_videos, 16, steps=500, val_freq=1)
    words = [sys.executable, "-m", "launch", "train", str(exp), "local", "2", *command[2:]]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        lines_read: list[str] = []
        taken = False
        for line in run.stdout:
            lines_read.append(line)
            if " * Prec@1" in line and not taken:
                taken = True
                lock = exp / "jobs/lock.json"
                theirs = json.loads(lock.read_text()) | {"token": "0" * 32, "host": "node7", "machine": "other"}
                (exp / "jobs/theirs").write_text(json.dumps(theirs))
                (exp / "jobs/theirs").replace(lock)
    text = "".join(lines_read)
    assert run.returncode == 2, text
    assert text.count("another process has taken this folder") == 1, text
    assert "Traceback" not in text
    assert json.loads((exp / "jobs/lock.json").read_text())["token"] == "0" * 32


def test_a_start_imports_nothing_that_only_compiling_and_counting_need() -> None:
    slow = ("torch._dynamo", "torch.utils.flop_counter", "torchvision", "triton")  # the last two by the second
    code = f"import sys, main, utils.engine.setup; print([name for name in {slow!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
