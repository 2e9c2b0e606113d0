"""PARTITION = local: the ranks of one run on this machine.

N = 0 or 1 is one process, which takes the place of this one. N >= 2 are the ranks of torchrun (standalone).

What is special:

- A signal (Ctrl-C too) goes to the ranks and not to torchrun, which on its own signal ends the ranks after 30 seconds,
  saved or not. torchrun runs in a session of its own, so the terminal's Ctrl-C reaches this process only.
- torchrun is killed when this process dies, and a rank leaves within 10 seconds of the death of either
  (`utils.signals`): it saves if it can. This process adopts what torchrun leaves behind and waits for its end.
- torchrun answers every failure with exit code 1 and a table. So each rank writes its exit code to the file named by
  ZOETROPE_EXIT_FILE (with its number behind) and this process passes it on: 0, 2 for a user error, 75 for a run that a
  signal stopped after saving.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from utils import processes, signals
from utils.faults import UserError

ROOT = Path(__file__).resolve().parents[1]
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LEFT_ALONE = 30.0  # seconds that the other ranks get to leave by themselves after one has left with an error
ORPHANED = 9.0  # seconds that processes get after torchrun has ended without them
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_PR_SET_CHILD_SUBREAPER = 36


def run(words: Sequence[str], ranks: int, *, script: Path = ROOT / "main.py") -> int:
    """Run `script` with these arguments on `ranks` processes.

    Args:
        words: verb, experiment, options.
        ranks: N; 0 is one process that sees no GPU.

    Returns:
        The ranks' exit code; for N <= 1 this does not return, the process becomes the rank.

    Raises:
        UserError: more ranks than GPUs, on a machine that has GPUs.
    """
    env = environment(os.environ, ranks)
    if ranks >= 1:
        gpus = processes.gpu_count(env)
        if gpus and ranks > gpus:
            raise UserError(
                f"{ranks} ranks need {ranks} GPUs, and there are {gpus} here; use N <= {gpus}, or 0 for the CPU"
            )
    if ranks <= 1:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, str(script), *words], env)
    with tempfile.TemporaryDirectory(prefix="zoetrope-") as folder:
        env["ZOETROPE_EXIT_FILE"] = str(Path(folder) / "code")
        env |= signals.launcher_variable()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        agent = _Agent([*torchrun, str(script), *words], env, ranks)
        return agent.wait()


def environment(inherited: Mapping[str, str], ranks: int) -> dict[str, str]:
    """What the ranks get: our code first on the path, the ranks to expect, and none of another launcher's variables."""
    foreign = ("SLURM_", "TORCHELASTIC_", signals.LAUNCHER)
    env = {name: value for name, value in inherited.items() if name not in _FOREIGN and not name.startswith(foreign)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PYTHONUNBUFFERED"] = "1"
    env["ZOETROPE_RANKS"] = str(max(ranks, 1))
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // max(ranks, 1))))
    if ranks == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def exit_codes(path: str, ranks: int) -> dict[int, int]:
    """Rank -> exit code, of those ranks that have written one to `path`.RANK."""
    found = {}
    for rank in range(ranks):
        try:
            text = Path(f"{path}.{rank}").read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        if text.endswith("\n"):  # else it is being written
            found[rank] = int(text)
    return found


def own_errors(path: str, ranks: int) -> list[str]:
    """What other ranks could not say (`utils.faults.tell`), without what rank 0 has printed or only tells of them."""
    said: dict[str, list[int]] = {}
    for rank in range(ranks):
        with contextlib.suppress(FileNotFoundError):
            said.setdefault(Path(f"{path}.{rank}.error").read_text(encoding="utf-8"), []).append(rank)
    return [
        f"rank {', '.join(map(str, who))}: {text}"
        for text, who in said.items()
        if 0 not in who and "lost contact with another rank" not in text
    ]


class _Agent:
    """A running torchrun and its ranks."""

    def __init__(self, argv: list[str], env: dict[str, str], ranks: int) -> None:
        self.ranks = ranks
        self.exit_file = env["ZOETROPE_EXIT_FILE"]
        self.interrupts = 0
        self.signal: signal.Signals | None = None
        self.pending: list[signal.Signals] = []
        for number in FORWARDED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup
                signal.signal(number, self._notice)
        _adopt_orphans()
        self.others = processes.children(os.getpid())  # a memcached server of this run: it ends with this process
        tie = signals.end_with_parent(os.getpid(), signal.SIGKILL)
        self.process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=tie)

    def wait(self) -> int:
        """Pass signals on until torchrun has ended; returns the exit code of the run."""
        left_with_error: float | None = None
        while self.process.poll() is None:
            while self.pending:
                self._forward(self.pending.pop(0))
            codes = exit_codes(self.exit_file, self.ranks)
            if any(code not in (0, 75) for code in codes.values()) and len(codes) < self.ranks:
                left_with_error = left_with_error or time.monotonic()
                if time.monotonic() - left_with_error > LEFT_ALONE:
                    self._kill()
            time.sleep(0.1)
        self._end_orphans()
        for text in own_errors(self.exit_file, self.ranks):
            print(f"error: {text}", file=sys.stderr)
        return self._code(exit_codes(self.exit_file, self.ranks))

    def _end_orphans(self) -> None:
        """Wait for the processes that torchrun has left behind, if any; kill them when their time is over."""
        if self.process.returncode < 0 and not self.signal:
            name = signal.Signals(-self.process.returncode).name
            print(f"error: torchrun was ended by {name}; its ranks stop", file=sys.stderr, flush=True)
        end = time.monotonic() + ORPHANED
        while orphans := [pid for pid in processes.children(os.getpid()) if pid not in self.others]:
            if time.monotonic() > end or signal.SIGINT in self.pending:
                below = [pid for orphan in orphans for pid in processes.descendants(orphan)]
                processes.send([*orphans, *below], signal.SIGKILL)
            processes.reap()
            time.sleep(0.05)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.pending.append(signal.Signals(number))

    def _forward(self, number: signal.Signals) -> None:
        """To the ranks, who save and leave; a second Ctrl-C kills everything.

        A rank without a handler for SIGTERM has not come to its first step (`utils/signals.py` installs it then): there
        is nothing to save.
        """
        self.signal = number
        self.interrupts += number == signal.SIGINT
        ranks = processes.children(self.process.pid)
        can_save = len(ranks) == self.ranks and all(processes.catches(pid, signal.SIGTERM) for pid in ranks)
        if self.interrupts > 1 or not can_save:
            self._kill()
            return
        if number == signal.SIGINT:
            print("stopping: the ranks save and leave; Ctrl-C once more kills them", file=sys.stderr, flush=True)
        processes.send(ranks, signal.SIGTERM if number == signal.SIGHUP else number)

    def _kill(self) -> None:
        processes.send([self.process.pid, *processes.descendants(self.process.pid)], signal.SIGKILL)

    def _code(self, codes: Mapping[int, int]) -> int:
        """One code for all ranks: an error before a stop before success."""
        if 2 in codes.values():
            return 2
        others = [code for code in codes.values() if code not in (0, 75)]
        if others:
            return max(others, key=lambda code: code != 1)  # 1 is also what is left when another rank is lost
        if len(codes) < self.ranks:  # a rank was killed, or never came so far
            code = self.process.returncode
            return 128 + self.signal if self.signal else 128 - code if code < 0 else code or 1
        return 75 if 75 in codes.values() else 0


def _adopt_orphans() -> None:
    """Make this process the parent of what its descendants leave behind, so that it can find them and end them."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
