"""Row: DALI on the CPU: repeated frames, undecodable clips, colours, hidden frames and fields."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

from tests.conftest import ROOT


def row() -> dict[str, Any]:
    """Run the tests that assert each figure; how many passed."""
    import pytest

    class Count:
        passed: list[str] = []
        failed: list[str] = []

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                self.failed.append(report.nodeid)
            elif report.when == "call" and report.passed:
                self.passed.append(report.nodeid)

    count = Count()
    file = ROOT / "tests" / "datasets" / "test_dali_streams.py"
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main([str(file), "-q", "--rootdir", str(ROOT)], plugins=[count])
    measured = {"passed": len(count.passed), "failed": count.failed}
    measured["refused"] = "VP9 with hidden frames, H.264 that may have fields, AV1: all of them; the rest is accepted"
    return {"measured": measured, "holds": code == 0 and len(count.passed) >= 30}


if __name__ == "__main__":
    print(json.dumps(row()))
