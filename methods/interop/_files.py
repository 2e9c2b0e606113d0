"""A published weights file, whatever it is wrapped in -> {name: tensor}. Nothing in it is run."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.interop import _unpickle
from utils.faults import UserError

_PICKLES = (".pdparams", ".pkl")
_WRAPPERS = ("state_dict", "model_state", "model", "blobs")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file; `module.` of DataParallel is taken off the names.

    Raises:
        UserError: no such file, damaged, it would need code to be run for reading, or it holds no tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        content = _safetensors(path)
    else:
        content = _unpickle.load(path) if path.suffix in _PICKLES else _torch_load(path)
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    found = {} if not isinstance(content, Mapping) else {name: _tensor(value) for name, value in content.items()}
    state = {str(name): value for name, value in found.items() if value is not None}
    if not state:
        raise UserError(f"{path} holds no named tensors")
    unreal = [name for name, tensor in state.items() if tensor.is_complex()]
    if unreal:
        raise UserError(f"{path}: complex numbers in {', '.join(unreal[:6])}; weights of a network are real numbers")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _torch_load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of files that are then refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  damaged bytes make torch raise almost anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not zipfile.is_zipfile(path):  # perhaps a pickle not of torch's making: arrays in plain containers
            try:
                content = _unpickle.load(path)
            except _unpickle.Forbidden:
                if not named:
                    raise
            except UserError:
                pass  # what torch says is said below
            else:
                if isinstance(content, Mapping):
                    return content
        if named:
            raise _unpickle.Forbidden(
                f"{path} holds more than tensors and plain values: it names {named[1]}, which is never run; "
                "the file was not loaded"
            ) from error
        raise UserError(f"{path} is not a whole weights file ({type(error).__name__})") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: reading it needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error


def _tensor(value: Any) -> Tensor | None:
    """A tensor; None for what is not numbers (Paddle's table of names, strings)."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value if isinstance(value, Tensor) else None
