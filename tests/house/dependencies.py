"""What pyproject.toml depends on: licences, hashes for continuous integration, and the oldest versions.

    python -m tests.house.dependencies licences   # docs/licences.md, from the packages of this environment
    python -m tests.house.dependencies hashes     # .ci/packages.txt, from this environment and the package index
    python -m tests.house.dependencies oldest     # prints the oldest versions that pyproject.toml allows, for pip

`licences` keeps the rows of packages that are not installed here: an extra such as `mlflow` is added to the page by one
call in an environment that has it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from email.message import Message

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "licences.md"
HASHES = ROOT / ".ci" / "packages.txt"
CORE = "core"  # the name of what is installed without an extra
UNHASHED = {"torch"}  # its CPU build is not on the public index
_HEAD = """# Licences of dependencies

Zoetrope is under the Apache License 2.0. This page lists the packages that `pyproject.toml` asks
for, and those that they need in turn. The last column names the extras that need a package; `core`
means that every installation has it. The licence is the one in the metadata of the package.

    python -m tests.house.dependencies licences    # writes this page

Some wheels contain libraries under other licences than their package:

- PyAV and OpenCV contain FFmpeg (LGPL 2.1 or later). PyAV's FFmpeg contains x264 and x265 (GPL 2 or
  later), so if you pass on its wheels, you pass on a GPL work.
- The CUDA builds of PyTorch, and DALI, need NVIDIA's libraries, which have NVIDIA's own licence.
  The rows for PyTorch describe its CPU build, without these libraries.

| package | licence | needed for |
|---|---|---|
"""
_CLASSIFIER = "License :: OSI Approved :: "


def requirements() -> dict[str, list[Requirement]]:
    """Return what pyproject.toml asks for: `CORE` and each extra -> requirements."""
    # Regular expressions, because Python 3.10 has no tomllib
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    core = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    extras = text.partition("[project.optional-dependencies]\n")[2].partition("\n\n")[0]
    named = {CORE: re.findall(r'^ {4}"([^"]+)",', core, re.MULTILINE)}
    for line in extras.splitlines():
        name, _, rest = line.partition(" = ")
        named[name] = re.findall(r'"([^"]+)"', rest)
    return {name: [Requirement(one) for one in lines] for name, lines in named.items()}


def oldest() -> list[str]:
    """Return the oldest allowed version of each package with one, such as `numpy==1.26`."""
    bounds = []
    for name in (CORE, "export", "dev"):
        for one in requirements()[name]:
            low = [part.version for part in one.specifier if part.operator == ">="]
            bounds += [f"{one.name}=={low[0]}"] if low else []
    return bounds


def needed(extra: str) -> Iterator[str]:
    """Yield the packages of an extra and all that they need, by the metadata of those that are installed."""
    todo = list(requirements()[extra])
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if (name, frozenset(one.extras)) in seen:
            continue
        seen.add((name, frozenset(one.extras)))
        yield name
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for further in map(Requirement, lines):
            environments = [{"extra": ""}, *({"extra": extra} for extra in one.extras)]
            if further.marker is None or any(further.marker.evaluate(where) for where in environments):
                todo.append(further)


def licence(name: str) -> str | None:
    """Return the licence of an installed package by its metadata; None if it is not installed."""
    try:
        about = cast("Message", metadata.metadata(name))  # its protocol lacks `get` before Python 3.12
    except metadata.PackageNotFoundError:
        return None
    expression = about.get("License-Expression")
    classes = [line.removeprefix(_CLASSIFIER) for line in about.get_all("Classifier", []) if _CLASSIFIER in line]
    free = [line for line in (about.get("License") or "").strip().splitlines() if line != "UNKNOWN"]
    stated = expression or (free[0] if len(free) == 1 else "") or ", ".join(classes) or (free[0] if free else "")
    return stated.replace("|", "/").strip() or "not stated"


def rows(text: str) -> dict[str, list[str]]:
    """Return the table of the page: package -> its cells."""
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {row[0]: row for row in cells if row[0] != "package"}


def page(old: str) -> str:
    """Return the page of licences for the packages of this environment, and for others as `old` has them."""
    kept = rows(old)
    uses: dict[str, list[str]] = {}
    for extra in requirements():
        for name in needed(extra):
            uses.setdefault(name, [])
            uses[name] += [extra] if extra not in uses[name] else []
    # What an extra brings along is unknown where it is not installed
    absent = {extra for extra, packages in requirements().items() if any(licence(one.name) is None for one in packages)}
    for name, row in kept.items():
        more = [extra for extra in row[2].split(", ") if extra in absent]
        if more:
            uses.setdefault(name, [])
            uses[name] += [extra for extra in more if extra not in uses[name]]

    lines = []
    for name in sorted(uses):
        stated = licence(name) or (kept[name][1] if name in kept else None)
        if stated is None:
            raise SystemExit(f"error: {name} is not installed here, and {PAGE.name} has no row for it")
        ordered = [extra for extra in requirements() if extra in uses[name]]
        # What every installation has needs no list of extras
        lines.append(f"| {name} | {stated} | {CORE if CORE in ordered else ', '.join(ordered)} |")
    return _HEAD + "\n".join(lines) + "\n"


def hashes() -> str:
    """Return the content of .ci/packages.txt: the packages of this environment with the hashes of their public files.

    The public index alone is asked, so that no file of another index is listed.
    """
    extras = (CORE, "export", "dali", "dev")  # those of `make test`
    names = {name for extra in extras for name in needed(extra)} - UNHASHED
    frozen = [f"{name}=={metadata.version(name)}" for name in sorted(names)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") or key == "PIP_CERT"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
        command += ["--only-binary=:all:", "--report", str(report), *frozen]
        subprocess.run(command, env=env | {"PIP_CONFIG_FILE": os.devnull}, check=True)
        files = json.loads(report.read_text("utf-8"))["install"]
    downloads = sorted(
        (f"{canonicalize_name(one['metadata']['name'])}=={one['metadata']['version']}", one["download_info"])
        for one in files
    )
    version = ".".join(map(str, sys.version_info[:2]))
    head = (
        f"# The packages that CI installs with CPython {version} on Linux for x86_64: no other file is taken.\n"
        "# torch is not listed: its CPU build (.ci/cpu.txt) comes from another index.\n"
        "# Written by `python -m tests.house.dependencies hashes`, in an environment of `make test`.\n"
    )
    lines = [f"{name} --hash=sha256:{info['archive_info']['hashes']['sha256']}" for name, info in downloads]
    return head + "\n".join(lines) + "\n"


def main(words: list[str]) -> int:
    """Run one of the commands above."""
    if words == ["licences"]:
        PAGE.write_text(page(PAGE.read_text("utf-8") if PAGE.exists() else ""), "utf-8")
    elif words == ["hashes"]:
        HASHES.write_text(hashes(), "utf-8")
    elif words == ["oldest"]:
        print("\n".join(oldest()))
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
