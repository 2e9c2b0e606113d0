"""Every golden table of the peers, row by row; those of the learning rates are compared nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.analysis import golden


@pytest.mark.parametrize("table", sorted(golden.TABLES))
def test_every_row_is_equal(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "TABLES", {table: golden.TABLES[table]})
    ((equal, rows),) = golden.compare(golden.TABLES_AT).values()
    assert rows > 0
    assert equal == rows


def test_a_changed_row_is_noticed(tmp_path: Path) -> None:
    for source in (golden.TABLES_AT).glob("*.json"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    changed = tmp_path / "psf_lr.json"
    text = changed.read_text()
    changed.write_text(
        text.replace('"warmup_start_lr":0.01', '"warmup_start_lr":0.02', 1).replace(
            '"warmup_start_lr": 0.01', '"warmup_start_lr": 0.02', 1
        )
    )
    assert changed.read_text() != text
    equal, rows = golden.compare(tmp_path)["psf_lr"]
    assert equal == rows - 1
