"""The ending of `make demo` reads what an evaluation left."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from anal_tools import demo_summary
from utils.errors import UserError


def evaluated(folder: Path) -> Path:
    exp = folder / "tsm_resnet18" / "motion8"
    (exp / "results").mkdir(parents=True)
    (exp / "ckpt.pth.tar").write_bytes(b"")
    (exp / "results" / "best.json").write_text(json.dumps({"metrics": {"top1": 97.5, "num_videos": 240}}))
    return exp


def test_it_names_the_figure_and_every_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exp = evaluated(tmp_path)
    assert demo_summary.main([str(exp)]) == 0
    output = capsys.readouterr().out
    assert "top-1 97.5 % of 240 validation videos" in output
    for part in ("ckpt.pth.tar", "events", "log.txt", "results/best"):
        assert str(exp / part) in output
    assert str(tmp_path / "tsn_resnet18" / "motion8") in output
    assert f"main.py report {exp}" in output


def test_finished_means_evaluated_after_the_last_checkpoint(tmp_path: Path) -> None:
    exp = evaluated(tmp_path)
    os.utime(exp / "ckpt.pth.tar", (1, 1))
    assert demo_summary.main([str(exp), "--is-finished"]) == 0
    os.utime(exp / "results" / "best.json", (0, 0))
    assert demo_summary.main([str(exp), "--is-finished"]) == 1


def test_without_results_it_says_what_to_run(tmp_path: Path) -> None:
    assert demo_summary.main([str(tmp_path), "--is-finished"]) == 1
    with pytest.raises(UserError, match=r"eval\.sh"):
        demo_summary.summary(tmp_path)
