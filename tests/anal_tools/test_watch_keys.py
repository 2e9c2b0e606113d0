"""The keys of `watch`: q ends it, also when it was typed together with others."""

from __future__ import annotations

import os
import pty
import sys
import tty

import pytest

from anal_tools import watch


@pytest.mark.parametrize(("typed", "ends"), [(b"q", True), (b"xxq", True), (b"Q", True), (b"xyz", False), (b"", False)])
def test_q_ends_it_wherever_it_stands(typed: bytes, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    try:
        tty.setcbreak(theirs)
        with open(theirs, closefd=False) as keyboard:
            monkeypatch.setattr(sys, "stdin", keyboard)
            os.write(ours, typed)
            assert watch.pressed_q(0.2) is ends
    finally:
        os.close(ours)
        os.close(theirs)
