"""Methods on image networks: their training steps, validations and distillation on a fake GPU (see steps.py)."""

from __future__ import annotations

import pytest

from tests.fake_cuda import cases, steps

OF_IMAGES = ("tsn", "tsm", "pptsn", "pptsm")


@pytest.mark.parametrize("method", OF_IMAGES)
def test_one_wait_and_nothing_mixed(method: str) -> None:
    assert len(steps.check(method)) >= 9


def test_all_methods_and_enough_cases() -> None:
    from tests.fake_cuda.test_steps_of_clips import OF_CLIPS

    assert {*OF_IMAGES, *OF_CLIPS} == set(cases.METHODS)
    per_method = 3  # validations, and what runs beside training
    assert sum(len(cases.cases_of(method)) + per_method for method in cases.METHODS) >= 60
