"""Architecture rules that a reader of the code relies on; they look at whatever files there are."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import git

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("methods", "networks", "datasets", "utils", "anal_tools", "launch")

# Which packages a package may import. `main` may import all of them; none imports `main`. utils/engine counts as a
# package above datasets and methods: no other file of utils may import it.
ALLOWED = {
    "networks": set(),
    "utils": set(),
    "methods": {"networks", "utils"},
    "datasets": {"utils"},
    "engine": {"utils", "datasets", "methods"},
    "anal_tools": {"utils", "datasets", "methods", "engine"},
    "launch": {"utils", "anal_tools"},
    "main": {*PACKAGES, "engine"} - {"launch"},
}
EXCEPTIONS = {("launch/job.py", "main")}  # inside the job, lazily
# Heavy or optional: imported inside the function that needs it.
LAZY = {
    "av", "nvidia", "psutil", "submitit", "tensorboard", "onnx", "onnxruntime", "onnxscript",
    "torchvision", "matplotlib", "sklearn", "wandb", "mlflow", "mkdocs",
}  # fmt: skip
# Read on login nodes, in worker processes or by quick verbs: importing them must not import torch.
TORCH_FREE = (
    "launch/*.py", "utils/config/*.py", "utils/errors.py", "utils/lr_schedule.py", "utils/run_dir.py",
    "methods/fetch.py", "utils/schedulers/*.py", "utils/processes.py", "anal_tools/new.py",
    "datasets/plan/*.py", "datasets/plan/ops/*.py", "datasets/lists/records.py",
    "datasets/readers/*.py", "datasets/loading/workers.py", "datasets/dali/encoded.py", "datasets/dump/video.py",
    "datasets/scan/*.py", "datasets/lists/*.py", "datasets/demo/*.py",
    "docs/pictures/*.py", "docs/site_pages.py",
)  # fmt: skip
# Pickles of the reader processes: they come through a socket that our own processes alone inherit.
OWN_PIPES = {("datasets/loading/messages.py", "pickle.loads")}
DISTRIBUTED = {"utils/dist.py", "utils/reduce.py", "utils/sync_bn.py"}


@functools.cache
def tracked() -> tuple[str, ...]:
    """Paths of the repository's files, without what git ignores and what is deleted."""
    return tuple(git.files())


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def python_files(*, tests: bool = False) -> list[str]:
    return [n for n in tracked() if n.endswith(".py") and (tests or not n.startswith("tests/"))]


def matching(patterns: tuple[str, ...]) -> list[str]:
    return [name for name in python_files() if any(Path(name).match(pattern) for pattern in patterns)]


def package_of(name: str) -> str | None:
    first = Path(name).parts[0]
    if name.startswith("utils/engine/"):
        return "engine"
    return "main" if first == "main.py" else first if first in PACKAGES else None


def imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """Dotted names that the import statements among `nodes` load, with their lines."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the package's name"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def named_modules(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """Dotted names of our modules in strings, such as a table of verbs or the words after `-m`, with their lines."""
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(".")[0] in PACKAGES:
            place = node.value.replace(".", "/")
            if "." in node.value and {f"{place}.py", f"{place}/__init__.py"} & set(tracked()):
                yield node.value, node.lineno


def at_import(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when the module is imported: not those of functions, nor `if TYPE_CHECKING`."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from at_import(handler.body)


def not_for_types(node: ast.AST) -> Iterator[ast.AST]:
    """Like ast.walk, without what only the type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield from not_for_types(child)


def test_the_tree_is_seen() -> None:
    assert "main.py" in tracked()
    assert {package_of(name) for name in python_files()} >= {"main", *PACKAGES}


