"""The journal of bad samples and the ledger made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datasets.bad_media import BadEvent
from utils import bad_samples
from utils.bad_samples import BadSamples
from utils.faults import UserError
from utils.log import RunLog


def event(position: int, sample: int, reason: str = "no frame of it decodes", *, late: bool = False) -> BadEvent:
    return BadEvent(position, sample, f"v{sample}.mp4", reason, "skipped (weight 0)", True, late)


def journal(exp: Path, budget: float = 1.0, videos: int = 10) -> tuple[BadSamples, RunLog]:
    log = RunLog(exp, resume_step=None, echo=False)
    return BadSamples(exp, log, videos=videos, bad_budget=budget), log


def ledger(exp: Path) -> dict:
    return json.loads((exp / bad_samples.LEDGER).read_text())


def test_ledger_counts_and_names_the_worst_first(tmp_path: Path) -> None:
    bad, log = journal(tmp_path)
    with log:
        bad.note([event(3, 7), event(4, 2)], step=1)
        bad.note([event(13, 7, "it is late", late=True)], step=3)
        bad.sum_up(5, 2)
        bad.sum_up(7, 3, enforce=False)
    found = ledger(tmp_path)
    assert (found["step"], found["epoch"], found["videos"]) == (7, 3, 10)
    assert [entry["path"] for entry in found["bad"]] == ["v7.mp4", "v2.mp4"]
    assert found["bad"][0] | {"reasons": sorted(found["bad"][0]["reasons"])} == {
        "path": "v7.mp4",
        "sample": 7,
        "during": "training",
        "times": 2,
        "late": 1,
        "reasons": ["it is late", "no frame of it decodes"],
    }
    text = (tmp_path / "log.txt").read_text()
    assert text.count("bad sample 7 (v7.mp4)") == 1, "a sample is told of once"
    assert "epoch 2: 1 of 10 videos could not be read, 2 in the run so far: v7.mp4" in text
    assert "epoch 3: 0 of 10" in text


def test_nothing_is_written_where_everything_could_be_read(tmp_path: Path) -> None:
    bad, log = journal(tmp_path)
    with log:
        bad.sum_up(5, 1)
    assert not (tmp_path / bad_samples.LEDGER).exists()
    assert (tmp_path / "log.txt").read_text() == ""


def test_steps_done_again_after_a_restart_count_once(tmp_path: Path) -> None:
    for _ in range(2):
        bad, log = journal(tmp_path)
        with log:
            bad.note([event(3, 7)], step=1)
    with (tmp_path / bad_samples.JOURNAL).open("a") as file:
        file.write('{"step": 2, "posi')  # torn by a kill
    assert len(bad.rows()) == 1


def test_late_samples_of_one_part_of_a_run_are_not_those_of_another(tmp_path: Path) -> None:
    bad, log = journal(tmp_path)
    with log:
        bad.note([event(3, 7, late=True), event(4, 8)], step=1)
        bad.note([event(12, 5, late=True)], step=3, during=bad_samples.PRECISE_BN)
        bad.note([event(-1, 9, late=True)], step=3, during=bad_samples.VALIDATION)
    assert bad.late() == {(3, 7)}
    assert bad.late(bad_samples.PRECISE_BN, 3) == {(12, 5)}
    assert bad.late(bad_samples.PRECISE_BN, 6) == set()


def test_budget_is_that_of_an_epoch_over_all_ranks(tmp_path: Path) -> None:
    ranks = [journal(tmp_path, budget=0.2)[0] for _ in range(3)]
    for rank, bad in enumerate(ranks):
        bad.note([event(rank, rank)], step=1)
    with pytest.raises(UserError, match=r"3 of 10 videos .* allows 2"):
        ranks[0].sum_up(2, 1)
    ranks[0].sum_up(2, 1, enforce=False)
    ranks[0].sum_up(4, 2)  # the next epoch has none
    for bad in ranks:
        bad.log.close()
