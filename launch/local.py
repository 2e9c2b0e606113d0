"""Run the ranks of one run on this machine (PARTITION = local).

N = 0 or 1 is one process, which replaces this one. N >= 2 are the ranks of torchrun (standalone).

- A signal (also Ctrl-C) goes to the ranks and not to torchrun, which on a signal ends the ranks after 30 seconds, saved
  or not. torchrun runs in a separate session, so the terminal's Ctrl-C reaches this process only.
- torchrun is killed when this process dies, and a rank leaves within 10 seconds of the death of either
  (`utils.signals`): it saves if it can. This process adopts the ranks that torchrun leaves behind and waits for them.
- torchrun reports every failure with exit code 1 and a table. So each rank writes its exit code to the file named by
  ZOETROPE_EXIT_FILE (with its number appended) and this process returns it: 0, 2 for a user error, 75 for a run that
  a signal stopped after saving.
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
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
LEFT_ALONE = 30.0  # seconds for the other ranks to leave by themselves after one has left with an error
ORPHANED = 9.0  # seconds for processes that torchrun has left behind; ranks leave within 10 s of its death
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h


def run(argv: Sequence[str], ranks: int, *, script: Path = ROOT / "main.py") -> int:
    """Run `script` with these arguments on `ranks` processes.

    Args:
        argv: verb, experiment, options.
        ranks: N; 0 is one process that sees no GPU.

    Returns:
        The ranks' exit code. For N <= 1 this does not return: the process becomes the rank.

    Raises:
        UserError: more ranks than GPUs, on a machine with GPUs.
    """
    env = environment(os.environ, ranks)

    if ranks >= 1:
        gpus = processes.gpu_count(env)
        if gpus and ranks > gpus:
            raise UserError(
                f"{ranks} ranks need {ranks} GPUs, and there are {gpus} here; use N <= {gpus}, or 0 for the CPU"
            )

    if ranks <= 1:
        sys.stdout.flush()  # `execve` discards buffered output
        os.execve(sys.executable, [sys.executable, str(script), *argv], env)

    with tempfile.TemporaryDirectory(prefix="zoetrope-") as folder:
        env["ZOETROPE_EXIT_FILE"] = str(Path(folder) / "code")
        env |= signals.launcher_variable()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        agent = _Agent([*torchrun, str(script), *argv], env, ranks)
        return agent.wait()


def environment(inherited: Mapping[str, str], ranks: int) -> dict[str, str]:
    """Return the ranks' environment: our code first on the path, the rank count, no variables of another launcher."""
    # Variables of an outer SLURM job or torchrun would give a rank the wrong number.
    foreign = ("SLURM_", "TORCHELASTIC_", signals.LAUNCHER)
    env = {name: value for name, value in inherited.items() if name not in _FOREIGN and not name.startswith(foreign)}

    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env["PYTHONUNBUFFERED"] = "1"
    env["ZOETROPE_RANKS"] = str(max(ranks, 1))
    # Threads of all ranks together fit the cores of this process.
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // max(ranks, 1))))
    if ranks == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""  # N = 0: one process without a GPU

    return env


def exit_codes(path: str, ranks: int) -> dict[int, int]:
    """Return rank -> exit code of the ranks that have written one to `path`.RANK."""
    codes = {}
    for rank in range(ranks):
        try:
            text = Path(f"{path}.{rank}").read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        if text.endswith("\n"):  # otherwise the rank is still writing
            codes[rank] = int(text)

    return codes


def own_errors(path: str, ranks: int) -> list[str]:
    """Return the errors of other ranks that rank 0 has not printed, one line per distinct message."""
    ranks_of: dict[str, list[int]] = {}  # text (from `utils.errors.report_error`) -> ranks

    for rank in range(ranks):
        with contextlib.suppress(FileNotFoundError):
            ranks_of.setdefault(Path(f"{path}.{rank}.error").read_text(encoding="utf-8"), []).append(rank)

    return [
        f"rank {', '.join(map(str, who))}: {text}"
        for text, who in ranks_of.items()
        # Lost contact is only a consequence of another rank's error.
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
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: started with nohup
                signal.signal(number, self._notice)

        _adopt_orphans()
        self.others = processes.children(os.getpid())  # such as this run's memcached server; it ends with this process
        # A Ctrl-C in a separate session does not reach torchrun; the tie ends it if this process is killed.
        tie = signals.end_with_parent(os.getpid(), signal.SIGKILL)
        self.process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=tie)

    def wait(self) -> int:
        """Forward signals until torchrun has ended; return the exit code of the run."""
        left_with_error: float | None = None
        while self.process.poll() is None:
            # Handlers only note signals: forwarding them needs the process table.
            while self.pending:
                self._forward(self.pending.pop(0))

            codes = exit_codes(self.exit_file, self.ranks)
            # If a rank has left with an error, the others may hang in a collective.
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
        """Wait for processes that torchrun has left behind, and kill them after `ORPHANED` seconds or at a Ctrl-C."""
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
        """Forward a signal to the ranks, which save and leave; at a second Ctrl-C kill everything.

        A rank without a handler for SIGTERM has not reached its first step (`utils/signals.py` installs it then), so it
        has nothing to save.
        """
        self.signal = number
        self.interrupts += number == signal.SIGINT

        ranks = processes.children(self.process.pid)
        can_save = len(ranks) == self.ranks and all(processes.catches(pid, signal.SIGTERM) for pid in ranks)
        if self.interrupts > 1 or not can_save:
            self._kill()
            return

        if number == signal.SIGINT:
            print("stopping: the ranks save and leave; press Ctrl-C again to kill them", file=sys.stderr, flush=True)
        # A rank leaves an ignored SIGHUP alone (`signals.StopFlag`), but always handles SIGTERM.
        processes.send(ranks, signal.SIGTERM if number == signal.SIGHUP else number)

    def _kill(self) -> None:
        processes.send([self.process.pid, *processes.descendants(self.process.pid)], signal.SIGKILL)

    def _code(self, codes: Mapping[int, int]) -> int:
        """Combine the ranks' codes: an error wins over a stop, a stop over success."""
        if 2 in codes.values():
            return 2

        others = [code for code in codes.values() if code not in (0, 75)]
        if others:
            return max(others, key=lambda code: code != 1)  # 1 may only mean that another rank was lost

        if len(codes) < self.ranks:  # a rank was killed, or never got to writing a code
            code = self.process.returncode
            return 128 + self.signal if self.signal else 128 - code if code < 0 else code or 1

        return 75 if 75 in codes.values() else 0


def _adopt_orphans() -> None:
    """Make this process the parent of processes that its descendants leave behind, so that it can end them."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
