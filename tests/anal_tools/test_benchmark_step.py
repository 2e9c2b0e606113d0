"""benchmark step: all parts are timed, for every kind of model, with batch norm and precision as in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import main
from anal_tools.benchmark import step
from tests import experiment

FIELDS = {
    "bench", "model", "input", "device", "threads", "precision", "compile", "plain", "clips_per_s", "peak_memory_mb",
    "gmac_per_clip", "matmul_peak_tflops", "mfu", "loop_ms",
    *(f"{part}{kind}" for part in (*step.PARTS, "train", "step", "eval") for kind in ("_ms", "_cpu_ms")),
}  # fmt: skip


@pytest.mark.parametrize(("method", "words"), [("tsn", ()), ("slowonly", ("--plain",)), ("tpn", ("--amp", "bf16"))])
def test_all_figures_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, words: tuple[str, ...]
) -> None:
    exp = experiment.make(tmp_path / "exp", tmp_path, method=method)
    assert main.main(["benchmark", "step", str(exp), "--json", "--iters", "1", "--batch", "2", *words]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == FIELDS
    assert figures["input"] == [2, 3, 2, 32, 32]
    assert all(value > 0 for key, value in figures.items() if key.endswith(("_ms", "_mb")))
    assert figures["step_ms"] == pytest.approx(sum(figures[f"{part}_ms"] for part in step.PARTS), abs=0.1)
    assert 0 < figures["mfu"] < 1.5
    assert figures["precision"] == ("bf16" if words == ("--amp", "bf16") else "fp32")


def test_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = experiment.make(tmp_path / "exp", tmp_path)
    assert main.main(["benchmark", "step", str(exp), "--iters", "1"]) == 0
    shown = capsys.readouterr().out
    assert "tsn resnet18, 4 x 3 x 2 x 32 x 32, cpu, fp32" in shown
    assert "clips/s, peak memory" in shown


def test_without_a_compiler_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    exp = experiment.make(tmp_path / "exp", tmp_path)
    assert main.main(["benchmark", "step", str(exp), "--iters", "1", "--compile"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "no C++ compiler" in line]) == 1


def test_the_peak_is_that_of_a_product() -> None:
    peak = step.matmul_peak(torch.device("cpu"), "fp32")
    assert 1e8 < peak < 1e14


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("step exp --iters 0", "0 is not a whole number of at least 1"),
        ("step exp --threads 0", "0 is not a whole number of at least 1"),
        ("step exp --warmup -1", "-1 is not a whole number of at least 0"),
        ("eval exp --warmup -3", "-3 is not a whole number of at least 0"),
        ("data exp --step-time nan", "nan is not a number of seconds above 0"),
        ("data exp --step-time 0", "0 is not a number of seconds above 0"),
    ],
)
def test_figures_that_cannot_be_meant_are_one_sentence(
    words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["benchmark", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
