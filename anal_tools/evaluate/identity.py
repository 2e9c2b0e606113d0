"""Identify an evaluation: everything that decides the score of a video, so that no result mixes two of them.

A stopped evaluation resumes only with the same weights, model, list, root, reader, views, colours, number formats,
device, libraries and code. The average is not among them, because it is taken over kept views. `source_files` finds
the files of the code: it follows the imports of the modules that read, transform and score.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from anal_tools.evaluate.protocols import Protocol
    from datasets.lists.records import Records
    from utils.config import Config

ROOT = Path(__file__).resolve().parents[2]
#: Libraries whose version may change pixels or scores.
_LIBRARIES = ("torch", "torchvision", "numpy", "av", "simplejpeg", "opencv-python-headless", "opencv-python")
_LIBRARIES += ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
#: Modules that read, transform and score for every method; their imports are followed too.
_ROOTS = (
    "datasets.loading.workers",
    "datasets.loading.eval",
    "datasets.readers.resize",
    "datasets.plan.views",
    "methods.folding",
    "methods.positions",
    "utils.view_batches",
    "utils.metrics",
    "utils.transforms",
)
#: Files that call the modules above and import nearly everything else; only their own text counts.
_CALLERS = ("utils/engine/evaluate.py", "utils/engine/network.py", "anal_tools/evaluate/network.py")
_SHOWN = 4  # differences that a message lists


def identity(
    cfg: Config,
    records: Records,
    protocol: Protocol,
    net: nn.Module,
    *,
    weights_hash: str,
    as_is: bool,
    number_format: str,
    device: str,
) -> dict[str, object]:
    """Return everything that decides the score of a video, as plain values in named parts.

    Args:
        cfg: a loaded configuration.
        records: the list that is scored.
        protocol: which views of a video, at which size.
        net: the network in the form that scores.
        weights_hash: sha256 of the weights file.
        as_is: the network is used as trained, not in its fastest form.
        number_format: format in which the views are kept.
        device: kind of device, "cpu" or "cuda".

    Returns:
        {part: value}. Key order, the name of a root and the number of ranks do not matter.
    """
    from datasets.loading import loader
    from utils.engine.network import model_arguments

    # the text and the preset only name the views; the average can be chosen again later
    views = {key: value for key, value in protocol.to_dict().items() if key not in ("text", "average", "preset")}
    # classes in the network may come from any module, even from one of the user's libraries
    types = {type(module).__module__ for module in net.modules()}
    reader_module = loader.loaders(cfg.data.reader)[1].__module__

    return {
        "weights": weights_hash,
        "model": model_arguments(cfg, pretrained=False),
        "list": {"sha256": records.list_hash, "layout": cfg.data.list_layout, "classes": cfg.model.num_class},
        "root": os.path.realpath(records.root),
        "reader": _reader(cfg),
        "views": views,
        "colours": {"mean": list(cfg.augmentation.mean), "std": list(cfg.augmentation.std)},
        "numbers": {"precision": cfg.precision, "kept": number_format},
        "form": "as trained (--plain)" if as_is else "fastest",
        "device": device,
        "libraries": _versions(),
        "code": source_hashes({f"methods.{cfg.model.type}", reader_module, *types}),
    }


def _reader(cfg: Config) -> dict[str, object]:
    """Return the settings that turn files into frames, without the servers of memcached, which hold the same frames."""
    from datasets.loading import loader

    spec: dict[str, Any] = dataclasses.asdict(loader.loader_options(cfg).reader)
    memcached = spec.pop("memcached") or {}
    metadata = spec.pop("metadata")

    spec["namespace"] = memcached.get("namespace")
    # two metadata files with the same content are the same
    spec["metadata"] = hashlib.sha256(Path(metadata).read_bytes()).hexdigest() if metadata else None
    spec["on_bad"] = cfg.data.on_bad
    return spec


def _versions() -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue

    return versions


def source_hashes(modules: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of every source file that runs when these modules score.

    Args:
        modules: names of the modules of the method, of the loader, and of the classes in the network.

    Returns:
        {file: sha256}; files of the repository by their path in it, others by the name of their module.
    """
    sources = source_files((*modules, *_ROOTS)) | {name: ROOT / name for name in _CALLERS}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in sorted(sources.items())}


