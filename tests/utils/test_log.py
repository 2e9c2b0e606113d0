from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.log_lines import parse_log
from tests.odd import put_something_odd
from utils.errors import UserError
from utils.log import Meter, RunLog, format_line, format_validation, read_scalars

STAMP = r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00\]"


def meters(offset: float = 0.0) -> dict[str, Meter]:
    all_meters = {name: Meter(2) for name in ("time", "data", "loss", "top1", "top5")}
    for number, meter in enumerate(all_meters.values()):
        for value in (100.0, 0.5, 1.5):
            meter.add(value + number + offset)
    return all_meters


def test_meter_is_a_window_average() -> None:
    meter = Meter(3)
    assert math.isnan(meter.value)
    assert math.isnan(meter.average)
    for value in (1, 2.0, torch.tensor(4.0), 9):
        meter.add(value)
    assert (meter.value, meter.average, meter.state()) == (9.0, 5.0, [2.0, 4.0, 9.0])
    again = Meter(3, meter.state())
    again.add(2)
    assert again.state() == [4.0, 9.0, 2.0]
    assert Meter(2, [1.0, 2.0, 3.0]).state() == [2.0, 3.0]


def test_lines_are_exactly_so() -> None:
    assert format_line(10, 5000, meters(), lr=0.0106, clips=48) == (
        "Iter: [10/5000] Time 1.500 (1.000) Data 2.500 (2.000) Loss 3.5000 (3.0000) Prec@1 4.500 (4.000) "
        "Prec@5 5.500 (5.000) LR 0.010600 ETA 1:23:10 clips/s 48.0"
    )
    line = format_validation({"top1": 12.5, "top5": 50.0, "loss": 0.58, "num_videos": 23})
    assert line == " * Prec@1 12.500\tPrec@5 50.000\tLoss 0.5800\ttotal_num = 23"


def test_text_and_its_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, True, 0) as log:
        log.line("one\ntwo")
        log.training(10, 100, meters(), lr=0.01, clips=8)
        log.validation(10, {"top1": 50.0, "top5": 100.0, "loss": 0.1, "num_videos": 4, "failed": 1})
    records = (tmp_path / "log.txt").read_text().splitlines()
    assert len(records) == 5
    assert all(re.match(STAMP + " ", record) for record in records)
    assert re.match(STAMP + r" Iter: \[10/100\] Time ", records[2])
    assert records[4].endswith("1 of 4 videos could not be read and count as wrong")
    assert capsys.readouterr().out.splitlines()[:2] == ["one", "two"]
    (line,) = parse_log(tmp_path / "log.txt")
    assert (line["step"], line["last"], line["loss"], line["loss_avg"], line["lr"]) == (10, 100, 3.5, 3.0, 0.01)


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, False, 0) as log:
        log.line("x")
        log.training(1, 2, meters(), lr=0.1, clips=1)
        log.scalars(1, {"a": 1})
        log.flush()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_resume_gives_one_curve(tmp_path: Path) -> None:
    for start, stop, offset in ((0, 50, 0.0), (30, 80, 1000.0)):
        with RunLog(tmp_path, True, start) as log:
            for step in range(start + 10, stop + 1, 10):
                log.training(step, 80, meters(offset), lr=0.1, clips=8)
    steps, low = [10, 20, 30, 40, 50, 60, 70, 80], 3
    assert [line["step"] for line in parse_log(tmp_path / "log.txt")] == steps
    curve = read_scalars(tmp_path / "events/scalars.jsonl")["loss_train"]
    assert [step for step, _ in curve] == steps
    assert [value > 900 for _, value in curve] == [False] * low + [True] * 5
    board = EventAccumulator(str(tmp_path / "events"))
    board.Reload()
    points = board.Scalars("loss_train")
    assert [point.step for point in points] == steps
    assert [point.value > 900 for point in points] == [False] * low + [True] * 5
    assert set(board.Tags()["scalars"]) == {"loss_train", "top1_train", "top5_train", "lr"}


def test_torn_last_lines_are_repaired(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "log.txt").write_bytes(b"[x] whole\n[x] Iter: [10/1")
    (tmp_path / "events/scalars.jsonl").write_text('{"step": 10, "a": 1.0}\n{"step": 20, "a": 2.0}\n{"step": 30, "a"')
    assert read_scalars(tmp_path / "events/scalars.jsonl") == {"a": [(10, 1.0), (20, 2.0)]}
    with RunLog(tmp_path, True, 10, echo=False) as log:
        log.line("after")
        log.scalars(20, {"a": 2.5, "b": float("nan"), "c": float("-inf")})
    assert (tmp_path / "log.txt").read_text().splitlines()[1] == "[x] Iter: [10/1"
    assert re.fullmatch(STAMP + " after", (tmp_path / "log.txt").read_text().splitlines()[2])
    curves = read_scalars(tmp_path / "events/scalars.jsonl")
    assert curves["a"] == [(10, 1.0), (20, 2.5)]
    assert math.isnan(curves["b"][0][1])
    assert curves["c"] == [(20, -math.inf)]
    for line in (tmp_path / "events/scalars.jsonl").read_text().splitlines()[3:]:
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_kill_9_within_a_record(tmp_path: Path, repo_root: Path) -> None:
    code = f"from utils.log import RunLog\nlog = RunLog({str(tmp_path)!r}, True, None)\nwhile True: log.line('x' * 50)"
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "ZOETROPE_FAILPOINT": "log.line:0:3"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    assert not (tmp_path / "log.txt").read_text().endswith("\n")
    with RunLog(tmp_path, True, None) as log:
        log.line("y")
    records = (tmp_path / "log.txt").read_text().splitlines()
    assert [len(record) for record in records[:2]] == [78, 78]
    assert len(records) == 4
    assert records[3].endswith("] y")
    assert not (tmp_path / "events").exists()


