"""An error on one rank: its text and its exit code come at once, whatever the other ranks wait for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import ROOT

# As with NCCL: the destruction of the process group, and of the interpreter's last objects, wait for ranks that never
# answer. Only rank 1 runs; it is joined to a world of two by a stand-in for the process group.
PROGRAM = """
import atexit, sys, time, threading
import torch.distributed as td
from torch.testing._internal.distributed.fake_pg import FakeStore
import main
from utils import dist, errors

td.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
td.destroy_process_group = lambda *_: time.sleep(3600)
atexit.register(time.sleep, 3600)
threading.Thread(target=time.sleep, args=(3600,)).start()

def verb(argv):
    import contextlib
    with contextlib.ExitStack() as stack:
        stack.push(dist.leave)
        print("begins", flush=True)
        raise {error}

main.call_verb = lambda name, argv: verb(argv)
errors.leave_process(lambda: main.main(["train"]))
"""


def run(error: str, tmp_path: Path) -> tuple[int, str, float]:
    """(exit code, text on stderr, seconds from the error to the end)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    env["ZOETROPE_EXIT_FILE"] = str(tmp_path / "code")
    output = tmp_path / "stderr"
    with output.open("wb") as stderr:
        command = [sys.executable, "-c", PROGRAM.format(error=error)]
        with forked.Process(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=stderr) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"begins\n"
                began = time.monotonic()
                code = process.wait(timeout=20)
                seconds = time.monotonic() - began
            finally:
                process.kill()
    return code, output.read_text(), seconds


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        ("RuntimeError('CUDA out of memory. Tried to allocate')", "1", "CUDA out of memory"),
        ("ZeroDivisionError('a bug')", "1", "Traceback"),
        ("errors.UserError('this disk is full')", "2", "this disk is full"),
        ("KeyboardInterrupt()", "130", "interrupted"),
    ],
)
def test_text_and_code_within_a_second(error: str, code: str, text: str, tmp_path: Path) -> None:
    _, shown, seconds = run(error, tmp_path)
    output = shown + "".join(file.read_text() for file in tmp_path.glob("code.1.error"))
    assert text in output
    assert (tmp_path / "code.1").read_text() == f"{code}\n"
    assert seconds < (1.0 if os.environ.get("ZOETROPE_QUIET_MACHINE") else 10.0)  # else it would be an hour


def test_a_clean_end_destroys_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from utils import dist

    ended = []
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.dist, "destroy_process_group", lambda: ended.append(True))
    dist.leave(None, None, None)
    assert ended == [True]
