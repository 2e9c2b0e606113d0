"""Transformers with their whole recipe: training steps, validations and distillation on a fake GPU (see steps.py)."""

from __future__ import annotations

import pytest

from tests.fake_cuda import steps

OF_TOKENS = ("videomae", "vjepa2", "probe")


@pytest.mark.parametrize("method", OF_TOKENS)
def test_one_wait_and_nothing_mixed(method: str) -> None:
    assert len(steps.check(method, OF_TOKENS)) >= 1
