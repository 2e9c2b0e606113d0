"""slurm-local, the real SLURM of several nodes on one machine, as the tests and the acceptance rows use it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT.parent / "shared" / "tools" / "slurm-local"
PARTITION = "VI_SP_VA_1080TI"


class NoSlurm(Exception):
    """Why there is none."""


class LocalSlurm:
    """A running slurm-local and the settings of our launcher for it.

    Args:
        folder: for cluster.yaml and small scripts.
        gpus_per_node: what cluster.yaml says (the nodes have 8).
    """

    def __init__(self, folder: Path, *, gpus_per_node: int, term_only: bool = False) -> None:
        if not TOOL.is_file():
            raise NoSlurm("../shared/tools/slurm-local is not beside the checkout")
        if os.geteuid() != 0:
            raise NoSlurm("slurm-local needs root")
        self.folder = folder
        self._turn = _take_turn()
        self._was_up = self._tool("status").returncode == 0
        up = self._tool("up", *(["--term-only"] if term_only else []))
        if up.returncode:
            self._turn.close()
            raise NoSlurm((up.stderr or up.stdout).strip()[-300:])
        home = Path(os.environ.get("SLURM_LOCAL_DIR", "/tmp/slurm-local"))
        file = folder / "cluster.yaml"
        file.write_text(
            f"defaults: {{gpus_per_node: {gpus_per_node}, cpus_per_gpu: 1, time: 30, signal_seconds: 30, "
            "environment: {OMP_NUM_THREADS: 1}}\n"
        )
        variables = {"SLURM_CONF": str(home / "etc/slurm.conf"), "ZOETROPE_CLUSTER": str(file), "OMP_NUM_THREADS": "1"}
        self.env = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state")}
        self.env.pop("PYTHONSAFEPATH", None)

    def _tool(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(TOOL), *words]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)

    def node(self, verb: str, name: str) -> None:
        """`node-kill` or `node-start`."""
        done = self._tool(verb, name)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *argv: str | Path, check: bool = True, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """A command in this SLURM's environment."""
        words = [str(word) for word in argv]
        done = subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
        if check and done.returncode:
            raise AssertionError(f"{words} left with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        return done

    def launch(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python -m launch ...`."""
        return self.run(sys.executable, "-m", "launch", *words, check=check)

    def submit(self, verb: str, exp: Path, ranks: int, *words: str) -> str:
        """`train.sh` or `eval.sh`; the job's id."""
        output = self.launch(verb, exp, PARTITION, str(ranks), *words).stdout
        return output.split("submitted job ")[1].split()[0]

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job`."""
        words = self.run("scontrol", "show", "job", "-o", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def preempt(self, seconds: float = 3.0) -> str:
        """A job of the urgent partition that needs all nodes for so long."""
        script = self.folder / "urgent.sh"
        script.write_text(f"#!/bin/sh\nsleep {seconds}\n")
        words = ["sbatch", "--parsable", "-p", "urgent", "-N", "4", "--exclusive", "-o", "/dev/null", str(script)]
        return self.run(*words).stdout.strip()

    def wait_for_end(self, job: str, exp: Path, seconds: float = 240.0) -> dict[str, str]:
        """Until the job has left the queue for good; returns what SLURM says of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(lambda: self.job(job)["JobState"] in ended, seconds, lambda: self.output(exp))
        return self.job(job)

    def output(self, exp: Path) -> str:
        """The ends of what the ranks wrote."""
        files = sorted((exp / "jobs/slurm").glob("*_log.*"))
        tail = "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)
        return self.run("squeue", check=False).stdout + tail

    def close(self) -> None:
        """Stop the cluster, unless it was running before."""
        if not self._was_up:
            self._tool("down")
        self._turn.close()


_turns: list[TextIO] = []  # one per process: a second LocalSlurm of this process shares it


def _take_turn() -> TextIO:
    """Wait until no other process uses the cluster, of which a machine can have only one; closing the file lets go."""
    if _turns and not _turns[0].closed:
        return _turns[0]
    file = open(Path(tempfile.gettempdir()) / "zoetrope-slurm.lock", "w", encoding="utf-8")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    _turns[:] = [file]
    return file


def until(condition: Callable[[], bool], seconds: float, about: Callable[[], str] = str) -> float:
    """Wait for something; how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"it did not happen within {seconds} s\n{about()}"
        time.sleep(0.25)
    return time.monotonic() - began
