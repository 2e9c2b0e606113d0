"""What measurements share: rows that print one JSON line each, and the users' own commands."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"

Row = Callable[[], dict]


def run_rows(rows: Mapping[str, tuple[str, str, Row]], *, issue: str | None = None) -> int:
    """Measure the rows that `--rows` chooses: (claim, figure, function giving {"measured": ..., "holds": bool}).

    Args:
        issue: the issue that promised them, where a row is named by it.

    Returns:
        0 when every measured row holds.
    """
    parser = argparse.ArgumentParser(description="measure and print one JSON line a row")
    parser.add_argument("--rows", default="all", help="comma separated: " + ", ".join(rows))
    chosen = parser.parse_args().rows
    names = list(rows) if chosen == "all" else chosen.split(",")
    spec = sys.modules["__main__"].__spec__
    program = spec.name if spec else sys.argv[0]
    code = 0
    for name in names:
        claim, figure, function = rows[name]
        started = time.monotonic()
        try:
            outcome = function()
        except Exception as error:  # noqa: BLE001  a row that breaks is a row that does not hold; the others still run
            outcome = {"measured": f"{type(error).__name__}: {error}", "holds": False}
        line = {"row": name, "claim": claim, "figure": figure, **outcome}
        line["seconds"] = round(time.monotonic() - started, 1)
        line["command"] = f"make accept ISSUE={issue} ROWS={name}" if issue else f"python -m {program} --rows {name}"
        print(json.dumps(line), flush=True)
        code |= not line["holds"]
    return code


def command(*argv: str | Path, env: dict[str, str] | None = None, check: bool = True) -> subprocess.CompletedProcess:
    """Run python with the repository on its path; the output is kept, and shown if it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=environment(env), capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, argv))} left with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
        )
    return done


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This environment with PYTHONPATH set, as train.sh does."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | (extra or {})


def copy_experiment(source: str, target: Path) -> Path:
    """A new folder with the config and scripts of a shipped experiment, made by the user's own command."""
    if target.exists():
        shutil.rmtree(target)
    command("main.py", "new", target, "--from", ROOT / "exps" / source)
    return target


def train(exp: Path, ranks: int, *overrides: str, check: bool = True) -> tuple[float, subprocess.CompletedProcess]:
    """`train.sh local N`, as a user would; returns (seconds, process)."""
    started = time.monotonic()
    sets = [word for override in overrides for word in ("--set", override)]
    done = command("-m", "launch", "train", exp, "local", str(ranks), *sets, check=check)
    return time.monotonic() - started, done


def train_cpu(exp: Path, ranks: int, *overrides: str) -> float:
    """`train.sh local N`; returns the CPU minutes that it took, reader processes included."""
    argv = [sys.executable, "-m", "launch", "train", str(exp), "local", str(ranks)]
    argv += [word for override in overrides for word in ("--set", override)]
    log = exp.parent / f"{exp.name}.out"
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, cwd=ROOT, env=environment({"OMP_NUM_THREADS": "1"}), stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"training {exp} left with {process.returncode}: {log.read_text()[-1500:]}")
    return (usage.ru_utime + usage.ru_stime) / 60


def evaluate(exp: Path, ranks: int, *arguments: str) -> dict:
    """`eval.sh local N`; returns the summary of the results."""
    command("-m", "launch", "eval", exp, "local", str(ranks), *arguments)
    newest = max((exp / "results").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


def workspace() -> Path:
    """A folder for this run's experiments, kept so that a failed row can be looked at."""
    folder = os.environ.get("ZOETROPE_ACCEPT_DIR")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(folder)
    return Path(tempfile.mkdtemp(prefix="zoetrope-accept-"))
