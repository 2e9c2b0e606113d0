"""The training loop end to end on real videos: files, resume, stop, ranks, and what bad input leads to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from tests import forked
from tests.experiment import few_videos, fingerprint, make
from tests.log_lines import odd_lines
from tests.ranks import ROOT

RANKED = "import sys, main; sys.exit(main.main(sys.argv[1:]))"


def losses(exp: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (exp / "events" / "scalars.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss_train"] for record in records if "loss_train" in record}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """A run that nothing disturbed."""
    exp = make(tmp_path_factory.mktemp("runs") / "calm", motion_videos)
    assert main.train(exp) == 0
    return exp


def test_a_run_leaves_what_the_readme_promises(calm: Path) -> None:
    names = {path.name for path in calm.iterdir()}
    assert names == {
        "config.yaml",
        "ckpt.pth.tar",
        "ckpt_best.pth.tar",
        "ckpt_prev.pth.tar",
        "events",
        "jobs",
        "log.txt",
    }
    text = (calm / "log.txt").read_text()
    assert "Iter: [6/6]" in text
    assert "total_num = 23" in text
    assert odd_lines(calm / "log.txt") == []
    assert not list((calm / "jobs").iterdir()), "the lock is given back"
    state = torch.load(calm / "ckpt.pth.tar", weights_only=True)
    assert (state["step"], state["validated_step"], state["shards"], state["global_batch"]) == (6, 6, 1, 4)
    assert state["classes"][0] == "left"
    assert state["resize"] == "cv2-linear"
    assert sorted(losses(calm)) == [1, 2, 4, 6]


def test_a_finished_run_started_again_says_so_and_changes_nothing(calm: Path, capsys: pytest.CaptureFixture) -> None:
    before = fingerprint(calm)
    assert main.train(calm) == 0
    assert "INFO run: nothing_to_do iteration=6 " in capsys.readouterr().out
    assert fingerprint(calm) == before


def stopping(train_step, at: int, number: signal.Signals):
    """`train_step` that sends this process a signal before step `at`."""

    def step_and_signal(run, step, batches, **wishes):
        if step == at:
            os.kill(os.getpid(), number)
        return train_step(run, step, batches, **wishes)

    return step_and_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_stops_after_the_step_and_the_same_command_continues(
    number: signal.Signals, calm: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = make(tmp_path / "stopped", motion_videos, workers=1)
    monkeypatch.setattr(main, "train_step", stopping(main.train_step, 3, number))
    before = signal.getsignal(number)  # a test run that a shell put into the background ignores SIGINT
    assert main.train(exp) == 75
    assert signal.getsignal(number) == before, "handlers are given back"
    saved = torch.load(exp / "ckpt.pth.tar", weights_only=True)["step"]
    assert saved in (4, 5), "the flag is seen at the next step boundary"
    monkeypatch.undo()
    assert main.train(exp) == 0
    assert fingerprint(exp) == fingerprint(calm)


@pytest.mark.parametrize(
    "point",
    [
        "checkpoint.replace:0:1",
        "log.line:0:9",
        *(pytest.param(point, marks=pytest.mark.nightly) for point in ("checkpoint.tmp:0:2", "checkpoint.done:0:2")),
    ],
)
def test_killed_and_started_again_ends_with_the_same_bits(
    point: str, calm: Path, tmp_path: Path, motion_videos: Path
) -> None:
    exp = make(tmp_path / "killed", motion_videos)
    command = [sys.executable, "-c", RANKED, "train", str(exp)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ZOETROPE_FAILPOINT": point}
    killed = forked.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert main.train(exp) == 0
    assert fingerprint(exp) == fingerprint(calm)


def test_log_and_curves_are_optional(
    calm: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Both vanish after step 3, and a file takes the place of the curves' folder: the bits do not depend on them."""
    exp = make(tmp_path / "bare", motion_videos)
    train_step = main.train_step

    def step_and_remove(run, step, batches, **wishes):
        if step == 3:
            (exp / "log.txt").unlink()
            shutil.rmtree(exp / "events")
            (exp / "events").touch()
        return train_step(run, step, batches, **wishes)

    monkeypatch.setattr(main, "train_step", step_and_remove)
    assert main.train(exp) == 0
    lines = (exp / "log.txt").read_text().splitlines()
    assert "log.txt was removed or replaced: it begins again here" in lines[0]
    assert "INFO run: finished iteration=6 metric=top-1 best=" in lines[-1]
    assert sum("WARNING curves: " in line and "File exists" in line for line in lines) == 1
    assert "Traceback" not in capfd.readouterr().err
    for name in ("ckpt.pth.tar", "ckpt_best.pth.tar"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (exp, calm))
        for key in ("step", "validated_step", "best_metric"):
            assert ours[key] == theirs[key]
        assert ours["window"]["loss"] == theirs["window"]["loss"]
        assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])


