"""Compile the guard of the fake GPU, once for a version of it, of PyTorch and of the compiler."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import util
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@functools.cache
def library() -> Path:
    """The compiled guard; skips the test where there can be none."""
    import torch

    if torch.version.cuda or torch.version.hip:
        pytest.skip(f"torch {torch.__version__} has CUDA itself, whose hooks cannot be replaced")
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler here")
    spec = util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_folder = Path(spec.origin).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    source = HERE / "guard.cpp"
    command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", str(source)]
    command += [f"-I{include}", f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    key = hashlib.sha256(repr([command, torch.__version__]).encode() + source.read_bytes()).hexdigest()[:16]
    guard = _cache() / f"guard-{key}.so"
    with open(guard.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of a test run wait for the one that compiles
        if not guard.exists():
            with tempfile.TemporaryDirectory(dir=guard.parent) as folder:
                subprocess.run([*command, "-o", f"{folder}/guard.so"], check=True, timeout=240)
                os.replace(f"{folder}/guard.so", guard)
    return guard


def _cache() -> Path:
    """Return the folder of the user's caches, or a new one where none can be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zoetrope-tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="zoetrope-fake-cuda-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="zoetrope-fake-cuda-"))


def run(module: str, *words: str, timeout: float = 240) -> list[dict[str, Any]]:
    """The JSON lines that a module of this folder prints, in a process with the fake GPU."""
    # A FutureWarning is how torch announces that a function will go: an error, as everywhere in the tests.
    command = [sys.executable, "-W", "error::FutureWarning", "-m", f"tests.fake_cuda.{module}", str(library()), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
