"""Every golden table of the peers, row by row; those of the learning rates are compared nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.accept import golden04


@pytest.mark.parametrize("table", sorted(golden04.TABLES))
def test_every_row_is_equal(table: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden04, "TABLES", {table: golden04.TABLES[table]})
    ((equal, rows),) = golden04.compare(shared_data / "golden/tables").values()
    assert rows > 0
    assert equal == rows


def test_a_changed_row_is_noticed(shared_data: Path, tmp_path: Path) -> None:
    for source in (shared_data / "golden/tables").glob("*.json"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    changed = tmp_path / "psf_lr.json"
    text = changed.read_text()
    changed.write_text(
        text.replace('"warmup_start_lr":0.01', '"warmup_start_lr":0.02', 1).replace(
            '"warmup_start_lr": 0.01', '"warmup_start_lr": 0.02', 1
        )
    )
    assert changed.read_text() != text
    equal, rows = golden04.compare(tmp_path)["psf_lr"]
    assert equal == rows - 1
