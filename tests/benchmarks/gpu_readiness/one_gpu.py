"""Row: what a GPU shows (tests/gpu/one_gpu.py); without one, *not measured*."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.conftest import ROOT


def row() -> dict[str, Any]:
    """Run the script where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {"measured": "not measured: there is no GPU on this machine", "holds": True}
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "one_gpu.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {"measured": {result["row"]: result["measured"] for result in rows}, "holds": done.returncode == 0}


if __name__ == "__main__":
    print(json.dumps(row()))