def test_the_revision_is_asked_once_and_kept(
    tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files under a run may change; what it runs does not."""
    asked: list[str] = []

    def revision() -> str:
        asked.append(f"revision {len(asked)}")
        return asked[-1]

    monkeypatch.setattr("utils.run_dir.revision", revision)
    exp = make(tmp_path / "exp", motion_videos)
    assert main.train(exp, overrides=[few_videos(exp, motion_videos)]) == 0
    assert asked == ["revision 0"]
    for name in ("ckpt.pth.tar", "ckpt_prev.pth.tar", "ckpt_best.pth.tar"):
        assert torch.load(exp / name, weights_only=True)["code"] == "revision 0"


def test_bn_statistics_of_each_group_survive_a_restart(
    tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards, two BN groups, statistics not shared: the second group's are nowhere but in the checkpoint."""
    states = []
    for name, stop_at in (("whole", None), ("parts", 2)):
        exp = make(tmp_path / name, motion_videos, sync_stats=False, steps=4, val_freq=4)
        if stop_at is not None:
            with monkeypatch.context() as patch:
                patch.setattr(main, "train_step", stopping(main.train_step, stop_at, signal.SIGTERM))
                assert main.train(exp, overrides=["common.shards=2"]) == 75
        assert main.train(exp, overrides=["common.shards=2"]) == 0
        states.append(torch.load(exp / "ckpt.pth.tar", weights_only=True))
    whole, parts = states
    assert whole["group_statistics"].shape[0] == 2
    assert not torch.equal(whole["group_statistics"][0], whole["group_statistics"][1])
    assert torch.equal(whole["group_statistics"], parts["group_statistics"])


def test_a_loss_that_is_not_a_number_stops_before_the_step_and_names_videos(
    tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture
) -> None:
    exp = make(tmp_path / "nan", motion_videos, val_freq=1)
    words = [
        "common.lr_scheduler.base_lr=1e12",
        "common.lr_scheduler.warmup_lr=1e30",
        "common.lr_scheduler.max_iter=40",
    ]
    code = main.main(["train", str(exp), *[word for item in words for word in ("--set", item)]])
    message = capsys.readouterr().err
    assert code == 2
    assert "is not finite" in message
    assert "videos/" in message
    state = torch.load(exp / "ckpt.pth.tar", weights_only=True)
    assert state["step"] >= 1


def test_accuracy_is_of_clips_that_could_be_read_and_mirrored_ones_change_their_class(
    tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second video is broken, and all are of the classes left and right, which a mirror exchanges."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "videos").symlink_to(motion_videos / "videos")
    (tmp_path / "root" / "broken.mp4").write_bytes(b"no video")
    lines = (motion_videos / "lists/train.txt").read_text().splitlines()
    good = [line for line in lines if line.endswith((" 0", " 1"))][:4]
    (tmp_path / "half.txt").write_text("".join(f"{line}\nbroken.mp4 16 0\n" for line in good))
    settings = [f"common.train_source={tmp_path}/half.txt", f"common.train_root={tmp_path}/root"]
    settings += [
        f"common.data.class_names={motion_videos}/lists/classInd.txt",
        "common.data.flip_labels=[[left,right]]",
    ]
    settings += ["common.data.bad_budget=1.0", "common.augmentation.mix_up=false", "common.seed=3"]
    train_step, seen = main.train_step, []

    def observed(learner, step, batches, **requests):
        inner, rows = learner.loss, []

        def loss(answer, clips, labels, weights, lam):
            value, logits = inner(answer, clips, labels, weights, lam)
            rows.append((weights, logits.argmax(1) == labels))
            before = batches[len(rows) - 1]
            expected = [label ^ 1 if flip else label for label, flip in zip(before.labels, before.flip, strict=True)]
            assert labels.tolist() == [int(label) for label in expected]
            seen.extend(zip(before.flip.tolist(), weights.tolist(), strict=True))
            return value, logits

        learner.loss = loss
        numbers = train_step(learner, step, batches, **requests)
        learner.loss = inner
        weights, right = (torch.cat(parts) for parts in zip(*rows, strict=True))
        if weights.any():
            assert numbers["top1"] == pytest.approx(100 * right[weights > 0].double().mean().item())
        return numbers

    monkeypatch.setattr(main, "train_step", observed)
    exp = make(tmp_path / "half", motion_videos, steps=3, val_freq=3, print_freq=1)
    assert main.train(exp, overrides=settings) == 0
    assert {weight for _, weight in seen} == {0.0, 1.0}
    assert {flip for flip, weight in seen if weight} == {True, False}


def test_fresh_moves_the_old_run_away(tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "twice", motion_videos, steps=3)
    assert main.train(exp) == 0
    first = fingerprint(exp)
    assert main.train(exp, fresh=True) == 0
    (old,) = (exp / "old").iterdir()
    assert (old / "ckpt.pth.tar").exists()
    assert fingerprint(exp) == first


BAD_INPUT = {
    "wrong key": (lambda exp: edit(exp, "label_smooth:", "label_smoth:"), "config.yaml:21: common.label_smoth"),
    "missing list": (lambda exp: edit(exp, "lists/train.txt", "lists/absent.txt"), "there is no list file"),
    "empty list": (lambda exp: own_list(exp, ""), "mine.txt"),
    "label out of range": (lambda exp: own_list(exp, "videos/00000.mp4 16 8\n"), "mine.txt:1"),
    "bad line": (lambda exp: own_list(exp, "videos/00000.mp4 16 1\nvideos/00001.mp4 many\n"), "mine.txt:2"),
    "corrupt checkpoint": (
        lambda exp: (exp / "ckpt.pth.tar").write_bytes(b"not a checkpoint"),
        "no checkpoint can be read",
    ),
    "folder that is not writable": (lambda exp: (exp / "jobs").write_text("a file"), "cannot be written"),
    "no such experiment": (lambda exp: (exp / "config.yaml").unlink(), "config.yaml"),
    "undecodable video": (lambda exp: broken_video(exp), "broken.mp4"),
    "unknown backbone": (lambda exp: edit(exp, "resnet18", "resnet81"), "did you mean resnet18"),
}


def edit(exp: Path, old: str, new: str) -> None:
    path = exp / "config.yaml"
    path.write_text(path.read_text().replace(old, new))


def own_list(exp: Path, text: str) -> None:
    (exp / "mine.txt").write_text(text)
    lines = (exp / "config.yaml").read_text().splitlines()
    lines = [f"    train_source: {exp}/mine.txt" if "train_source" in line else line for line in lines]
    (exp / "config.yaml").write_text("\n".join(lines) + "\n")


def broken_video(exp: Path) -> None:
    (exp / "broken.mp4").write_bytes(b"\0" * 1000)
    own_list(exp, "broken.mp4 16 1\n" * 8)
    edit(exp, "sampling: tsn", "sampling: tsn, on_bad: error")
    lines = (exp / "config.yaml").read_text().splitlines()
    lines = [f"    train_root: {exp}" if "train_root" in line else line for line in lines]
    (exp / "config.yaml").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_text_and_exit_code_2(
    case: str, tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture
) -> None:
    exp = make(tmp_path / "bad", motion_videos)
    damage, expected = BAD_INPUT[case]
    damage(exp)
    assert main.main(["train", str(exp)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert "Traceback" not in message


def test_a_checkpoint_of_another_model_is_refused_with_its_keys(
    calm: Path, tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture
) -> None:
    exp = make(tmp_path / "other", motion_videos)
    edit(exp, "resnet18", "resnet34")
    assert main.main(["eval", str(exp), "--checkpoint", str(calm / "ckpt.pth.tar")]) == 2
    message = capsys.readouterr().err
    assert "weights of a different model" in message
    assert "layer1.2" in message


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, main\n"
        "assert main.main(['--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'yaml', 'pydantic', 'av', 'cv2'} & set(sys.modules)\n"
        "sys.exit(f'help imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in main.VERBS)
    assert len(done.stdout.splitlines()) <= 30, "one screen"


def test_an_unknown_verb_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture) -> None:
    assert main.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
