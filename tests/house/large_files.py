"""Refuse files that make every clone large: `python -m tests.house.large_files [FILE ...]`, all files without names."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tests import git

LIMIT = 256 * 1024  # bytes; the largest picture of the pages has 188 KiB
ALLOWED = {"tests/data/golden/psf_temporal_test.json"}  # a table of another tool, which a test compares in full


def too_large(names: Iterable[str]) -> list[str]:
    """Return a sentence for each file above the limit; names are relative to the root of the repository."""
    sizes = {name: (git.ROOT / name).stat().st_size for name in names if name not in ALLOWED}
    return [f"{name}: {size:,} bytes, more than {LIMIT:,}" for name, size in sizes.items() if size > LIMIT]


if __name__ == "__main__":
    large = too_large(sys.argv[1:] or git.files())
    print("\n".join(large), end="\n" if large else "")
    sys.exit(bool(large))
