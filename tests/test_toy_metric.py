"""A new metric is one entry of `metrics.METRICS`: every place that shows numbers then shows it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import main
from anal_tools import compare
from anal_tools.evaluate.results import Results
from launch import collect, grid
from launch.grid import Sweep
from tests.experiment import make
from utils import log, metrics
from utils.metrics import Metric, Videos


def sure(videos: Videos) -> float:
    """Share of videos whose highest score is above one eighth, what guessing gives."""
    return 100 * float((np.nanmax(videos.scores, axis=1) > 0.13).mean())


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS, Metric("sure", sure, "sureness")])


def table_of(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The row of a sweep with one trial."""
    sweep.write()
    assert collect.main([sweep.name, "--into", str(sweep.folder.parent), "--no-picture"]) == 0
    assert "sure" in capsys.readouterr().out
    with (sweep.folder / "table.csv").open() as file:
        return next(csv.DictReader(file))


def test_one_entry_is_enough(
    tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture[str], toy: None
) -> None:
    source = make(tmp_path / "source", motion_videos, steps=3)
    trained = Sweep(tmp_path / "sweeps/trained", "train", (source,), ("seed=5",))
    exp = grid.make(trained, trained.trials()[0])

    # Training: the line of the validation, and the curve.
    assert main.train(exp) == 0
    value = log.read_scalars(exp / "events/scalars.jsonl")["sure_val"][-1][1]
    assert f"sureness {value:.3f}\ttotal_num = 23" in (exp / "log.txt").read_text()
    row = table_of(trained, capsys)
    assert float(row["sure"]) == pytest.approx(value, abs=1e-4)

    # Evaluation: what it prints, its summary, and the table of a sweep.
    evaluated = Sweep(tmp_path / "sweeps/evaluated", "eval", (exp,), ("val_dense=false",), ("--checkpoint", "latest"))
    (trial,) = evaluated.trials()
    assert main.main(evaluated.argv(trial)) == 0
    assert f"sureness {value:.3f}" in capsys.readouterr().out
    summary = json.loads(evaluated.result_of(trial).read_text())
    assert summary["metrics"]["sure"] == pytest.approx(value)
    assert float(table_of(evaluated, capsys)["sure"]) == pytest.approx(value, abs=1e-4)

    # All that is made of results.
    assert main.main(["score", str(exp)]) == 0
    assert "sureness" in capsys.readouterr().out.splitlines()[1]
    assert main.main(["score", str(exp), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sure"] == pytest.approx(value)
    assert main.main(["analyze", str(exp)]) == 0
    assert f"sureness {value:.2f}" in capsys.readouterr().out
    assert main.main(["report", str(exp), "--pictures", "0"]) == 0
    assert f'["sureness","{value:.2f} %  (' in (exp / "report/index.html").read_text()
    assert f"sureness {value:.2f}" in "\n".join(compare.text([compare.load(str(exp))] * 2))


def test_results_that_are_older_than_a_metric_show_it(
    tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = make(tmp_path / "exp", motion_videos, steps=3)
    assert main.train(exp) == 0
    assert main.main(["eval", str(exp)]) == 0
    assert "sure" not in Results.load(exp).summary["metrics"]
    monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS, Metric("sure", sure, "sureness")])
    assert Results.load(exp).numbers["sure"] == sure(Results.load(exp).videos)


def test_names_are_unique_for_each_kind_of_list() -> None:
    for multi_label in (False, True):
        table = metrics.metrics_of(multi_label=multi_label)
        assert len({one.name for one in table}) == len({one.tag for one in table}) == len(table)
