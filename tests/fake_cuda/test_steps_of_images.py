"""Methods on image networks: their training steps, validations and distillation on a fake GPU (see steps.py)."""

from __future__ import annotations

import pytest

from tests.fake_cuda import cases, steps

OF_IMAGES = ("tsn", "tsm", "pptsn", "pptsm")


@pytest.mark.parametrize("method", OF_IMAGES)
def test_one_wait_and_nothing_mixed(method: str) -> None:
    assert len(steps.check(method, OF_IMAGES)) >= 1


@pytest.mark.nightly
@pytest.mark.parametrize("method", [method for method in cases.METHODS if method not in steps.SHOWN_BY])
def test_the_shared_cases_of_the_other_methods(method: str) -> None:
    assert len(steps.check(method, (), nightly=True)) == len(steps.SHARED_CASES)


def test_all_methods_and_enough_cases() -> None:
    from tests.fake_cuda.test_steps_of_clips import OF_CLIPS
    from tests.fake_cuda.test_steps_of_transformers import OF_TOKENS

    assert {*OF_IMAGES, *OF_CLIPS, *OF_TOKENS} == set(cases.METHODS)
    every = [
        name for method in cases.METHODS for only in (False, True) for name in steps.names_of(method, nightly=only)
    ]
    assert len(every) >= 85
