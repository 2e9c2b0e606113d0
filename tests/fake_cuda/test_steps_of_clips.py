"""Methods on 3D networks: their training steps, validations and distillation on a fake GPU (see steps.py)."""

from __future__ import annotations

import pytest

from tests.fake_cuda import steps

OF_CLIPS = ("slowonly", "slowfast", "tpn")


@pytest.mark.parametrize("method", OF_CLIPS)
def test_one_wait_and_nothing_mixed(method: str) -> None:
    assert len(steps.check(method, OF_CLIPS)) >= 1
