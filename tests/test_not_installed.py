"""Without the environment each entry says in one sentence how to install it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils import errors
from utils.version import VERSION

PACKAGES = ("launch", "utils", "anal_tools", "datasets", "methods", "networks")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The program without `.venv`, and a python3 that has no packages, first on the path."""
    root = tmp_path / "a clone"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", root)
    (tmp_path / "bin").mkdir()
    bare = tmp_path / "bin/python3"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    return root


def run(words: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{root.parent / 'bin'}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "words",
    [
        ["python3", "main.py", "list"],
        ["python3", "main.py", "config", "exps/any"],
        ["python3", "main.py", "train", "exps/any"],
        ["sh", "launch/exp.sh", "train", "exps/any", "local", "2"],
    ],
)
def test_one_sentence(clone: Path, words: list[str]) -> None:
    done = run(words, clone)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"run `make install` in {clone} once" in line
    assert f"{clone}/.venv/bin/python" in line


def test_the_environment_of_the_repository_is_named_where_there_is_one(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").symlink_to(sys.executable)
    done = run(["python3", "main.py", "list"], clone)
    assert done.returncode == 2
    assert f"use {clone}/.venv/bin/python instead of python" in done.stderr
    assert "make install" not in done.stderr


def test_help_needs_no_package(clone: Path) -> None:
    done = run(["python3", "main.py", "--help"], clone)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_needs_no_package(clone: Path) -> None:
    done = run(["python3", "main.py", "--version"], clone)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"zoetrope {VERSION}\n", "")


def test_a_missing_module_of_ours_is_a_bug_and_stays_one() -> None:
    def verb() -> int:
        raise ModuleNotFoundError("No module named 'utils.nothing'", name="utils.nothing")

    with pytest.raises(ModuleNotFoundError):
        errors.run_cli(verb)


def test_make_install_makes_the_environment(tmp_path: Path) -> None:
    words = ["make", "-n", "install", f"VENV={tmp_path}/venv", "EXTRAS=export"]
    lines = run(words, ROOT).stdout.splitlines()
    commands = [line.split()[:3] for line in lines]
    assert ["bash", ".ci/make_venv", '"python3"'] in commands
    assert [line for line in lines if line.startswith("bash .ci/install")] == [
        f'bash .ci/install {tmp_path}/venv ""',
        f"bash .ci/install {tmp_path}/venv export",
    ]
