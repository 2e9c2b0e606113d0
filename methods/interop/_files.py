"""Return the tensors of a published weights file by name, out of all wrappers. No code in the file is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods import fetch
from utils import files, weights_file
from utils.errors import UserError

#: Keys under which projects keep their tensors, in the order in which they are tried.
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "blobs")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_ENCODERS = ("target_encoder", "ema_encoder", "encoder")  # of V-JEPA 2; the first that the file has is taken
_LISTED = 6  # names that a message shows
_digests: dict[tuple, str] = {}  # sha256 of the files that this process has hashed, by their state


def content_of(path: Path) -> Any:
    """Return the content of a weights file; a published file is compared with the sha256 in its name.

    Raises:
        UserError: no such file, damaged, or not readable without running code.
    """
    _check_published(path)
    return weights_file.read(path)


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file (see `tensors_of`).

    Raises:
        UserError: it cannot be read (see `content_of`), or holds no tensors.
    """
    return tensors_of(content_of(path), path)


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the named tensors in the content of a weights file.

    They may be wrapped in dicts (`state_dict`, `model` and others), and their names may have prefixes of DataParallel.

    Raises:
        UserError: it holds no tensors, or tensors that are not weights of a network.
    """
    content = _vjepa2(content)

    # One wrapper per turn, with a limit: a damaged file could nest them without end.
    for _ in range(len(_WRAPPERS)):
        inner = [content[key] for key in _WRAPPERS if isinstance(content, Mapping) and key in content]
        wrapped = [value for value in inner if isinstance(value, Mapping)]
        if not wrapped:
            break
        content = wrapped[0]

    named = {} if not isinstance(content, Mapping) else {name: _tensor(value) for name, value in content.items()}
    state = {str(name): value for name, value in named.items() if value is not None}
    if not state:
        raise UserError(
            f"{path} holds no state dict: no named tensors, neither by themselves nor under a key "
            f"{', '.join(map(repr, _WRAPPERS))}"
        )

    # names are printed in messages, and a control character could change a terminal
    unreadable = [name for name in state if not name.isprintable()]
    if unreadable:
        raise UserError(f"{path}: names of tensors that cannot be printed, such as {unreadable[0][:100]!a}")

    unreal = [name for name, tensor in state.items() if tensor.is_complex()]
    if unreal:
        raise UserError(f"{path}: complex numbers in {', '.join(unreal[:_LISTED])}; a network has real weights")

    # twice, since the two prefixes come in both orders
    for prefix in (*_PREFIXES, *_PREFIXES):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _vjepa2(content: Any) -> Any:
    """Return the tensors of a V-JEPA 2 file: those of the averaged encoder with the predictor, or those of a probe.

    From a file of several probes return the first, as transformers does.
    """
    if not isinstance(content, Mapping):
        return content

    probes = content.get("classifiers")
    if isinstance(probes, list) and probes and isinstance(probes[0], Mapping):
        return probes[0]

    names = [name for name in _ENCODERS if isinstance(content.get(name), Mapping)]
    if not names:
        return content

    predictor = content.get("predictor")
    parts = {"": content[names[0]], "predictor.": predictor if isinstance(predictor, Mapping) else {}}
    return {f"{stem}{_bare(str(name))}": value for stem, part in parts.items() for name, value in part.items()}


def _bare(name: str) -> str:
    for prefix in ("module.", "backbone."):
        name = name.removeprefix(prefix)
    return name


def _check_published(path: Path) -> None:
    """Compare a file with the sha256 in its name, if `fetch` has that name.

    Raises:
        UserError: it is a different file.
    """
    if path.name not in fetch.FILES.values() or not path.is_file():
        return

    expected = path.stem.rpartition("-")[2]
    if not digest_of(path).startswith(expected):
        raise UserError(
            f"{path}: its sha256 does not begin with {expected}, as the published file's does; it is damaged or "
            "a different file. Remove it and fetch it again, or rename it if it is your own"
        )


def digest_of(path: Path) -> str:
    """Return the sha256 of a file, in hex; a process hashes each state of a file once."""
    status = path.stat()
    # a changed file has another inode, size or time
    stamp = (os.fspath(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if stamp not in _digests:
        _digests[stamp] = files.sha256(path)
    return _digests[stamp]


def _tensor(value: Any) -> Tensor | None:
    """Return a tensor; None for other values, such as Paddle's table of names."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value if isinstance(value, Tensor) else None
