"""`python main.py watch EXP`: show a run live in the terminal: progress, curves, waits, GPUs, last lines.

It only reads the files of the experiment, so it works alongside a run on any machine that sees the folder.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from anal_tools import history
from anal_tools.text import shown
from utils.errors import UserError
from utils.options import Parser

SECONDS = 2.0  # between two updates
CURVES = {
    "loss_train": "loss",
    "loss_val": "val loss",
    "top1_train": "top-1",
    "top1_val": "val top-1",
    "map_val": "val mAP",
}
CURVES |= {"grad_norm": "gradient", "lr": "lr"}
_BARS = " ▁▂▃▄▅▆▇█"
# Control sequences: second screen without cursor, back to the first, cursor to the top, clear the line, clear below
_ALTERNATE, _BACK, _HOME, _REST, _END = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l", "\x1b[H", "\x1b[K", "\x1b[J"


def main(argv: Sequence[str]) -> int:
    """Show the run until `q` or Ctrl-C; print it once if the output is not a terminal, or with --once."""
    parser = Parser(prog="main.py watch", description="Watch a run. q quits; the run continues.")
    parser.add_argument("exp", type=Path, help="experiment folder")
    parser.add_argument("--once", action="store_true", help="print it once and exit")
    args = parser.parse_args(argv)

    if not (args.exp / "config.yaml").is_file():
        raise UserError(f"{args.exp}: no config.yaml here; name an experiment folder")
    if args.once or not sys.stdout.isatty():
        print("\n".join(page(args.exp, 100, 40)))
        return 0

    with terminal():
        while True:
            size = shutil.get_terminal_size()
            width, height = size.columns or 80, size.lines or 24  # a terminal that does not know: 0 in Python 3.10
            lines = page(args.exp, width, height - 1)
            # One write per frame: clearing the screen first would flicker
            sys.stdout.write(_HOME + "".join(f"{line}{_REST}\r\n" for line in lines) + _END)
            sys.stdout.flush()
            if pressed_q(SECONDS):
                return 0


def page(exp: Path, width: int, height: int) -> list[str]:
    """Return the lines of the view, `height` at most, cut to `width`."""
    run, curves = history.read(exp), history.curves(exp)
    lines = [f"{exp}  {run.state}" + (f", last line {run.updated[:19].replace('T', ' ')} UTC" if run.updated else "")]

    # Progress
    if run.step is not None and run.last:
        done = run.step / run.last
        room = max(10, min(50, width - 50))
        bar = "█" * round(done * room) + "░" * (room - round(done * room))
        ahead = f"  ETA {run.eta}" if run.state == "running" and run.eta else ""
        lines.append(f"{bar} {100 * done:.0f} %  iteration {run.step} of {run.last}{ahead}")

    if run.waiting is not None:
        share = f"step: {100 * (1 - run.waiting):.0f} % computing, {100 * run.waiting:.0f} % waiting for clips"
        lines.append(share + (f"; {run.rate} clips/s" if run.rate else ""))

    best = "" if run.best is None else f"best {run.criterion} {run.best:.2f}; "
    lines.append(
        f"{best}{run.restarts} restart(s), {run.lost_steps} iteration(s) done twice, {run.spikes} loss spike(s)"
        + (f", {run.skipped} fp16 step(s) skipped" if run.skipped else "")
    )

    lines += ["", *plots(curves, width)]
    gpus = gpu_use() if run.state == "running" else []
    lines += ["", *gpus] if gpus else []

    # The last lines of the log fill the rest; those with the config are too long
    rest = max(3, height - len(lines) - 2)
    last = [line for line in run.lines if not line.startswith(("INFO config: ", "config: "))]
    lines += ["", *last[-rest:]]
    return [shown(line.replace("\t", "  "))[:width] for line in lines[:height]]


def plots(curves: dict[str, list[tuple[int, float]]], width: int) -> list[str]:
    """Return a line for each curve: its name, its shape, its range and its last value."""
    lines = []
    for tag, name in CURVES.items():
        # No nan and no infinity: they have no place on a scale
        values = [value for _, value in curves.get(tag, ()) if abs(value) < float("inf")]
        if values:
            text = sparkline(values, max(10, width - 50))
            lines.append(f"{name:>9} {text}  {values[-1]:.4g}  (from {min(values):.4g} to {max(values):.4g})")
    return lines


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the shape of a curve as one line of bars; each bar shows the mean of its part of the values."""
    count = min(width, len(values))

    means = []
    for place in range(count):
        # Equal parts, without a gap and without an overlap
        part = values[place * len(values) // count : (place + 1) * len(values) // count]
        means.append(sum(part) / len(part))

    low, high = min(means), max(means)
    span = (high - low) or 1.0
    # The lowest value has a bar, too: a blank would look like no value
    return "".join(_BARS[1 + min(7, int(8 * (value - low) / span))] for value in means)


def gpu_use() -> list[str]:
    """Return a line for each GPU of this machine; none if nvidia-smi is missing or does not answer."""
    query = "--query-gpu=index,name,utilization.gpu,memory.used,memory.total"

    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=2,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return []

    rows = [line.split(", ") for line in done.stdout.splitlines() if done.returncode == 0]
    return [f"GPU {row[0]} {row[1]}: {row[2]} % busy, {row[3]} of {row[4]} MiB" for row in rows if len(row) == 5]


@contextmanager
def terminal() -> Iterator[None]:
    """Use the terminal's second screen, and restore the first one whatever happens."""
    import termios
    import tty

    is_keyboard = sys.stdin.isatty()
    before = termios.tcgetattr(sys.stdin) if is_keyboard else None
    try:
        # cbreak: read keys without waiting for Enter; Ctrl-C still works
        if is_keyboard:
            tty.setcbreak(sys.stdin)
        sys.stdout.write(_ALTERNATE)
        yield
    except KeyboardInterrupt:
        pass
    finally:
        sys.stdout.write(_BACK)
        sys.stdout.flush()
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def pressed_q(seconds: float) -> bool:
    """Wait; return True as soon as q is pressed or the input ends."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False

    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        ready, _, _ = select.select([sys.stdin], [], [], left)
        # Not `sys.stdin.read`: its buffer would hide further keys from `select`
        if ready and (not (keys := os.read(sys.stdin.fileno(), 64)) or b"q" in keys.lower()):
            return True
    return False
