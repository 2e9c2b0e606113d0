"""What git knows about a checkout. These calls take milliseconds, so a quick test may make them (tests/tiers.py)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def files(*below: str, root: Path = ROOT) -> list[str]:
    """Return the files that git tracks or would add, without deleted ones; skip the test outside of a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *below]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return sorted(name for name in set(done.stdout.splitlines()) if (root / name).is_file())
