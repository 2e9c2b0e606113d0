"""What a run's log says by itself: first lines, iteration 1, gradient norm, loss spikes, skipped fp16 steps."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import main
from tests.experiment import few_videos, make
from tests.log_lines import parse_log
from utils import log, optim
from utils.engine import monitor, setup

SETTINGS = {"backbone": "mobilenetv2", "steps": 4, "val_freq": 4, "print_freq": 2}


@pytest.mark.slow
def test_the_first_lines_and_the_curves_of_a_run(tmp_path: Path, tiny_videos: Path) -> None:
    exp = make(tmp_path / "exp", tiny_videos, **SETTINGS)
    assert main.train(exp, overrides=[few_videos(exp, tiny_videos, 2)]) == 0
    text = (exp / "log.txt").read_text()
    expected = (
        f"INFO run: setup device=cpu threads={torch.get_num_threads()} videos=8 val_videos=2 classes=8 parameters="
    )
    assert text.index(expected) < text.index("Iter: [1/4]")
    assert re.search(r"parameters=223\d{4} iterations=4 iterations_per_epoch=2$", text, re.MULTILINE)
    assert [line["step"] for line in parse_log(exp / "log.txt")] == [1, 2, 4]
    assert "reading delays training" not in text.partition("Iter: [2/4]")[0]  # iteration 1 holds the start

    curves = log.read_scalars(exp / "events" / log.SCALARS)
    norms = curves["grad_norm"]
    assert [step for step, _ in norms] == [2, 4], "read with the copy that ends a window; iteration 1 ends none"
    assert all(0 < norm < math.inf for _, norm in norms)
    assert "loss_scale" not in curves  # fp32


@pytest.mark.slow
def test_loss_spikes_and_skipped_steps_are_written_down(tmp_path: Path, tiny_videos: Path) -> None:
    exp = make(tmp_path / "exp", tiny_videos, **SETTINGS)
    with setup.start(exp) as run:
        watched, learner = run.monitor, run.learner

        # Losses as a run has them: noise is no spike, and neither is what comes before there is a mean
        watched._look_for_spike(50.0)
        watched._losses.clear()
        for number in range(monitor.LOSSES[0]):
            watched._look_for_spike(2.0 + 0.1 * math.sin(number))
        watched._look_for_spike(2.3)
        watched.state.step = 30
        watched._look_for_spike(9.0)

        # Two steps whose gradients overflow, one that does not; a real scaler and a real optimiser
        learner.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
        watched._scale = 1024.0
        for gradient in (math.inf, math.nan, 1.0):
            for parameter in learner.net.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            learner.scaler.scale(torch.zeros(1))
            learner.grad_norm = optim.apply(learner.optimizer, learner.scaler, measure=True)
        figures = {name: float(value) for name, value in watched._figures().items()}
        watched._look_for_skipped_steps(figures)
        assert figures["loss_scale"] == 256.0
        # The last step's gradients were divided by a scale of 256
        count = sum(parameter.numel() for parameter in learner.net.parameters())
        assert figures["grad_norm"] == pytest.approx(math.sqrt(count) / 256, rel=1e-3)
        watched._look_for_skipped_steps(figures)  # says nothing twice

    text = (exp / "log.txt").read_text()
    assert re.findall(r"WARNING loss: spike iteration=(\d+) loss=9 mean=2\.\d+ losses=21", text) == ["30"]
    assert text.count("loss: spike") == 1
    assert text.count("WARNING fp16: skipped steps=2 after=0 loss_scale=256") == 1
