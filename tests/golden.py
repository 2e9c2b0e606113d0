"""Figures of other tools that tests compare with: tests/data/golden (tables), tests/data/label_maps (class names)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"
TABLES, LABEL_MAPS = DATA / "golden", DATA / "label_maps"


def rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    table_rows = json.loads((TABLES / f"{name}.json").read_text())["rows"]
    assert table_rows, name
    return table_rows