TOP_LEVEL = {
    "methods",
    "networks",
    "datasets",
    "utils",
    "anal_tools",
    "exps",
    "pretrained",
    "data",
    "main.py",
    "launch",
}
TOP_LEVEL |= {"README.md", "tests", "docs", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml"}


def test_the_top_level_is_the_users() -> None:
    """A verb that runs in the repository without `--out` leaves a folder there: it must not be committed."""
    top_level = {Path(name).parts[0] for name in tracked()}
    assert {name for name in top_level if not name.startswith(".")} - TOP_LEVEL == set()


@pytest.mark.parametrize("package", ALLOWED)
def test_import_direction(package: str) -> None:
    wrong = []
    for name in (n for n in python_files() if package_of(n) == package):
        nodes = list(not_for_types(tree(name)))
        for module, line in (*imports(iter(nodes)), *named_modules(iter(nodes))):
            other = "engine" if module.startswith("utils.engine") else module.split(".")[0]
            if other in ALLOWED and other not in {package, *ALLOWED[package]} and (name, module) not in EXCEPTIONS:
                wrong.append(f"{name}:{line} imports {module}")
    assert wrong == []


def test_a_verb_that_a_table_names_counts_as_an_import() -> None:
    assert "anal_tools.new" in [module for module, _ in named_modules(ast.walk(tree("main.py")))]
    text = ast.parse("VERBS = {'x': ('launch.job', 'not our module: launch.none')}")
    assert list(named_modules(ast.walk(text))) == [("launch.job", 1)]


def test_optional_libraries_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{name}:{line} imports {module}"
        for name in python_files()
        if package_of(name)
        for module, line in imports(at_import(tree(name).body))
        if module.split(".")[0] in LAZY
    ]
    assert wrong == []


def test_torchvision_has_one_door() -> None:
    # `import torchvision` fails beside a CPU build of torch unless utils/vision.py goes first.
    wrong = [
        f"{name}:{line} imports {module}"
        for name in python_files(tests=True)
        for module, line in imports(ast.walk(tree(name)))
        if module.split(".")[0] == "torchvision"
    ]
    assert wrong == []


