"""Pickles of NumPy arrays in plain containers (`.pdparams` of Paddle, `.pkl` of Caffe2), read without running anything.

A pickle is a program that may call any function it names. Here the few names that an array needs mean stand-ins of our
own, which only take notes; every other name ends the loading. No function of NumPy is called with what the file says:
an array is made from its dtype string, shape and bytes, after they have been checked against each other.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from utils.faults import UserError

_KINDS = "fiub"  # float, int, unsigned, bool
_PLAIN = (bool, int, float, str, bytes, type(None))


class Forbidden(UserError):
    """The file names something that would have to be run or built for reading it."""


class _Named(pickle.UnpicklingError):
    """A name that is not one of ours."""


def load(path: Path) -> Any:
    """The file's content: dicts, lists, tuples and plain values, with NumPy arrays among them.

    Raises:
        Forbidden: it names anything but arrays and plain containers.
        UserError: it is damaged.
    """
    try:
        with path.open("rb") as file:
            return _finished(_Unpickler(file, encoding="latin1").load(), {})
    except _Named as error:
        raise Forbidden(
            f"{path} holds more than NumPy arrays and plain containers: {error}, which is never run; it was not loaded"
        ) from error
    except (pickle.UnpicklingError, _BadArray) as error:
        raise UserError(f"{path} holds more than NumPy arrays and plain containers, or is damaged: {error}") from error
    except (
        EOFError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        MemoryError,
        RecursionError,
        OverflowError,
    ) as error:
        raise UserError(f"{path} is not a whole pickle of NumPy arrays ({type(error).__name__})") from error


class _BadArray(Exception):
    """What the file says about an array does not fit together."""


class _DType:
    """Notes about a dtype: `numpy.dtype("f4", False, True)` and the state that sets its byte order."""

    def __init__(self, code: str, *_flags: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {"|": "=", "<": "<", ">": ">", "=": "="}[state[1]]

    def numpy(self) -> np.dtype:
        code = self.code.lstrip("<>=|")
        if not isinstance(self.code, str) or code[:1] not in _KINDS or code[1:] not in ("1", "2", "4", "8"):
            raise _BadArray(f"an array of dtype {self.code!r}")
        return np.dtype(self.order + code)


class _Array:
    """Notes about an array: version, shape, dtype, memory order and bytes."""

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def numpy(self) -> np.ndarray:
        if len(getattr(self, "state", ())) != 5:
            raise _BadArray("an array without content")
        _, shape, dtype, fortran, content = self.state
        return _array(content, dtype, shape, "F" if fortran else "C")


class _Scalar:
    """Notes about a NumPy scalar."""

    def __init__(self, dtype: _DType, content: object = b"") -> None:
        self.dtype, self.content = dtype, content

    def numpy(self) -> Any:
        return _array(self.content, self.dtype, (), "C").item()


class _Buffer:
    """Notes about an array of pickle protocol 5."""

    def __init__(self, content: object, dtype: _DType, shape: tuple, order: str) -> None:
        self.notes = (content, dtype, shape, order)

    def numpy(self) -> np.ndarray:
        return _array(*self.notes)


def _array(content: object, dtype: object, shape: object, order: str) -> np.ndarray:
    """A writable array, if bytes, dtype and shape belong together."""
    if isinstance(content, str):  # a byte string of Python 2
        content = content.encode("latin1")
    fits = isinstance(dtype, _DType) and isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not fits or not isinstance(content, bytes | bytearray):
        raise _BadArray("an array that is not plain numbers")
    assert isinstance(dtype, _DType)
    assert isinstance(shape, tuple)
    kind = dtype.numpy()
    if math.prod(shape) * kind.itemsize != len(content):
        raise _BadArray(f"an array of shape {shape} and {len(content)} bytes")
    array = np.frombuffer(content, kind).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(kind.newbyteorder("="))  # a copy: the bytes are read-only


def _reconstruct(*_arguments: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Protocol 2 writes bytes as latin-1 text."""
    if encoding != "latin1":
        raise _BadArray(f"bytes written as {encoding}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    """How protocols 0 to 2 write bytes of length 0."""
    return b""


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "ndarray",  # an argument of _reconstruct, never called
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("collections", "OrderedDict"): OrderedDict,
}
for _package in ("numpy.core", "numpy._core"):
    _NAMES[_package + ".multiarray", "_reconstruct"] = _reconstruct
    _NAMES[_package + ".multiarray", "scalar"] = _Scalar
    _NAMES[_package + ".numeric", "_frombuffer"] = _Buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _NAMES:
            raise _Named(f"it names {module_name}.{global_name}")
        found = _NAMES[module_name, global_name]
        # A pickle can set attributes of what it names: it gets a wrapper of its own, never our class or function.
        return functools.partial(found) if callable(found) else found


def _finished(value: Any, done: dict[int, Any]) -> Any:
    """The same containers with arrays in the place of the stand-ins; `done` by identity, as parts may be shared."""
    if isinstance(value, _PLAIN):
        return value
    if id(value) not in done:
        if isinstance(value, _Array | _Scalar | _Buffer):
            done[id(value)] = value.numpy()
        elif isinstance(value, dict):
            done[id(value)] = {_finished(key, done): _finished(item, done) for key, item in value.items()}
        elif isinstance(value, list | tuple):
            done[id(value)] = type(value)([_finished(item, done) for item in value])
        else:
            raise _BadArray(f"a {type(value).__name__.lstrip('_')}")
    return done[id(value)]
