"""Write recorded.json: kernels of each case for the version of PyTorch at hand. Look at the difference in review."""

from __future__ import annotations

import json

import torch

from tests.fake_cuda import build
from tests.fake_cuda.cases import METHODS
from tests.fake_cuda.steps import RECORDED

if __name__ == "__main__":
    kernels = {}
    for method in METHODS:
        for row in build.run("cases", method, timeout=1800):
            kernels[f"{method} {row['case']}"] = row["kernels"]
            print(json.dumps(row), flush=True)
    RECORDED.write_text(json.dumps({"torch": torch.__version__.split("+")[0], "kernels": kernels}, indent=1) + "\n")
