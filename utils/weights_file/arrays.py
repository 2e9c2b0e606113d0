"""Read pickles of NumPy arrays in plain containers (`.pdparams` of Paddle, `.pkl` of Caffe2) without running anything.

A pickle is a program that may call any function it names. `opcodes` checks it first. Then the few names that an array
needs are bound to stand-ins that only take notes, and any other name ends the loading. No value of the file reaches a
function of NumPy: an array is made from its dtype string, shape and bytes after they were checked against each other.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np

from utils.weights_file import opcodes
from utils.weights_file.flaws import Flaw, Unwanted

_KINDS = "fiub"  # float, int, unsigned, bool
# The errors of the unpickler on damaged bytes
_ERRORS = (
    EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, MemoryError, RecursionError, OverflowError,
)  # fmt: skip
_SCALARS = (bool, int, float, str, bytes, type(None))


def load(file: BinaryIO, size: int) -> object:
    """Return the content of an open file: dicts, lists, tuples and plain values, with NumPy arrays among them.

    Raises:
        Unwanted: it names anything but arrays and plain containers.
        Flaw: it is damaged, or its values would take many times its size.
    """
    opcodes.check(file, size, names="arrays", size=size)

    file.seek(0)
    try:
        return _Content(size).finished(_Unpickler(file, encoding="latin1").load())
    except pickle.UnpicklingError as error:
        raise Flaw(str(error)) from error
    except _ERRORS as error:
        raise Flaw(type(error).__name__) from error


class _DType:
    """Notes about a dtype: `numpy.dtype("f4", False, True)` and the state that sets its byte order."""

    def __init__(self, code: str, *_flags: object) -> None:
        self.code, self.order = code, "="

    # pickle's BUILD calls this, with the state that NumPy wrote: (version, byte order, ...)
    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        if not isinstance(order, str):  # a tuple that contains itself many times would take for ever to hash
            raise Flaw("a dtype without byte order")
        self.order = {"|": "=", "<": "<", ">": ">", "=": "="}[order]

    def numpy(self) -> np.dtype:
        code = self.code.lstrip("<>=|") if isinstance(self.code, str) else ""
        if not code or code[0] not in _KINDS or code[1:] not in ("1", "2", "4", "8"):
            raise Flaw(f"an array of dtype {code[:20]!r}")
        return np.dtype(self.order + code)


class _Array:
    """Notes about an array: version, shape, dtype, memory order and bytes."""

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def numpy(self) -> np.ndarray:
        if not isinstance(getattr(self, "state", None), tuple) or len(self.state) != 5:
            raise Flaw("an array without content")
        _, shape, dtype, fortran, content = self.state
        return _array(content, dtype, shape, "F" if fortran else "C")


class _Scalar:
    """Notes about a NumPy scalar."""

    def __init__(self, dtype: _DType, content: object = b"") -> None:
        self.dtype, self.content = dtype, content

    def numpy(self) -> object:
        return _array(self.content, self.dtype, (), "C").item()


class _Buffer:
    """Notes about an array of pickle protocol 5."""

    def __init__(self, content: object, dtype: _DType, shape: tuple, order: str) -> None:
        self.notes = (content, dtype, shape, order)

    def numpy(self) -> np.ndarray:
        return _array(*self.notes)


def _array(content: object, dtype: object, shape: object, order: str) -> np.ndarray:
    """Return a writable array, if bytes, dtype and shape fit each other."""
    if isinstance(content, str):  # a byte string of Python 2
        content = content.encode("latin1")

    if not isinstance(dtype, _DType) or not isinstance(shape, tuple) or not isinstance(content, bytes | bytearray):
        raise Flaw("an array that is not plain numbers")
    if len(shape) > opcodes.MOST_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise Flaw("an array whose shape is not described")

    kind = dtype.numpy()
    if math.prod(shape) * kind.itemsize != len(content):
        raise Flaw(f"an array of shape {shape} and {len(content)} bytes")

    array = np.frombuffer(content, kind).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(kind.newbyteorder("="))  # a copy: the bytes are read-only


def _reconstruct(*_arguments: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Return the bytes of a latin-1 text, which is how protocol 2 writes bytes."""
    if encoding != "latin1":
        raise Flaw("bytes that are not written as latin1")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    """Return bytes of length 0, as protocols 0 to 2 write them."""
    return b""


# The whole list of names that may be called, with the stand-in of each
_NAMES: dict[tuple[str, str], object] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "ndarray",  # an argument of _reconstruct, never called
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("collections", "OrderedDict"): OrderedDict,
}
# NumPy 2 moved its core; old files have the old names
for _package in ("numpy.core", "numpy._core"):
    _NAMES[_package + ".multiarray", "_reconstruct"] = _reconstruct
    _NAMES[_package + ".multiarray", "scalar"] = _Scalar
    _NAMES[_package + ".numeric", "_frombuffer"] = _Buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _NAMES:
            raise Unwanted(f"{module_name}.{global_name}")
        target = _NAMES[module_name, global_name]
        # A pickle can set attributes of the things it names: give it a new wrapper, never our class or function
        return functools.partial(target) if callable(target) else target


class _Content:
    """Replaces the stand-ins in a value with arrays.

    Args:
        size: bytes of the file, which bounds the bytes of the arrays.
    """

    def __init__(self, size: int) -> None:
        self.room = opcodes.GROWTH * size + opcodes.SLACK
        self.done: dict[int, object] = {}  # by identity, since parts may be shared

    def finished(self, value: object) -> object:
        """Return the same containers with arrays in place of the stand-ins."""
        if isinstance(value, _SCALARS):
            return value

        if id(value) not in self.done:
            if isinstance(value, _Array | _Scalar | _Buffer):
                built = value.numpy()
                self.room -= getattr(built, "nbytes", 8)
                if self.room < 0:
                    raise Flaw("arrays that take many times the size of the file")
            elif isinstance(value, dict):  # `dict.items`: a pickle can give an ordered dict an attribute of that name
                built = {self.finished(key): self.finished(item) for key, item in dict.items(value)}
            elif isinstance(value, list | tuple):
                built = type(value)([self.finished(item) for item in value])
            else:
                raise Flaw(f"a {type(value).__name__.lstrip('_')}")
            self.done[id(value)] = built
        return self.done[id(value)]