@functools.cache
def direct(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """(our files, top-level libraries) that importing one of our files imports by itself."""
    files, libraries = set(), set()
    for module, _ in imports(at_import(tree(name).body)):
        parts = module.split(".")
        if parts[0] not in PACKAGES:
            libraries.add(parts[0])
            continue
        for depth in range(1, len(parts) + 1):
            place = "/".join(parts[:depth])
            files |= {f"{place}/__init__.py", f"{place}.py"} & set(tracked())
    return frozenset(files), frozenset(libraries)


def loaded_with(name: str) -> set[str]:
    """Return all our files that importing `name` imports, itself included."""
    modules, open_ends = {name}, [name]
    while open_ends:
        new = direct(open_ends.pop())[0] - modules
        modules |= new
        open_ends += new
    return modules


@pytest.mark.parametrize("name", matching(TORCH_FREE))
def test_no_torch_on_the_login_node_and_in_workers(name: str) -> None:
    assert sorted(file for file in loaded_with(name) if "torch" in direct(file)[1]) == []


def test_torch_distributed_stays_in_its_files() -> None:
    names = set()
    for name in python_files():
        text = (ROOT / name).read_text(encoding="utf-8")
        if package_of(name) and re.search(r"torch\.distributed(?!\.run\b)|from torch import .*\bdistributed\b", text):
            code = ast.unparse(tree(name))  # comments are gone
            used = any(module.startswith("torch.distributed") for module, _ in imports(ast.walk(tree(name))))
            names |= {name} if used or re.search(r"(?<!['\"])torch\.distributed\.\w+\(", code) else set()
    assert names - DISTRIBUTED == set()


def _forbidden(call: ast.Call) -> str | None:
    words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    function = ast.unparse(call.func)
    if words.get("shell") == "True":
        return "shell=True"
    if function in ("os.system", "os.popen", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        return function
    if re.fullmatch(r"(pickle|cPickle|dill|cloudpickle|joblib)\.loads?", function):
        return function
    if function == "torch.load" and words.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if words.get("allow_pickle") == "True":
        return "allow_pickle=True"
    return None


def test_no_call_that_runs_foreign_text() -> None:
    wrong = [
        f"{name}:{node.lineno} {_forbidden(node)}"
        for name in python_files(tests=True)
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and _forbidden(node) and (name, _forbidden(node)) not in OWN_PIPES
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("subprocess.run(x, shell=True)", "shell=True"),
        ("torch.load(f)", "torch.load without weights_only=True"),
        ("torch.load(f, weights_only=True)", None),
        ("pickle.loads(x)", "pickle.loads"),
        ("yaml.safe_load(x)", None),
        ("net.eval()", None),
    ],
)
def test_the_search_for_forbidden_calls_finds_them(text: str, verdict: str | None) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert _forbidden(call) == verdict


def test_devices_and_flags_of_cuda_are_complete() -> None:
    """`torch.device("cuda")` is refused by calls that need a number; cudnn.flags switches off what it is not given."""
    wrong = []
    for name in python_files(tests=True):
        for node in ast.walk(tree(name)):
            if not isinstance(node, ast.Call):
                continue
            words = {keyword.arg for keyword in node.keywords}
            function = ast.unparse(node.func)
            if name.startswith("tests/gpu/") and ast.unparse(node) == "torch.device('cuda')":
                wrong.append(f"{name}:{node.lineno} torch.device('cuda') without a number")
            if function.endswith("cudnn.flags") and "enabled" not in words:
                wrong.append(f"{name}:{node.lineno} cudnn.flags without enabled=")
    assert wrong == []


def test_every_package_folder_is_a_package() -> None:
    # A folder without __init__.py loses to any installed package of the same name.
    folders = {str(Path(name).parent) for name in python_files() if package_of(name) not in (None, "main")}
    assert sorted(folder for folder in folders if f"{folder}/__init__.py" not in tracked()) == []


def public_functions(nodes: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Functions, and methods of classes, that can be called from outside; not those inside functions."""
    for node in nodes:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield from () if "overload" in map(ast.unparse, node.decorator_list) else (node,)


def test_public_functions_say_what_they_do() -> None:
    wrong = [
        f"{name}:{node.lineno} {node.name}"
        for name in python_files()
        for node in public_functions(tree(name).body)
        if not ast.get_docstring(node) and (node.end_lineno or 0) - node.lineno + 1 > 8
    ]
    assert wrong == []
    assert [name for name in python_files() if tree(name).body and not ast.get_docstring(tree(name))] == []


@pytest.mark.parametrize("name", [n for n in tracked() if n.endswith(".md")])
def test_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#|mailto:", target):
            place = (ROOT / name).parent / target.split("#")[0]
            broken += [] if place.exists() else [target]
    assert broken == []


WORDS_LEFT = 0  # uses of words of tests/data/words.txt


def test_no_text_gets_more_words_that_are_not_used() -> None:
    listed = (ROOT / "tests/data/words.txt").read_text(encoding="utf-8").splitlines()
    words = re.compile(rf"\b(?:{'|'.join(line for line in listed if line and line[0] != '#')})\b", re.IGNORECASE)
    places = [
        f"{name}:{number}: {match[0]}"
        for name in tracked()
        if name.endswith((".py", ".md", ".html")) and not name.startswith("tests/data/")
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        for match in words.finditer(line)
    ]
    assert len(places) <= WORDS_LEFT, places


def test_files_that_texts_name_are_there() -> None:
    """Paths of our files in documents and comments of the product follow a move."""
    wrong = []
    for name in (n for n in tracked() if n.endswith((".md", ".py")) and not n.startswith("tests/")):
        for path in re.findall(
            rf"\b((?:{'|'.join(PACKAGES)}|tests)/[\w/]+\.py)\b", (ROOT / name).read_text(encoding="utf-8")
        ):
            if not (ROOT / path).exists() and "NAME" not in path and name != "docs/add_a_model.md":
                wrong.append(f"{name}: {path}")
    assert sorted(set(wrong)) == []


def test_readme_stays_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 200


def test_no_path_of_one_machine_is_committed() -> None:
    # One example names a cluster's /mnt/lustre; that file is kept as its authors wrote it.
    pattern = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|scratch)/\w")
    wrong = []
    for name in tracked():
        data = (ROOT / name).read_bytes()
        if b"\0" in data[:4096]:
            continue
        lines = data.decode("utf-8", errors="replace").splitlines()
        wrong += [f"{name}:{i}: {line.strip()[:80]}" for i, line in enumerate(lines, 1) if pattern.search(line)]
    assert wrong == []
