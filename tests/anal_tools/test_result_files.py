"""Result folders: names with dots, what stands in the way, and an earlier result while a new one is made."""

from __future__ import annotations

import os
import resource
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main
from anal_tools import evaluate
from anal_tools.evaluate import network, result_parts, results
from datasets.loading.eval import VideoItem
from datasets.plan.views import VideoPlan
from methods import interop
from tests.evaluated import summary_of
from tests.experiment import make
from tests.ranks import run_ranks
from utils import checkpoint, dist, files
from utils.errors import AgreedError, UserError


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """A trained experiment whose latest checkpoint, best one and previous one differ."""
    folder = make(tmp_path_factory.mktemp("named") / "exp", motion_videos, steps=4, val_freq=2)
    assert main.train(folder) == 0
    return folder


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: real EFBIG errors, as a full disk gives ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stop_after(after: int) -> Callable[..., None]:
    """`PartWriter.keep` that sends this process a signal after so many videos."""
    keep, seen = result_parts.PartWriter.keep, []

    def keep_and_signal(self: Any, item: Any, logits: Any) -> None:
        keep(self, item, logits)
        seen.append(item.sample)
        if len(seen) == after:
            os.kill(os.getpid(), signal.SIGUSR2)

    return keep_and_signal


def test_names_with_dots_are_results_of_their_own(exp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", str(exp), "--name", "v1.0"]) == 0
    assert main.main(["eval", str(exp), "--name", "v1.1", "--average", "logit"]) == 0
    assert {"v1.0", "v1.1"} <= set(results.Results.names(exp))
    kinds = [results.Results.load(exp, name).protocol["average"] for name in ("v1.0", "v1.1")]
    assert kinds == ["prob", "logit"]
    for name in ("v1.0", "v1.1"):
        assert (exp / "results" / name / "logits.npy").is_file()
        assert main.main(["analyze", str(exp), "--name", name]) == 0
    assert not (exp / "results/v1.json").exists()
    capsys.readouterr()


def test_the_default_name_of_any_checkpoint_is_that_of_folder_and_summary(exp: Path) -> None:
    assert main.main(["eval", str(exp), "--checkpoint", str(exp / "ckpt_prev.pth.tar")]) == 0
    assert summary_of(results.Results.load(exp, "ckpt_prev"))["weights"].endswith("ckpt_prev.pth.tar")
    options = Namespace(protocol=None, views="3crop", scale=None, crop_size=None, average=None, per_position=False)
    for file, name in {
        "ckpt.pth.tar": "latest",
        "ckpt_best.pth.tar": "best",
        "tsm_v1.0.pyth": "tsm_v1.0",
        "x.y": "x.y",
        ".pth": ".pth",
    }.items():
        assert evaluate.result_name(Path("/w") / file, options) == f"{name}-3crop"


@pytest.mark.parametrize("name", ["", "..", "a/b", "x.json", "x.tmp", "é" * 101])
def test_names_that_no_result_can_have(exp: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", str(exp), "--name", name]) == 2
    assert "the name of a result must not" in capsys.readouterr().err


def test_results_that_are_a_file(exp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (exp / "results").rename(exp / "kept")
    try:
        (exp / "results").write_text("mine")
        assert main.main(["eval", str(exp), "--name", "n"]) == 2
        message = capsys.readouterr().err
        assert f"{exp}/results is a file" in message
        assert "move it away" in message
        (exp / "results").unlink()
        (exp / "results").mkdir()
        (exp / "results/n").write_text("mine")
        assert main.main(["eval", str(exp), "--name", "n"]) == 2
        assert f"{exp}/results/n is a file" in capsys.readouterr().err
        (exp / "results/n").unlink()
        assert main.main(["eval", str(exp), "--name", "n"]) == 0
    finally:
        (exp / "results").rename(exp / "n")
        (exp / "kept").rename(exp / "results")


def item(sample: int) -> VideoItem:
    clip_rows, boxes = np.zeros((1, 8), np.int64), np.zeros((1, 4), np.int64)
    plan = VideoPlan(sample, np.arange(8), (32, 32), clip_rows, boxes, np.zeros(1, bool))
    return VideoItem(sample, 0, None, plan, failure=None)


def test_parts_that_find_no_room(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    assert result_parts.earlier_parts(folder, {}, 60)[0] == 0
    writer = result_parts.PartWriter(folder, 0, videos_per_part=20)
    for sample in range(20):
        writer.keep(item(sample), torch.zeros(1, 40))
    writer.size = 21
    for sample in range(20, 40):
        writer.keep(item(sample), torch.zeros(1, 40))
    with small_files(4096), pytest.raises(UserError, match=r"best: the results could not .* make room and run"):
        writer.flush()
    assert list(folder.glob("*.tmp")) == [], "what is left of a part would only take up room"
    start, parts = result_parts.earlier_parts(folder, {}, 60)
    assert start == 1
    assert [part["samples"].tolist() for part in parts] == [list(range(20))], "it resumes where it was"


def test_a_result_that_finds_no_room_is_finished_later(exp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["eval", str(exp), "--name", "full"]) == 0
    before = results.Results.load(exp, "full")
    old = {path.name: path.read_bytes() for path in before.folder.iterdir()}
    report = evaluate.report

    def report_without_room(*arguments: Any) -> None:
        with small_files(700):
            report(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "report", report_without_room)
        assert main.main(["eval", str(exp), "--name", "full"]) == 2
    assert "a limit on the size of files" in capsys.readouterr().err
    assert {name: (before.folder / name).read_bytes() for name in old} == old
    assert not list((exp / "results").rglob("*.tmp"))
    assert results.Results.load(exp, "full").summary == before.summary
    assert main.main(["eval", str(exp), "--name", "full"]) == 0
    assert "resuming: 23 of 23 videos were scored before" in capsys.readouterr().out
    assert sorted(path.name for path in before.folder.iterdir()) == sorted(old), "nothing is left over"


def test_an_earlier_result_stays_until_the_new_one_is_there(exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader never gets the numbers of one result with the scores of the other."""
    assert main.main(["eval", str(exp), "--name", "twice"]) == 0
    before = results.Results.load(exp, "twice")
    old = np.array(before.logits)
    previous = ["eval", str(exp), "--name", "twice", "--checkpoint", str(exp / "ckpt_prev.pth.tar")]
    with monkeypatch.context() as patch:
        patch.setattr(result_parts.PartWriter, "keep", stop_after(6))
        assert main.main(previous) == 75
    again = results.Results.load(exp, "twice")
    assert again.summary == before.summary
    assert np.array_equal(again.logits, old)
    with monkeypatch.context() as patch:
        patch.setattr(result_parts.os, "replace", killed_at("scores.npy"))
        with pytest.raises(Killed):
            main.main(previous)
    with pytest.raises(UserError, match="no finished evaluation of that name"):
        results.Results.load(exp, "twice")
    assert main.main(previous) == 0
    after = results.Results.load(exp, "twice")
    assert summary_of(after)["weights_hash"] != summary_of(before)["weights_hash"]
    assert not np.array_equal(after.logits, old)
    assert np.array_equal(before.logits, old), "what is open stays what it was"
    assert after.frames.shape == (23, 1, 2)
    for name in ("frames", "views", "ledger"):
        with pytest.raises(UserError, match="evaluated again while it was being read"):
            getattr(again, name)


class Killed(BaseException):
    """What no code around it handles, as a kill."""


def killed_at(name: str) -> Callable[..., None]:
    """`os.replace` that ends the evaluation before it makes a file of this name."""
    replace = os.replace

    def replace_or_end(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise Killed
        replace(source, target)

    return replace_or_end


def test_a_reader_takes_a_result_anew_that_was_replaced_meanwhile(exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, read, reads = "moving", results.Results._read, []
    assert main.main(["eval", str(exp), "--name", name]) == 0

    def read_during_an_evaluation(*arguments: Any) -> results.Results:
        content = read(*arguments)
        reads.append(summary_of(content)["weights"])
        if len(reads) == 1:
            file = str(exp / "ckpt_prev.pth.tar")
            assert main.main(["eval", str(exp), "--name", name, "--checkpoint", file]) == 0
        return content

    monkeypatch.setattr(results.Results, "_read", staticmethod(read_during_an_evaluation))
    result = results.Results.load(exp, name)
    assert len(reads) == 2
    assert summary_of(result)["weights"] == str(exp / "ckpt_prev.pth.tar")


def replacing(weights: Path, others: list[Path]) -> Callable[..., Any]:
    """`interop.load_checkpoint` during a training run, which puts the next of `others` in place after each reading."""
    load = interop.load_checkpoint

    def load_and_replace(path: Path, build: Any) -> dict[str, Any]:
        state = load(path, build)
        if others:
            spare = weights.with_name("spare")
            spare.write_bytes(others.pop(0).read_bytes())
            os.replace(spare, weights)
        return state

    return load_and_replace


def test_the_hash_is_that_of_the_weights_that_were_scored(
    exp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, older, newer = tmp_path / "live.pth.tar", exp / "ckpt_prev.pth.tar", exp / "ckpt.pth.tar"
    weights.write_bytes(older.read_bytes())
    words = ["eval", str(exp), "--checkpoint", str(weights), "--name"]
    monkeypatch.setattr(interop, "load_checkpoint", replacing(weights, [newer]))
    assert main.main([*words, "live"]) == 0
    assert main.main(["eval", str(exp), "--checkpoint", "latest", "--name", "still"]) == 0
    live, still = (results.Results.load(exp, name) for name in ("live", "still"))
    assert summary_of(live)["weights_hash"] == files.sha256(newer)
    assert summary_of(live)["step"] == summary_of(still)["step"] == 4
    assert np.array_equal(live.logits, still.logits)
    monkeypatch.setattr(interop, "load_checkpoint", replacing(weights, [older, newer] * 9))
    assert main.main([*words, "never"]) == 2
    assert f"{weights}: the file was replaced each time" in capsys.readouterr().err
    assert not (exp / "results/never").exists()


def read_own(world: dist.World, folder: str) -> str:
    """Return the error of a rank when each rank sees a different file under the same name."""
    weights = Path(folder) / f"{world.rank}.pth"
    torch.save({"model": world.rank}, weights)
    try:
        network.read_steady(weights, checkpoint.load, world)
    except AgreedError as error:
        return str(error)
    return ""


def test_ranks_that_read_different_files_stop_together(tmp_path: Path) -> None:
    messages = run_ranks(__file__, "read_own", 2, folder=str(tmp_path))
    assert ["the ranks see different files" in text for text in messages] == [True, True]