def source_files(modules: Iterable[str]) -> dict[str, Path]:
    """Follow the imports of modules through all source files that are not installed libraries.

    Imports inside functions count; those under `if TYPE_CHECKING` do not.

    Returns:
        {name: file} of the modules and of everything that they import; names as in `source_hashes`.
    """
    seen: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue

        file = _file_of(module)
        if file is None:
            continue
        seen[module] = file

        # Importing a.b.c runs a/b/__init__.py too.
        package = module.rpartition(".")[0]
        waiting += [package] if package else []
        waiting += imports(file, module)

    # Paths relative to the repository: the same code in another folder is the same.
    named = {}
    for module, file in seen.items():
        inside = file.is_relative_to(ROOT)
        named[file.relative_to(ROOT).as_posix() if inside else module] = file
    return named


@functools.cache
def _file_of(module: str) -> Path | None:
    """Return the source file of a module, or None if there is none or it belongs to an installed library."""
    # Look in the repository first, without importing anything.
    base = ROOT.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file

    # elsewhere only a module that is already imported has a known file
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if not loaded or not loaded.endswith(".py"):
        return None

    file = Path(loaded).resolve()
    libraries = {"site-packages", "dist-packages"}
    in_python = file.is_relative_to(Path(os.__file__).resolve().parent)
    return None if in_python or libraries & set(file.parts) else file


def imports(file: Path, module: str) -> tuple[str, ...]:
    """Return the names of all modules that a source file may import."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return _imports(file.read_bytes(), package)


@functools.cache  # by the text: a process that evaluates more than once parses each file once
def _imports(source: bytes, package: str) -> tuple[str, ...]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # no running code imports this file; its text still counts
        return ()

    names: list[str] = []
    for node in _statements(tree.body):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # level counts the dots of a relative import: one dot is the package itself
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]  # a name may be a module or a value
    return tuple(names)


def _statements(block: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield the statements of a block and of all blocks inside, without the bodies of `if TYPE_CHECKING`."""
    for node in block:
        yield node
        blocks = ("body", "orelse", "finalbody", "handlers", "cases")
        if isinstance(node, ast.If) and any(_is_type_checking(part) for part in ast.walk(node.test)):
            blocks = ("orelse",)
        for name in blocks:
            yield from _statements(getattr(node, name, ()))


def _is_type_checking(node: ast.AST) -> bool:
    return "TYPE_CHECKING" in (getattr(node, "id", ""), getattr(node, "attr", ""))


def differences(old: object, new: Mapping[str, object]) -> str:
    """Describe the differences of two identities in one line; "" if they are the same.

    Args:
        old: an identity read from a file; any JSON value.
        new: the identity of the evaluation that starts.
    """
    if not isinstance(old, dict):
        return "its settings cannot be read"

    changes = []
    for part in dict.fromkeys([*new, *old]):
        a, b = old.get(part), new.get(part)
        if a == b:
            continue
        if not (isinstance(a, dict) and isinstance(b, dict)):
            # hashes of weights mean nothing to a reader
            changes.append(part if part == "weights" else f"{part} ({_short(a)} -> {_short(b)})")
            continue

        keys = [key for key in dict.fromkeys([*b, *a]) if a.get(key) != b.get(key)]
        if part == "code":
            changes += [f"code ({key})" for key in keys]
        else:
            changes += [f"{part}.{key} ({_short(a.get(key))} -> {_short(b.get(key))})" for key in keys]

    more = len(changes) - _SHOWN
    return ", ".join(changes[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}..."
