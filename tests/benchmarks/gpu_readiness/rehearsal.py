"""Row: every row of tests/gpu/one_gpu.py runs on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from tests.conftest import ROOT


def row(*, smoke: bool = False) -> dict[str, Any]:
    """Run the rehearsal; seconds, and the rows that do not hold."""
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "one_gpu.py"), "--rehearse", *["--smoke"] * smoke]
    began = time.monotonic()
    done = subprocess.run([*command, "--limit", "900"], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    bad = [result["row"] for result in rows if not result["holds"]]
    measured = {"seconds": round(seconds), "rows": len(rows), "bad": bad}
    return {"measured": measured, "holds": not bad and len(rows) >= 12 and seconds <= (60 if smoke else 600)}


if __name__ == "__main__":
    print(json.dumps(row()))