def test_odd_text_does_not_stop_a_run(tmp_path: Path) -> None:
    with RunLog(tmp_path, True, None, name="results/best.log", echo=False) as log:
        log.line("bad name \udcff, \u65e5\u672c")
    assert (tmp_path / "results/best.log").read_text("utf-8").endswith("bad name \\udcff, \u65e5\u672c\n")


def test_full_precision_of_the_loss(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    with RunLog(tmp_path, True, 0) as log:
        log.scalars(1, {"loss_train": value})
    assert read_scalars(tmp_path / "events/scalars.jsonl")["loss_train"] == [(1, value)]


def test_header_names_what_runs(tmp_path: Path, repo_root: Path) -> None:
    from types import SimpleNamespace

    from utils import config

    exp = next(iter(sorted((repo_root / "exps").glob("*/*/*/config.yaml")))).parent
    cfg = config.load(exp, ["common.seed=3"])
    shards = SimpleNamespace(world=2, total=2, global_batch=16)
    with RunLog(tmp_path, True, 0) as log:
        log.start(exp, cfg, ["common.seed=3"], shards, revision="abc+dirty")
    text = (tmp_path / "log.txt").read_text()
    assert f"experiment {exp}, code abc+dirty, process {os.getpid()} on " in text
    assert "ranks 2, shards 2, global batch 16" in text
    assert "overrides: common.seed=3" in text
    written = json.loads(text.splitlines()[-1].split(" config: ", 1)[1])
    assert written == json.loads(json.dumps(config.to_dict(cfg)))


def test_a_log_that_was_deleted_begins_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, True, 0, echo=False) as log:
        log.line("one")
        (tmp_path / "log.txt").unlink()
        log.line("two")
        (tmp_path / "log.txt").write_text("another file\n")
        log.line("three")
        (tmp_path / "log.txt").unlink()
        log.line("four")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 2
    assert "log.txt was removed or replaced: it begins again here" in lines[0]
    assert lines[1].endswith("] four")


def test_curves_that_were_deleted_begin_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, True, 0, echo=False) as log:
        log.scalars(1, {"a": 1.0})
        shutil.rmtree(tmp_path / "events")
        log.scalars(2, {"a": 2.0})
    assert read_scalars(tmp_path / "events/scalars.jsonl") == {"a": [(2, 2.0)]}
    board = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(point.step, point.value) for point in board.Scalars("a")] == [(2, 2.0)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "fstat"])
def test_a_failing_disk_is_remarked_once_and_the_log_comes_back(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, True, 0, echo=False) as log:
        log.line("before")
        log.scalars(1, {"a": 1.0})
        if call == "open":
            shutil.rmtree(tmp_path / "events")
            (tmp_path / "log.txt").unlink()
        with monkeypatch.context() as patch:
            system_call = getattr(os, call)

            def failing(*arguments: object, **keywords: object) -> object:
                if call == "open" and str(tmp_path) not in str(arguments[0]):
                    return system_call(*arguments, **keywords)
                raise OSError(number, os.strerror(number))

            patch.setattr(os, call, failing)
            for step in (2, 3):
                log.line("lost, unless only the sync fails")
                log.scalars(step, {"a": float(step)})
                log.flush()
        log.line("after")
        log.scalars(4, {"a": 4.0})
    text = (tmp_path / "log.txt").read_text()
    assert text.endswith("] after\n")
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert re.match(rf"warning: .*log\.txt: {os.strerror(number)}; the run continues without it", warnings[0])
    assert read_scalars(tmp_path / "events/scalars.jsonl")["a"][-1] == (4, 4.0)
    board = EventAccumulator(str(tmp_path / "events")).Reload()
    assert board.Scalars("a")[-1].step == 4


def test_a_full_disk_tears_a_record_and_its_rest_does_not_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLog(tmp_path, True, 0, echo=False) as log:
        write, calls = os.write, []

        def short(descriptor: int, data: bytes) -> int:
            calls.append(len(data))
            if len(calls) % 2 == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data[: len(data) // 2])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short)
            log.scalars(1, {"a": 1.0})
        log.scalars(2, {"a": 2.0})
        log.line("after")
    assert read_scalars(tmp_path / "events/scalars.jsonl") == {"a": [(2, 2.0)]}
    board = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [point.step for point in board.Scalars("a")] == [2]
    assert "curves: " in (tmp_path / "log.txt").read_text()


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    with RunLog(tmp_path, True, None, echo=False) as log:
        with pytest.raises(UserError, match="a device is where a file should be"):
            log.journal("rows.jsonl", {"a": 1})
        (tmp_path / "rows.jsonl").unlink()
        (tmp_path / "rows.jsonl").mkdir()
        with pytest.raises(UserError, match="a folder is where a file should be"):
            log.journal("rows.jsonl", {"a": 1})


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_file_is_refused_unopened(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = put_something_odd(tmp_path / "odd", kind)
    (tmp_path / "log.txt").symlink_to(odd)
    with pytest.raises(UserError, match=r"log\.txt: a (named pipe|socket|device) is where a file should be"):
        RunLog(tmp_path, True, 0)
    (tmp_path / "log.txt").unlink()
    with RunLog(tmp_path, True, 0, echo=False) as log:
        (tmp_path / "log.txt").unlink()
        (tmp_path / "log.txt").symlink_to(odd)
        log.line("not there")
        log.line("nor this")
    assert capsys.readouterr().err.count("is where a file should be: move it away; the run continues") == 1
