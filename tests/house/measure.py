"""Measure how hard the product code is to read: names, layers, circles, lines. One JSON line.

    python -m tests.house.measure                     this work tree
    python -m tests.house.measure --base 176f066      a commit beside it, both columns
    python -m tests.house.measure --traced            and what a training step and a validation enter, in a tiny run

How each figure is counted stands in the docstring of the function that counts it. Product code is main.py, methods,
networks, datasets, utils, anal_tools, launch and docs/**/*.py.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests import git

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("main.py", "methods", "networks", "datasets", "utils", "anal_tools", "launch", "docs")
PACKAGES = ("methods", "networks", "datasets", "utils", "utils/engine", "anal_tools", "launch", "main")
LOOP = ("train", "train_step")

# Which packages a package may import; nothing else is downward.
ALLOWED: dict[str, set[str]] = {
    "networks": set(),
    "utils": set(),
    "methods": {"networks", "utils"},
    "datasets": {"utils"},
    "utils/engine": {"utils", "networks", "datasets", "methods"},
    "anal_tools": {"utils", "datasets", "methods", "utils/engine"},
    "launch": {"utils", "anal_tools"},  # a sweep writes experiment folders; options are checked by their verb's parser
    "main": {"methods", "networks", "datasets", "utils", "utils/engine", "anal_tools"},
}
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class Tree:
    """The product code of one checkout, parsed once."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.names = [name for name in git.files(*PRODUCT, root=root) if name.endswith(".py")]

    @functools.cache  # noqa: B019  one tree lives as long as the program
    def text(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")

    @functools.cache  # noqa: B019
    def parsed(self, name: str) -> ast.Module:
        return ast.parse(self.text(name), name)

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """{dotted name: file}."""
        modules = {}
        for name in self.names:
            dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            modules[dotted] = name
        return modules


# ------------------------------------------------------------------------------------------------------------ the loop
def dotted(node: ast.expr) -> str | None:
    """Return `a.b.c` of an attribute chain that begins at a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def dotted_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the longest attribute chains below `nodes`, each once: `run.bad.note` is one name, `run.bad` none."""
    names: set[str] = set()
    open_ends = list(nodes)
    while open_ends:
        node = open_ends.pop()
        name = dotted(node) if isinstance(node, ast.Attribute) else None
        if name:
            names.add(name)
        else:
            open_ends.extend(ast.iter_child_nodes(node))
    return names


def loop(tree: Tree) -> dict[str, Any]:
    """Count the distinct dotted names in the bodies of train() and train_step(), and their lines.

    At commit 176f066 this finds 99 names in 127 lines (98 of them code) where the review of that commit counted 95.
    """
    functions = [n for n in tree.parsed("main.py").body if isinstance(n, ast.FunctionDef) and n.name in LOOP]
    names = dotted_names(statement for function in functions for statement in function.body)
    lines = [range(function.lineno, (function.end_lineno or 0) + 1) for function in functions]
    code = code_lines(tree.text("main.py"))
    of_code = sum(len(code & set(each)) for each in lines)
    return {
        "loop_names": len(names),
        "loop_lines": sum(map(len, lines)),
        "loop_code_lines": of_code,
        "loop_names_per_line": round(len(names) / sum(map(len, lines)), 2),
        "loop_names_per_code_line": round(len(names) / of_code, 2),
    }


# --------------------------------------------------------------------------------------------------------------- lines
def docstrings(tree: ast.AST) -> set[int]:
    """Return the lines that docstrings fill."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            lines |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def code_lines(text: str) -> set[int]:
    """Return the lines that hold a token of code: no blank line, no comment alone, no docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings(ast.parse(text))


def size(tree: Tree) -> dict[str, Any]:
    """Count code lines, the word Any, comments per 100 lines, and the share of blank lines in bodies.

    A body is that of a function of ten lines or more, without its docstring. Comments are comment tokens, those that
    switch a tool off too.
    """
    code = anys = comments = lines = body_lines = body_blanks = 0
    for name in tree.names:
        text = tree.text(name)
        rows = text.splitlines()
        code += len(code_lines(text))
        anys += len(re.findall(r"\bAny\b", text))
        lines += len(rows)
        comments += sum(t.type == tokenize.COMMENT for t in tokenize.generate_tokens(io.StringIO(text).readline))
        texts = docstrings(tree.parsed(name))
        for node in ast.walk(tree.parsed(name)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            last = node.end_lineno or 0
            if last - node.lineno + 1 >= 10:
                body = set(range(node.lineno, last + 1)) - texts
                body_lines += len(body)
                body_blanks += sum(not rows[line - 1].strip() for line in body)
    return {
        "code_lines": code,
        "any": anys,
        "comments_per_100_lines": round(100 * comments / lines, 1),
        "blank_lines_in_bodies_percent": round(100 * body_blanks / body_lines, 1),
    }


def complexity(tree: Tree, limit: int = 12) -> dict[str, Any]:
    """Count the functions whose cyclomatic complexity is above `limit`, by ruff."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "C901", "--exit-zero"]
    command += ["--ignore-noqa", "--output-format", "json", "--config", f"lint.mccabe.max-complexity={limit}"]
    done = subprocess.run([*command, *tree.names], cwd=tree.root, capture_output=True, text=True, check=True)
    return {"c901_above_12": len(json.loads(done.stdout))}


# ------------------------------------------------------------------------------------------------------------- imports
def package_of(name: str) -> str | None:
    """Return the layer that a file belongs to."""
    parts = Path(name).parts
    if name == "main.py":
        return "main"
    if parts[:2] == ("utils", "engine"):
        return "utils/engine"
    return parts[0] if parts[0] in PACKAGES else None


def not_for_types(node: ast.AST) -> Iterator[ast.AST]:
    """Walk like ast.walk, without what only the type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from not_for_types(child)


def imports(tree: Tree, name: str) -> Iterator[tuple[str, int]]:
    """Yield our modules that a file loads, at import or later, with the line: (dotted name, line).

    A text that is the dotted name of a module counts: the table of verbs, `importlib.import_module`, `python -m`.
    """
    for node in not_for_types(tree.parsed(name)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [each if each in tree.modules else node.module or "" for each in whole]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            modules = [node.value]
        else:
            continue
        yield from ((module, node.lineno) for module in dict.fromkeys(modules) if module in tree.modules)


def circles(tree: Tree) -> list[list[str]]:
    """Return the groups of files that import each other in a circle, imports inside functions included."""
    edges: dict[str, set[str]] = {}
    for name in tree.names:
        edges[name] = {tree.modules[module] for module, _ in imports(tree, name)} - {name}
    return sorted(sorted(group) for group in strongly_connected(edges) if len(group) > 1)


def strongly_connected(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components (Tarjan, without recursion)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []
    for root in edges:
        work = [(root, iter(sorted(edges[root])))] if root not in order else []
        if work:
            order[root] = low[root] = len(order)
            stack.append(root)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in order:
                    order[other] = low[other] = len(order)
                    stack.append(other)
                    work.append((other, iter(sorted(edges[other]))))
                    break
                if other in stack:
                    low[node] = min(low[node], order[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    at = stack.index(node)
                    groups.append(stack[at:])
                    del stack[at:]
    return groups


def upward(tree: Tree) -> list[str]:
    """Return the imports against the order of the layers, as `file:line -> module`."""
    wrong = []
    for name in tree.names:
        package = package_of(name)
        if not package:
            continue
        for module, line in imports(tree, name):
            other = package_of(tree.modules[module])
            if other and other != package and other not in ALLOWED[package]:
                wrong.append(f"{name}:{line} -> {module}")
    return wrong


# -------------------------------------------------------------------------------------------------------------- traced
def traced(root: Path) -> dict[str, Any]:
    """Run six steps of a tiny experiment of that checkout in a process of its own and read what it entered.

    Python 3.10 does not name the class of a function that runs, so this needs 3.11.
    """
    with tempfile.TemporaryDirectory(prefix="zoetrope-measure-") as folder:
        env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("traced_run.py")), str(root), folder]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------- verdict
def measure(root: Path = ROOT, *, trace: bool = False) -> dict[str, Any]:
    """Return all figures of one checkout."""
    tree = Tree(root)
    circular, wrong = circles(tree), upward(tree)
    figures = {
        **loop(tree),
        **size(tree),
        **complexity(tree),
        "circles": len(circular),
        "circles_named": [" <-> ".join(group) for group in circular],
        "upward_imports": len(wrong),
        "upward_imports_named": wrong,
    }
    return figures | (traced(root) if trace else {})


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Give a commit of this repository as a folder."""
    with tempfile.TemporaryDirectory(prefix="zoetrope-base-") as folder:
        place = Path(folder) / "base"
        subprocess.run(["git", "clone", "-q", "--shared", "--no-checkout", str(ROOT), str(place)], check=True)
        subprocess.run(["git", "checkout", "-q", "--detach", commit], cwd=place, check=True)
        yield place


def main() -> int:
    """Print the figures, or {figure: [base, here]} with --base."""
    parser = argparse.ArgumentParser(prog="python -m tests.house.measure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", metavar="COMMIT", help="measure this commit too and print [base, here]")
    parser.add_argument("--traced", action="store_true", help="train a tiny experiment under a tracer too (20 s each)")
    args = parser.parse_args()

    here: dict[str, Any] = measure(trace=args.traced)
    if args.base:
        with checkout(args.base) as place:
            base = measure(place, trace=args.traced)
        here = {key: [base[key], here[key]] for key in here}
    print(json.dumps(here))
    return 0


if __name__ == "__main__":
    sys.exit(main())
