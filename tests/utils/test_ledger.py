"""The journal of bad samples and the ledger made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datasets.loading.bad_media import BadEvent
from utils import ledger
from utils.errors import UserError
from utils.ledger import BadSamples
from utils.log import RunLog


def event(
    position: int, sample: int, reason: str = "no frame of it decodes", *, late: bool = False, crashed: bool = False
) -> BadEvent:
    return BadEvent(position, sample, f"v{sample}.mp4", reason, "skipped (weight 0)", True, late, crashed)


def journal(exp: Path, budget: float = 1.0, videos: int = 10) -> tuple[BadSamples, RunLog]:
    log = RunLog(exp, resume_step=None, echo=False)
    return BadSamples(exp, log, videos=videos, bad_budget=budget), log


def summed_up(exp: Path) -> dict:
    return json.loads((exp / ledger.LEDGER).read_text())


def test_ledger_counts_and_names_the_worst_first(tmp_path: Path) -> None:
    bad, log = journal(tmp_path)
    with log:
        bad.note([event(3, 7), event(4, 2)], step=1)
        bad.note([event(13, 7, "it is late", late=True)], step=3)
        bad.sum_up(5, 2)
        bad.sum_up(7, 3, enforce=False)
    summary = summed_up(tmp_path)
    assert (summary["step"], summary["epoch"], summary["videos"]) == (7, 3, 10)
    assert [entry["path"] for entry in summary["bad"]] == ["v7.mp4", "v2.mp4"]
    assert summary["bad"][0] | {"reasons": sorted(summary["bad"][0]["reasons"])} == {
        "path": "v7.mp4",
        "sample": 7,
        "during": "training",
        "times": 2,
        "late": 1,
        "reasons": ["it is late", "no frame of it decodes"],
    }
    text = (tmp_path / "log.txt").read_text()
    assert text.count("bad sample 7 (v7.mp4)") == 1, "a sample is reported once"
    assert "epoch 2: 1 of 10 videos could not be read, 2 in the run so far: v7.mp4" in text
    assert "epoch 3: 0 of 10" in text


def test_nothing_is_written_where_everything_could_be_read(tmp_path: Path) -> None:
    bad, log = journal(tmp_path)
    with log:
        bad.sum_up(5, 1)
    assert not (tmp_path / ledger.LEDGER).exists()
    assert (tmp_path / "log.txt").read_text() == ""


def test_steps_done_again_after_a_restart_count_once(tmp_path: Path) -> None:
    for _ in range(2):
        bad, log = journal(tmp_path)
        with log:
            bad.note([event(3, 7)], step=1)
    with (tmp_path / ledger.JOURNAL).open("a") as file:
        file.write('{"step": 2, "posi')  # torn by a kill
    assert len(ledger.rows(tmp_path)) == 1


def test_late_samples_of_one_part_of_a_run_are_not_those_of_another(tmp_path: Path) -> None:
    bad, log = journal(tmp_path)
    with log:
        bad.note([event(3, 7, late=True), event(4, 8)], step=1)
        bad.note([event(12, 5, late=True)], step=3, during=ledger.PRECISE_BN)
        bad.note([event(-1, 9, late=True)], step=3, during=ledger.VALIDATION)
    assert ledger.given_up(tmp_path) == {(3, 7)}
    assert ledger.given_up(tmp_path, ledger.PRECISE_BN, 3) == {(12, 5)}
    assert ledger.given_up(tmp_path, ledger.PRECISE_BN, 6) == set()


def test_a_clip_that_ended_its_reader_twice_fails_again_after_a_resume(tmp_path: Path) -> None:
    bad, log = journal(tmp_path)
    with log:
        bad.note([event(9, 8), event(10, 5, "ended its reader", crashed=True)], step=1)
        bad.resume(ledger.resume_marker(step=1, clips=4, validated=0))
        assert ledger.given_up(tmp_path) == {(10, 5)}
        assert [row["position"] for row in ledger.rows(tmp_path)] == [10], "the other file is read again"


def test_under_on_bad_error_a_late_clip_is_read_again_by_the_next_process(tmp_path: Path) -> None:
    log = RunLog(tmp_path, resume_step=None, echo=False)
    bad = BadSamples(tmp_path, log, videos=10, bad_budget=1.0, first_is_fatal=True)
    with log:
        bad.note([event(10, 5, late=True)], step=1)  # the loader raises: the process ends
        bad.resume(ledger.resume_marker(step=1, clips=4, validated=0))
        assert ledger.given_up(tmp_path) == set(), "else no process would ever get beyond this clip"


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


def test_what_a_process_that_goes_on_reads_again_is_dropped_and_comes_back_if_it_is_still_bad(tmp_path: Path) -> None:
    bad, log = journal(tmp_path)
    with log:
        bad.resume(ledger.resume_marker(step=2, clips=8, validated=2))
        assert not (tmp_path / ledger.JOURNAL).exists(), "a run without bad samples has no journal"
        bad.note([event(3, 7), event(9, 8), event(10, 5, late=True)], step=2)  # 9 and 10 were read ahead
        bad.note([event(12, 1), event(13, 2, late=True)], step=2, during=ledger.PRECISE_BN)
        bad.note([event(-1, 4)], step=2, during=ledger.VALIDATION)
        bad.note([event(-1, 4, late=True), event(-1, 3)], step=4, during=ledger.VALIDATION)
        bad.sum_up(4, 1)
        bad.resume(ledger.resume_marker(step=2, clips=8, validated=2))
        kept = {(row["during"], row["position"], row["step"]) for row in ledger.rows(tmp_path)}
        assert kept == {
            ("training", 3, 2),  # it has happened
            ("training", 10, 2),  # late: it fails again in the steps that are done again
            ("precise batch norm", 12, 2),
            ("precise batch norm", 13, 2),
            ("validation", -1, 2),
        }
        assert ledger.given_up(tmp_path) == {(10, 5)}
        bad.resume(
            ledger.resume_marker(step=2, clips=8, validated=0)
        )  # an older process: the validation of step 2 is owed
        assert {row["position"] for row in ledger.rows(tmp_path)} == {3, 10, 13}
        bad.note([event(9, 8)], step=3)
        assert {row["position"] for row in ledger.rows(tmp_path)} == {3, 9, 10, 13}
        bad.resume(ledger.resume_marker(step=0, clips=0, validated=-1))
        assert {row["position"] for row in ledger.rows(tmp_path)} == {10, 13}


def test_a_budget_that_is_used_up_is_complained_of_once(tmp_path: Path) -> None:
    first, other = journal(tmp_path, budget=0.2)[0], journal(tmp_path, budget=0.2)[0]
    first.note([event(0, 0), event(1, 1, late=True)], step=1)
    other.note([event(2, 2)], step=1)
    for bad in (first, other):
        with pytest.raises(UserError, match=r"3 of 10 videos .* allows 2"):
            bad.sum_up(2, 1)
    other.note([event(7, 7, late=True)], step=2)  # a rank that ended a moment later than the one that complained
    assert ledger.given_up(tmp_path) == {(1, 1), (7, 7)}
    other.resume(ledger.resume_marker(step=1, clips=4, validated=-1))
    assert ledger.given_up(tmp_path) == set(), "what stopped the run is read again and does not fail unread"
    other.sum_up(2, 1)
    text = (tmp_path / "log.txt").read_text()
    assert "epoch 1: 3 of them were known when data.bad_budget stopped the run: it does not count them again" in text
    other.note([event(position, position) for position in (5, 6, 8)], step=2)
    with pytest.raises(UserError, match=r"3 of 10 videos .* allows 2"):
        other.sum_up(3, 1)
    for bad in (first, other):
        bad.log.close()


def test_the_loaders_own_budget_error_is_marked_too(tmp_path: Path) -> None:
    bad, log = journal(tmp_path, budget=0.2)
    with log:
        bad.note([event(0, 0), event(10, 0), event(1, 1)], step=1)
        assert "stopped" not in (tmp_path / ledger.JOURNAL).read_text()
        for _ in range(2):
            bad.note([event(2, 2)], step=1)
        markers = [line for line in (tmp_path / ledger.JOURNAL).read_text().splitlines() if "position" not in line]
    assert markers == ['{"stopped": 1}']


def test_the_ledger_forgets_what_was_mended(tmp_path: Path) -> None:
    bad, log = journal(tmp_path)
    with log:
        bad.note([event(9, 8)], step=3)
        bad.sum_up(3, 1)
        bad.resume(ledger.resume_marker(step=2, clips=8, validated=2))
        bad.sum_up(3, 1)
    assert summed_up(tmp_path)["bad"] == []
