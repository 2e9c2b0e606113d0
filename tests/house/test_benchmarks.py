"""Each row that `make accept` names is found, and each module of measurements is named by a row or helps one."""

from __future__ import annotations

import pytest

from tests.benchmarks import issues


@pytest.mark.parametrize("issue", issues.ISSUES)
def test_each_row_has_a_claim_a_figure_and_a_function(issue: str) -> None:
    for row, module in issues.ISSUES[issue].items():
        claim, figure, function = issues.rows_of(issue)[row]
        assert claim, row
        assert figure, row
        found = issues.loaded(module)
        assert callable(function), row
        assert callable(found.row if module.startswith("reliability.") else found.ROWS[row][2]), row


def test_no_row_is_left_out() -> None:
    named = {(module, row) for rows in issues.ISSUES.values() for row, module in rows.items()}
    modules = sorted({module for module, _ in named if not module.startswith("reliability.")})
    there = {(module, row) for module in modules for row in issues.loaded(module).ROWS}
    assert there - named == {("data.memcached", "client_cpu")}  # a figure of the docs that no issue promised
