"""Run a function on N ranks, each a (forked) process, as torchrun would start them on a machine without GPUs.

    from tests.ranks import run_ranks
    results = run_ranks(__file__, "train_a_little", 4, steps=3)     # a list of N return values

`train_a_little(world, **arguments)` stands in the named file; `world` has been joined. It returns tensors and plain
Python values (they come back through files); its arguments are JSON values. The first rank that fails ends the others.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from tests import forked

ROOT = Path(__file__).resolve().parents[1]
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_", "ZOETROPE_")


class RankError(AssertionError):
    """A rank failed or did not end in time; the text holds the ends of all ranks' outputs."""


class Ranks:
    """Started ranks. `run_ranks` is the short way; this class is for tests that kill one of them.

    Args:
        script: Python file with the function; the code of the module runs in each rank.
        function: name of a function of it, called as function(world, **arguments).
        size: number of ranks.
        arguments: JSON values.
        env: further environment variables.
        start: which ranks to start; None: all.
    """

    def __init__(
        self,
        script: str | Path,
        function: str,
        size: int,
        arguments: Mapping[str, Any] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        start: Iterable[int] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.folder = Path(self._folder.name)
        # The store lives here, on a port that the system chose: no race for free ports between tests.
        self._store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.processes: dict[int, forked.Process] = {}
        for rank in range(size) if start is None else start:
            command = self._command(rank, script, function, arguments)
            with open(self.folder / f"{rank}.log", "wb") as log:
                self.processes[rank] = forked.Process(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=self._env(rank, size) | dict(env or {})
                )

    def _command(self, rank: int, script: str | Path, function: str, arguments: Mapping[str, Any] | None) -> list[str]:
        command = [sys.executable, "-m", "tests.ranks", str(Path(script).resolve()), function]
        return [*command, str(self.folder / f"{rank}.pt"), json.dumps(dict(arguments or {}))]

    def _env(self, rank: int, size: int) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        env |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
        # The store is there already, as under torchrun: no rank opens one.
        env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return env | {"PYTHONPATH": str(ROOT)}

    def wait(self, timeout: float, *, stop_at_failure: bool = True) -> dict[int, int]:
        """Exit codes of the ranks. After `timeout` seconds (or the first failure) the rest is killed."""
        end = time.monotonic() + timeout
        try:
            while any(p.poll() is None for p in self.processes.values()):
                if time.monotonic() > end:
                    raise RankError(f"ranks not done after {timeout} s\n{self.outputs()}")
                if stop_at_failure and any(p.poll() for p in self.processes.values()):
                    break
                time.sleep(0.02)
        finally:
            self.kill()
        return {rank: process.wait() for rank, process in self.processes.items()}

    def kill(self) -> None:
        """SIGKILL to all that still run."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def output(self, rank: int) -> str:
        """What a rank has printed so far (stdout and stderr)."""
        return (self.folder / f"{rank}.log").read_text(errors="replace")

    def outputs(self) -> str:
        """The ends of all ranks' outputs."""
        return "\n".join(f"--- rank {rank}\n{self.output(rank)[-3000:]}" for rank in self.processes)

    def result(self, rank: int) -> Any:
        """What the function returned on a rank."""
        return torch.load(self.folder / f"{rank}.pt", weights_only=True)

    def close(self) -> None:
        """Remove the files."""
        self.kill()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def run_ranks(
    script: str | Path,
    function: str,
    size: int,
    *,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    **arguments: Any,
) -> list[Any]:
    """Call `function(world, **arguments)` of `script` on `size` ranks; their return values in order of rank.

    Raises:
        RankError: a rank failed (the others are killed), or not all were done after `timeout` seconds.
    """
    with Ranks(script, function, size, arguments, env=env) as ranks:
        if failed := {rank: code for rank, code in ranks.wait(timeout).items() if code}:
            raise RankError(f"exit codes {failed}\n{ranks.outputs()}")
        return [ranks.result(rank) for rank in range(size)]


class _Programs(Ranks):
    """Ranks that run a program to its end, instead of a function."""

    def __init__(self, words: Sequence[str], size: int, env: Mapping[str, str]) -> None:
        self._words = words
        super().__init__("", "", size, env=env)

    def _command(self, rank: int, script: str | Path, function: str, arguments: Mapping[str, Any] | None) -> list[str]:
        return [sys.executable, *self._words]


def run_program(
    words: Sequence[str], size: int, *, env: Mapping[str, str], timeout: float = 280.0
) -> subprocess.CompletedProcess[str]:
    """Run `main.py` or another program on ranks, without the launcher.

    Args:
        words: the program and its arguments.
        size: number of ranks; 0: one process that belongs to no ranks.
        env: further environment variables.

    Returns:
        The exit code, which all ranks must have in common, and the outputs of all.
    """
    if size == 0:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(env)
        return forked.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    with _Programs(words, size, env) as ranks:
        codes = ranks.wait(timeout, stop_at_failure=False)
        output = "".join(map(ranks.output, range(size)))
    assert len(set(codes.values())) == 1, f"{codes}\n{output}"
    return subprocess.CompletedProcess(list(words), codes[0], output, output)


def _main(script: str, function: str, result: str, arguments: str) -> None:
    """One rank: load the script by its path, join, call, leave the result."""
    from utils import dist

    spec = importlib.util.spec_from_file_location("rank_script", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    world = dist.join()
    value = getattr(module, function)(world, **json.loads(arguments))
    torch.save(value, result)
    world.barrier()
    dist.leave()


if __name__ == "__main__":
    _main(*sys.argv[1:])
