"""Evaluations of many views: the same scores whatever the chunks, ranks and form of the network, and re-scored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import main
from anal_tools.evaluate import scoring
from anal_tools.evaluate.results import Results
from anal_tools.report import media
from tests import models
from tests.evaluated import summary_of
from tests.experiment import make
from tests.ranks import ROOT
from utils import checkpoint, metrics

PYSLOWFAST = ["common.data.sampling=pyslowfast", "common.data.clip_len=2", "common.data.frame_interval=4"]
SETS = [word for item in [*PYSLOWFAST, "common.model.num_segments=1"] for word in ("--set", item)]


def with_weights(folder: Path, kind: str = "tsn", **options: object) -> Path:
    """An experiment with random weights whose scores differ from view to view."""
    torch.manual_seed(0)
    net = models.build(type=kind, backbone="resnet18", num_class=8, num_segments=2, **options)
    torch.nn.init.normal_(net.classifier.weight, std=0.5)
    with torch.inference_mode():
        grey = net.eval()(torch.zeros(1, 3, 2, 32, 32))[0]
    net.classifier.bias.data -= grey  # what all clips have in common
    state = {"model": net.state_dict(), "step": 7}
    checkpoint.save(folder, checkpoint.LATEST, state)
    return folder


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """An experiment that is evaluated with ten clips of three crops, 23 videos."""
    folder = with_weights(make(tmp_path_factory.mktemp("dense") / "exp", motion_videos))
    assert evaluate(folder, "thirty", "--views", "10x3") == 0
    return folder


def evaluate(folder: Path, name: str, *options: str) -> int:
    return main.main(["eval", str(folder), *SETS, "--name", name, *options])


def test_the_result_says_all(exp: Path) -> None:
    results = Results.load(exp, "thirty")
    assert results.logits.shape == (23, 30, 8)
    assert results.frames.shape == (23, 30, 2)
    assert results.scores.sum(1) == pytest.approx(1, abs=1e-5)
    assert len({tuple(row) for row in np.round(results.logits[0], 4).tolist()}) > 20, "views differ"
    assert [view["clip"] for view in results.views] == [clip for clip in range(10) for _ in range(3)]
    boxes: list[Any] = [view["box"] for view in results.views[:3]]
    assert [box[0] for box in boxes] == sorted(box[0] for box in boxes)
    assert results.ledger == []
    summary = summary_of(results)
    assert summary["counts"] == {"videos": 23, "scored": 23, "repaired": 0, "failed": 0, "duplicates": 0}
    assert summary["cost"]["gmacs_per_video"] == pytest.approx(30 * summary["cost"]["gmacs_per_view"], rel=1e-3)
    assert summary["protocol"]["views"] == 30
    assert summary["config"]["data"]["sampling"] == "pyslowfast"
    scores = scoring.scores_of(results, scoring.smaller(scoring.kept_protocol(results)))
    numbers = metrics.evaluate(metrics.Videos(scores, results.labels))
    assert summary["metrics"] == pytest.approx(numbers | {key: summary["metrics"][key] for key in ("clip1", "clip")})


@pytest.mark.parametrize(
    "options",
    [
        ["--chunk", "7"],
        ["--plain"],
        *(pytest.param(["--chunk", size], marks=pytest.mark.nightly) for size in ("1", "30")),
    ],
)
def test_chunks_and_the_form_of_the_network_change_nothing(exp: Path, options: list[str]) -> None:
    assert evaluate(exp, "other", "--views", "10x3", *options) == 0
    one, other = Results.load(exp, "thirty"), Results.load(exp, "other")
    np.testing.assert_allclose(other.logits, one.logits, atol=2e-5)
    np.testing.assert_allclose(other.scores, one.scores, atol=1e-5)
    assert np.array_equal(other.frames, one.frames)


def test_three_ranks_score_each_video_once(exp: Path) -> None:
    argv = [sys.executable, "-m", "launch", "eval", str(exp), "local", "3", *SETS, "--views", "10x3", "--name", "ranks"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    one, three = Results.load(exp, "thirty"), Results.load(exp, "ranks")
    assert summary_of(three)["ranks"] == 3
    assert three.summary["metrics"]["num_videos"] == 23
    np.testing.assert_allclose(three.scores, one.scores, atol=1e-5)
    assert three.ids == one.ids


@pytest.mark.parametrize("views", ["centre", "3crop", "10x1", "5x3"])
@pytest.mark.parametrize("average", ["prob", "logit"])
def test_kept_views_answer_smaller_protocols(exp: Path, views: str, average: str) -> None:
    assert evaluate(exp, "small", "--views", views, "--average", average) == 0
    small, large = Results.load(exp, "small"), Results.load(exp, "thirty")
    chosen = scoring.smaller(scoring.kept_protocol(large), views, average)
    assert chosen.note == ""
    assert chosen.protocol == scoring.kept_protocol(small)
    np.testing.assert_allclose(scoring.scores_of(large, chosen), small.scores, atol=1e-5)
    assert np.array_equal(large.frames[:, list(chosen.views)], small.frames)
    assert [large.views[view]["box"] for view in chosen.views] == [view["box"] for view in small.views]


def test_bad_videos_are_named_and_repaired_ones_scored(exp: Path, motion_videos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(motion_videos, data)
    lines = (data / "lists/val.txt").read_text().splitlines()[:6]
    paths = [line.split()[0] for line in lines]
    (data / paths[1]).write_bytes(b"")
    (data / paths[2]).unlink()
    torn = (data / paths[3]).read_bytes()
    (data / paths[3]).write_bytes(torn[: len(torn) - len(torn) // 4])
    (data / "few.txt").write_text("\n".join(lines) + "\n")
    options = ["--list", str(data / "few.txt"), "--root", str(data)]
    assert evaluate(exp, "bad", *options, "--set", "common.data.on_bad=substitute") == 0
    results = Results.load(exp, "bad")
    status = {row["path"]: row["status"] for row in results.ledger}
    assert status[paths[1]] == status[paths[2]] == "failed"
    assert results.failed.tolist()[1:3] == [True, True]
    assert (results.frames[1] == -1).all()
    counts = summary_of(results)["counts"]
    assert counts["videos"] == 6
    assert counts["failed"] == sum(value == "failed" for value in status.values())
    assert counts["scored"] == 6 - counts["failed"] == (~results.failed).sum()
    assert set(summary_of(results)["failures"]) == {path for path, value in status.items() if value == "failed"}
    assert all(row["reason"] for row in results.ledger)


def test_a_protocol_by_name_and_a_part_of_it(exp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, views in (("k400", []), ("k400-small", ["--views", "1x1"])):
        assert evaluate(exp, name, "--protocol", "k400-10x3", "--scale", "36", *views) == 0
    large, small = Results.load(exp, "k400"), Results.load(exp, "k400-small")
    assert large.protocol["crops"] == "three_pyslowfast"
    assert large.protocol["crop_size"] == 36
    chosen = scoring.smaller(scoring.kept_protocol(large), "1x1")
    assert chosen.note == ""
    np.testing.assert_allclose(scoring.scores_of(large, chosen), small.scores, atol=1e-5)
    capsys.readouterr()
    assert main.main(["score", f"{exp}:k400", "--protocol", "k400-10x3", "--views", "1x1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["top1"] == pytest.approx(small.summary["metrics"]["top1"])
    assert main.main(["score", f"{exp}:thirty", "--protocol", "k400-10x3"]) == 2
    assert "needs a separate evaluation" in capsys.readouterr().err


def test_a_damaged_frame_is_replaced_by_its_neighbour(exp: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for video in ("good", "torn", "gone"):
        (tmp_path / video).mkdir()
        for number in range(1, 13):
            picture = generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / video / f"img_{number:05d}.jpg"), picture)
    for name in ("torn/img_00009.jpg", *(f"gone/img_{number:05d}.jpg" for number in range(2, 12))):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
    (tmp_path / "list.txt").write_text("good 12 1\ntorn 12 2\ngone 12 3\n")
    options = ["--list", str(tmp_path / "list.txt"), "--root", str(tmp_path), "--views", "10x1"]
    frames = ["--set", "common.data.reader=frames"]
    for policy, expected in (("substitute", "repaired"), ("skip", "failed")):
        sets = [*frames, "--set", f"common.data.on_bad={policy}"]
        assert evaluate(exp, policy, *options, *sets) == 0
        results = Results.load(exp, policy)
        status = {row["path"]: (row["status"], row["reason"]) for row in results.ledger}
        assert status["torn"][0] == expected
        assert "img_00009.jpg" in status["torn"][1] or "damaged" in status["torn"][1]
        assert status["gone"][0] == "failed"
        assert results.failed.tolist() == [False, policy == "skip", True]
    planned, shown = (np.asarray(Results.load(exp, "substitute").frames[row]) for row in (0, 1))
    assert 8 in planned, "the damaged frame is one that is wanted"
    assert 8 not in shown
    assert (planned == shown)[planned != 8].all()
    assert set(np.abs(shown[planned == 8] - 8)) <= {1, 2}


def test_a_list_with_several_labels(exp: Path, motion_videos: Path, tmp_path: Path) -> None:
    lines = [line.split() for line in (motion_videos / "lists/val.txt").read_text().splitlines()]
    labels = [sorted({int(line[-1]), number % 8}) for number, line in enumerate(lines)]
    multi_label = tmp_path / "several.txt"
    multi_label.write_text(
        "".join(f"{line[0]} {' '.join(map(str, results))}\n" for line, results in zip(lines, labels, strict=True))
    )
    more = ["--set", "common.loss=bce", "--set", "common.data.list_layout=path_labels"]
    assert (
        evaluate(exp, "several", "--views", "2x1", "--list", str(multi_label), "--root", str(motion_videos), *more) == 0
    )
    results = Results.load(exp, "several")
    assert results.multi_label
    assert results.targets is not None
    assert [np.flatnonzero(row).tolist() for row in results.targets] == labels
    expected = 1 / (1 + np.exp(-np.asarray(results.logits, np.float64)))
    np.testing.assert_allclose(results.scores, expected.mean(1), atol=1e-6)
    numbers = results.numbers
    for key in ("mean_average_precision", "gap", "hit1", "perr"):
        assert results.summary["metrics"][key] == pytest.approx(numbers[key], abs=1e-6)
    source = media.source_of(exp, results)  # the report finds the videos of such a list again
    assert source.records.multi_label
    assert source.records.list_hash == summary_of(results)["list_hash"]


def test_views_that_the_method_does_not_take(tmp_path: Path, motion_videos: Path, capsys) -> None:
    exp = with_weights(make(tmp_path / "tsm", motion_videos, method="tsm"), "tsm")
    assert main.main(["eval", str(exp), "--protocol", "tsn-25x10", "--scale", "36", "--crop-size", "32"]) == 2
    error = capsys.readouterr().err
    assert "tsm cannot be shown these views" in error
    assert "25 frames" in error
    assert main.main(["eval", str(exp), "--per-position"]) == 2
    assert "tsm has no classifier on windows" in capsys.readouterr().err


def test_the_name_says_what_was_asked_for(exp: Path) -> None:
    assert main.main(["eval", str(exp), *SETS, "--views", "3crop", "--average", "sum", "--keep", "float16"]) == 0
    results = Results.load(exp)
    assert results.name == "latest-3crop-sum"
    assert results.logits.dtype == np.float16
    text = json.loads((exp / "results/latest-3crop-sum.json").read_text())["protocol"]["text"]
    assert "sum of softmax" in text
    thirty = Results.load(exp, "thirty")
    chosen = scoring.smaller(scoring.kept_protocol(thirty), "3crop", "sum")
    np.testing.assert_allclose(scoring.scores_of(thirty, chosen), results.scores, atol=2e-3)
