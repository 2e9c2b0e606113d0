"""Parts of recipes in whole runs: resume stays exact, the trajectory untouched, and the right weights are evaluated."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from tests.experiment import fingerprint, make
from tests.ranks import ROOT
from tests.test_train import losses, stopping
from utils import checkpoint, config
from utils.errors import UserError

LAYER = "backbone.features.0.1.running_mean"
SHORT = ["common.lr_scheduler.max_iter=4", "common.val_freq=2"]


def small(folder: Path, data: Path) -> Path:
    """A new experiment that validates on six videos."""
    exp = make(folder, data, print_freq=1)
    (exp / "val.txt").write_text("".join((data / "lists/val.txt").read_text().splitlines(keepends=True)[:6]))
    text = (exp / "config.yaml").read_text().replace("backbone: resnet18", "backbone: mobilenetv2")
    (exp / "config.yaml").write_text(text.replace(f"{data}/lists/val.txt", f"{exp}/val.txt"))
    return exp


def launched(exp: Path, ranks: int, overrides: list[str]) -> None:
    """Train by `python -m launch` on some ranks of this machine."""
    words = [sys.executable, "-m", "launch", "train", str(exp), "local", str(ranks)]
    words += [word for override in overrides for word in ("--set", override)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


def run(folder: Path, data: Path, *overrides: str, code: int = 0) -> Path:
    """Train a new small experiment."""
    exp = small(folder, data)
    assert main.train(exp, overrides=[*SHORT, *overrides]) == code
    return exp


def state_of(exp: Path, name: str = "ckpt.pth.tar") -> dict[str, Any]:
    return torch.load(exp / name, weights_only=True)


def digest(exp: Path) -> str:
    """`fingerprint`, and whatever stands beside the model."""
    whole = hashlib.sha256(fingerprint(exp).encode())
    state = state_of(exp)
    for part in ("ema", "precise_bn", "peer"):
        for key, tensor in sorted(state.get(part, {}).items()):
            whole.update(key.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()


Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Runs:
    """`runs(overrides)`: a finished run with these, made once; tests only look at it."""
    folder, done = tmp_path_factory.mktemp("parts"), {}

    def finished(*overrides: str) -> Path:
        if overrides not in done:
            done[overrides] = run(folder / str(len(done)), motion_videos, *overrides)
        return done[overrides]

    return finished


@pytest.fixture(scope="module")
def calm(runs: Runs) -> Path:
    """Four steps without anything special; also the teacher."""
    return runs()


CASES = {
    "ema and precise_bn": ["common.ema=0.5", "common.precise_bn.batches=2"],
    "kd, class_balanced": ["common.distill.teacher={teacher}", "common.data.order=class_balanced"],
    "dml and ema": ["common.distill.teacher={teacher}", "common.distill.kind=dml", "common.ema=0.9"],
}


@pytest.mark.parametrize(
    "case", ["dml and ema", *(pytest.param(name, marks=pytest.mark.nightly) for name in CASES if name != "dml and ema")]
)
def test_stopped_and_continued_ends_with_the_same_bits(
    case: str, runs: Runs, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = [text.format(teacher=runs()) for text in CASES[case]]
    with monkeypatch.context() as patch:
        patch.setattr(main, "train_step", stopping(main.train_step, 1, signal.SIGTERM))
        parts = run(tmp_path / "parts", motion_videos, *extra, code=75)
    assert state_of(parts)["step"] in (2, 3)
    assert main.train(parts, overrides=[*SHORT, *extra]) == 0
    assert digest(parts) == digest(runs(*extra))


def test_precise_bn_and_ema_leave_the_training_alone(calm: Path, runs: Runs) -> None:
    exp = runs(*CASES["ema and precise_bn"])
    before, after = state_of(calm), state_of(exp)
    for key, tensor in before["model"].items():
        assert torch.equal(tensor, after["model"][key]), key
    assert losses(calm) == losses(exp)
    assert set(after["precise_bn"]) == {key for key in before["model"] if "running_" in key}
    assert not torch.equal(after["precise_bn"][LAYER], after["model"][LAYER])


def test_evaluation_takes_the_weights_that_validated(runs: Runs) -> None:
    """`eval` of the last checkpoint gives the numbers of the last validation, and says which weights these are."""
    overrides = CASES["ema and precise_bn"]
    exp = runs(*overrides)
    text = (exp / "log.txt").read_text()
    assert "INFO ema: start decay=0.5 " in text
    assert text.count("INFO batch_norm: averaged batches=2 seconds=") == 2
    points = [json.loads(line) for line in (exp / "events" / "scalars.jsonl").read_text().splitlines()]
    validated = [point for point in points if "top1_val" in point][-1]
    words = [word for override in [*SHORT, *overrides] for word in ("--set", override)]
    assert main.main(["eval", str(exp), "--checkpoint", "latest", *words]) == 0
    summary = json.loads((exp / "results" / "latest.json").read_text())
    assert summary["metrics"]["loss"] == pytest.approx(validated["loss_val"], abs=1e-5)
    assert summary["metrics"]["top1"] == pytest.approx(validated["top1_val"])
    phrase = "moving average of the weights (decay 0.5), batch-norm statistics averaged over 2 batches"
    assert summary["weights_are"] == phrase
    state = state_of(exp)
    weights, _ = checkpoint.evaluated_weights(state)
    assert not torch.equal(weights["classifier.weight"], state["model"]["classifier.weight"])
    assert torch.equal(weights[LAYER], state["precise_bn"][LAYER])


def test_a_checkpoint_between_two_validations_says_that_it_has_running_statistics() -> None:
    state = {"model": {"w": torch.ones(1)}, "config": {"precise_bn": {"batches": 5}}}
    weights, phrase = checkpoint.evaluated_weights(state)
    assert weights == state["model"]
    assert "running batch-norm statistics" in phrase
    assert checkpoint.evaluated_weights({"model": {}})[1] == "weights as trained (no moving average)"


def test_the_teacher_changes_the_student_but_not_its_start(calm: Path, runs: Runs) -> None:
    """At weight 1e-12 the student trains as if alone: same initial weights, same draws, same order."""
    light = runs(f"common.distill.teacher={calm}", "common.distill.weight=1e-12")
    for step, value in losses(calm).items():
        assert losses(light)[step] == pytest.approx(value, rel=1e-5)
    heavy = runs(f"common.distill.teacher={calm}")
    assert losses(heavy)[1] != pytest.approx(losses(calm)[1], rel=1e-3)
    assert "INFO distill: start kind=kd " in (heavy / "log.txt").read_text()


def test_a_teacher_may_be_a_file(calm: Path, runs: Runs, tmp_path: Path) -> None:
    folder, best = runs(f"common.distill.teacher={calm}"), calm / checkpoint.BEST
    assert losses(runs(f"common.distill.teacher={best}")) == losses(folder)
    bare = tmp_path / "bare.pth"
    torch.save(checkpoint.evaluated_weights(state_of(calm, checkpoint.BEST))[0], bare)
    assert losses(runs(f"common.distill.teacher={bare}")) == losses(folder)


def test_mutual_learning_keeps_both_networks(calm: Path, runs: Runs) -> None:
    exp = runs(*[text.format(teacher=calm) for text in CASES["dml and ema"]])
    state, start = state_of(exp), state_of(calm, checkpoint.BEST)
    assert state["peer"].keys() == state["model"].keys()
    assert not torch.equal(state["peer"]["classifier.weight"], start["model"]["classifier.weight"])
    assert state["distill"]["model"]["backbone"] == "mobilenetv2"
    assert losses(exp)[1] > losses(calm)[1], "both networks' losses are summed"


def test_one_and_two_ranks_end_alike(tmp_path: Path, motion_videos: Path) -> None:
    """Mutual learning (with an untrained peer), average and precise batch norm at once, float64."""
    peer = make(tmp_path / "peer", motion_videos)
    overrides = [*SHORT, "common.precision=fp64", "common.shards=2", "common.model.kwargs.bn_group_size=2"]
    overrides += ["common.lr_scheduler.max_iter=3", "common.val_freq=3", "common.model.backbone=resnet18"]
    overrides += [text.format(teacher=peer) for case in ("dml and ema", "ema and precise_bn") for text in CASES[case]]
    outcomes = []
    for ranks in (1, 2):
        exp = small(tmp_path / f"on{ranks}", motion_videos)
        if ranks == 1:
            assert main.train(exp, overrides=overrides) == 0
        else:
            launched(exp, ranks, overrides)
        outcomes.append((losses(exp), state_of(exp)))
    (one_losses, one), (two_losses, two) = outcomes
    assert sorted(one_losses) == [1, 2, 3]
    assert two_losses == pytest.approx(one_losses, abs=1e-9)
    for part in ("model", "ema", "peer", "precise_bn"):
        for key, tensor in one[part].items():
            torch.testing.assert_close(two[part][key], tensor, rtol=0, atol=1e-8)


def test_what_is_refused_about_a_teacher(
    calm: Path, tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture
) -> None:
    def message_of(exp: Path, teacher: Path) -> str:
        overrides = [*SHORT, f"common.distill.teacher={teacher}"]
        assert main.main(["train", str(exp), *[word for o in overrides for word in ("--set", o)]]) == 2
        return capsys.readouterr().err

    fresh = small(tmp_path / "untrained", motion_videos)
    exp = small(tmp_path / "refused", motion_videos)
    assert "holds no trained classifier" in message_of(exp, fresh)
    assert "there is no " in message_of(exp, tmp_path / "nowhere")
    text = (fresh / "config.yaml").read_text()
    (fresh / "config.yaml").write_text(text.replace("num_class: 8", "num_class: 9"))
    assert "has 9 classes, this experiment 8" in message_of(exp, fresh)


def test_a_teacher_that_changed_is_refused_on_resume(
    calm: Path, tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tmp_path / "teacher.pth.tar"
    teacher.write_bytes((calm / checkpoint.BEST).read_bytes())
    override = f"common.distill.teacher={teacher}"
    with monkeypatch.context() as patch:
        patch.setattr(main, "train_step", stopping(main.train_step, 0, signal.SIGTERM))
        exp = run(tmp_path / "student", motion_videos, override, code=75)
    torch.save(state_of(calm, checkpoint.BEST) | {"step": 1}, teacher)
    assert main.main(["train", str(exp), *[word for o in [*SHORT, override] for word in ("--set", o)]]) == 2
    assert "has changed since this run started" in capsys.readouterr().err


@pytest.fixture(scope="module")
def multi_label(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> dict[str, Path]:
    """The lists of the motion videos with a second label each."""
    folder = tmp_path_factory.mktemp("several")
    lists = {}
    for split in ("train", "val"):
        lines = [line.split() for line in (motion_videos / "lists" / f"{split}.txt").read_text().splitlines()]
        text = "".join(f"{path} {n} {label} {(int(label) + 1) % 8}\n" for path, n, label in lines)
        lists[split] = folder / f"{split}.txt"
        lists[split].write_text(text)
    return lists


def test_several_labels_train_and_validate(
    multi_label: dict[str, Path], tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture
) -> None:
    sources = [f"common.{split}_source={file}" for split, file in multi_label.items()]
    layout = "common.data.list_layout=path_frames_labels"
    exp = run(tmp_path / "bce", motion_videos, *sources, layout, "common.loss=bce", "common.data.order=class_balanced")
    assert losses(exp)[1] == pytest.approx(0.69, abs=0.1), "log 2: the sigmoid of nearly nothing"
    text = (exp / "log.txt").read_text()
    assert "\tmAP " in text
    assert "run: finished iteration=4 metric=mAP best=" in text
    assert 0 < state_of(exp)["best_metric"] <= 100
    capsys.readouterr()
    words = [word for override in [*SHORT, *sources, layout] for word in ("--set", override)]
    assert main.main(["train", str(small(tmp_path / "ce", motion_videos)), *words]) == 2
    assert "several labels per video need loss: bce" in capsys.readouterr().err


def test_another_global_batch_is_remarked_on_and_nothing_changes(calm: Path, runs: Runs) -> None:
    exp = runs("common.reference_batch=256")
    text = (exp / "log.txt").read_text()
    assert "the global batch is 4, the recipe's learning rates are for 256" in text
    assert losses(exp) == losses(calm)
    assert "recipe's learning rates" not in (calm / "log.txt").read_text()


def test_compile_without_a_compiler_is_one_line_and_the_same_training(
    calm: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"{tmp_path / 'absent'} -O2")
    exp = run(tmp_path / "compiled", motion_videos, "common.compile=true")
    remarks = [line for line in (exp / "log.txt").read_text().splitlines() if "compile: " in line]
    assert len(remarks) == 1
    assert "the model is not compiled, there is no C++ compiler" in remarks[0]
    assert digest(exp) == digest(calm)


@pytest.mark.parametrize(
    ("lacks", "sentence"),
    [("triton", "triton is not installed"), ("compiler", "no C compiler"), ("headers", "Python's headers"), ("", "")],
)
def test_what_a_compiled_model_needs_on_a_gpu(
    lacks: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    from utils.engine import network

    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    include = tmp_path / "none" if lacks == "headers" else tmp_path
    monkeypatch.setenv("PATH", str(tmp_path / "none" if lacks == "compiler" else tmp_path))
    monkeypatch.setattr(network.sysconfig, "get_path", lambda name: str(include))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if lacks == "triton" else object())
    messages: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda net, mode: "compiled")
    model = network.compiled(torch.nn.Identity(), True, torch.device("cuda", 0), messages.append)
    if lacks:
        assert isinstance(model, torch.nn.Identity)
        assert len(messages) == 1
        assert sentence in messages[0]
    else:
        assert (model, messages) == ("compiled", [])


RULES = {
    "common.data.list_layout=path_labels": "several labels per video need loss: bce",
    "common.precise_bn.every_iters=3": "has no effect without precise_bn.batches",
    "common.distill.kind=dml": "missing: the experiment folder or weights file of the second network",
    "common.lr_scheduler.warmup_steps=0 common.lr_scheduler.warmup_by=epoch": "warmup_by: has no effect without a warm",
    "common.data.flip_labels=[[0,1],[1,2]]": "each class has one mirror image, but 1 occurs twice",
    "common.data.flip_labels=[[0,8]]": "class 8 is not one of the 8 classes",
    "common.data.flip_labels=[[0,1]] common.data.flip=false": "has no effect with flip: false",
    "common.no_wd=biases": "must be true, false or bn",
    "common.ema=1.5": "must be less than 1",
}


@pytest.mark.parametrize("override", RULES)
def test_rules_between_the_new_keys(override: str, tmp_path: Path, motion_videos: Path) -> None:
    exp = small(tmp_path / "rules", motion_videos)
    with pytest.raises(UserError, match=RULES[override]):
        config.load(exp, override.split())


def test_rules_of_distillation(tmp_path: Path, motion_videos: Path) -> None:
    exp = small(tmp_path / "rules", motion_videos)
    teacher = "common.distill.teacher=/some/where"
    with pytest.raises(UserError, match="needs loss: ce"):
        config.load(exp, [teacher, "common.loss=bce"])
    with pytest.raises(UserError, match="at most 1, not 2"):
        config.load(exp, [teacher, "common.distill.weight=2.0"])
    with pytest.raises(UserError, match="has no effect with kind: dml"):
        config.load(exp, [teacher, "common.distill.kind=dml", "common.distill.temperature=2.0"])
    cfg = config.load(exp, [teacher])
    assert (cfg.distill.weight, cfg.distill.teacher) == (0.5, "/some/where")
    assert config.load(exp, [teacher, "common.distill.kind=dml"]).distill.weight == 1.0


def test_a_config_comes_back_from_a_checkpoint(calm: Path) -> None:
    kept = state_of(calm)["config"]
    assert config.to_dict(config.from_dict(kept)) == kept
