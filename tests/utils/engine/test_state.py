"""What a checkpoint holds: one list, to which a thing is added in one place."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import main
from tests.experiment import few_videos, make
from utils import checkpoint
from utils.checkpoint import CorruptCheckpoint
from utils.engine import state
from utils.errors import UserError


def small(folder: Path, data: Path) -> tuple[Path, str]:
    exp = make(folder, data, backbone="mobilenetv2", steps=4, val_freq=4, print_freq=1)
    return exp, few_videos(exp, data, 2)


def test_a_new_thing_in_a_checkpoint_is_one_entry(
    tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A toy: the number of steps whose loss was above 2, counted by the run and kept over a stop."""
    toy = state.CheckpointEntry(
        "high_losses",
        save=lambda now: getattr(now, "high_losses", 0),
        load=lambda now, source: setattr(now, "high_losses", source.state["high_losses"]),
        types=(int,),
    )
    monkeypatch.setattr(state, "ENTRIES", (*state.ENTRIES, toy))
    exp, few = small(tmp_path / "exp", motion_videos)
    seen, train_step, stop_at = [], main.train_step, 2

    def counting(learner, step, batches, *, stop, save, meanwhile):  # noqa: ANN001, ANN202
        return train_step(learner, step, batches, stop=stop or step + 1 == stop_at, save=save, meanwhile=meanwhile)

    def after_step(run, step, numbers, then=state_of_run()):  # noqa: ANN001, ANN202
        run.state.high_losses = getattr(run.state, "high_losses", 0) + 1
        seen.append(run.state.high_losses)
        then(run, step, numbers)

    monkeypatch.setattr("utils.engine.run.TrainingRun.after_step", after_step)
    monkeypatch.setattr(main, "train_step", counting)
    assert main.train(exp, overrides=[few]) == 75
    saved = torch.load(exp / "ckpt.pth.tar", weights_only=True)
    assert saved["high_losses"] == 2

    # A file without it is no checkpoint to resume from, and is named.
    del saved["high_losses"]
    with pytest.raises(CorruptCheckpoint, match="it has no: high_losses"):
        state.check(exp / "ckpt.pth.tar", saved)

    stop_at = 0
    monkeypatch.setattr(main, "train_step", train_step)
    assert main.train(exp, overrides=[few]) == 0
    assert seen == [1, 2, 3, 4], "the second process resumes the count of the first"


def state_of_run():  # noqa: ANN201
    from utils.engine.run import TrainingRun

    return TrainingRun.after_step


def test_every_entry_is_saved_checked_and_loaded(tmp_path: Path, motion_videos: Path) -> None:
    exp, few = small(tmp_path / "exp", motion_videos)
    parts = ["common.ema=0.9", "common.precise_bn.batches=2"]
    assert main.train(exp, overrides=[few, *parts]) == 0
    saved = torch.load(exp / "ckpt.pth.tar", weights_only=True)
    absent = {"peer", "distill", "initial"}  # of a run with a second network, of one from known weights
    assert set(saved) == {entry.name for entry in state.ENTRIES} - absent
    state.check(exp / "ckpt.pth.tar", saved)
    for entry in state.ENTRIES:
        if entry.types and entry.name not in absent:
            cut = {name: value for name, value in saved.items() if name != entry.name}
            if entry.name == "config":  # without it nothing else is known to be needed
                cut.pop("ema")
            with pytest.raises(CorruptCheckpoint, match=entry.name):
                state.check(exp / "ckpt.pth.tar", cut)
            with pytest.raises(CorruptCheckpoint, match=entry.name):
                state.check(exp / "ckpt.pth.tar", saved | {entry.name: "odd"})


def test_a_config_that_does_not_fit_changes_nothing(tmp_path: Path, motion_videos: Path) -> None:
    exp, few = small(tmp_path / "exp", motion_videos)
    assert main.train(exp, overrides=[few]) == 0
    before = {path.name: path.read_bytes() for path in exp.iterdir() if path.is_file()}
    state_now = torch.load(exp / "ckpt.pth.tar", weights_only=True)
    state_now["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    torch.save(state_now | {"validated_step": 2}, exp / "ckpt.pth.tar")
    for name in ("ckpt_prev.pth.tar", "ckpt_best.pth.tar"):
        (exp / name).unlink(missing_ok=True)
    damaged = (exp / "ckpt.pth.tar").read_bytes()
    with pytest.raises(UserError, match="optimiser's state is from a different model"):
        main.train(exp, overrides=[few])
    assert (exp / "ckpt.pth.tar").read_bytes() == damaged
    assert (exp / "log.txt").read_bytes() == before["log.txt"]


def test_readers_end_when_the_model_cannot_be_built(tmp_path: Path, motion_videos: Path) -> None:
    """Readers start before the model is built; an error there leaves no process behind."""
    import psutil

    exp, few = small(tmp_path / "exp", motion_videos)
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    words = [few, "common.workers=2", f"common.model.pretrained={tmp_path / 'weights.pth'}"]
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(UserError, match=r"weights\.pth"):
        main.train(exp, overrides=words)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []
    assert checkpoint.find(exp) is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
