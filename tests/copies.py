"""A copy of the repository's files in which a test may add a file of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import forked, git

ROOT = Path(__file__).resolve().parents[1]


def copy_repository(target: Path) -> Path:
    """Copy all files that git knows or would add; link this environment as `.venv`. Skip outside a git checkout."""
    for name in git.files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(sys.prefix)
    return target


def run_in(copy: Path, *argv: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """Run a command in the copy; return stdout and stderr together. Fail for another exit code."""
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in argv]
    run = forked.run if words[0] == sys.executable else subprocess.run
    done = run(words, cwd=copy, env=env, capture_output=True, text=True, check=False, timeout=200)
    text = done.stdout + done.stderr
    assert done.returncode in codes, f"{' '.join(words)} left with {done.returncode}\n{text}"
    return text
