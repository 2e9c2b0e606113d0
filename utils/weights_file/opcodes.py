"""Check a pickle before it is loaded: run it with stand-ins and bounds, and build nothing.

A pickle is a program for a stack machine. A few bytes of it can fill the memory (an index of the memo, a length, a
shape), hang (a tuple of itself as a dict key: hashing it never ends) or call any function. `check` runs the program
with notes in place of values. It accepts the operations, names and arguments that describe tensors and arrays in plain
containers; all others raise. Time and memory are linear in the number of operations, which is bounded.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeGuard

from utils.weights_file.flaws import Flaw, Unwanted

MOST_STEPS = 2_000_000  # operations, and values that they copy; a network of 1000 tensors with Adam takes 150,000
_STEPS_OF_A_CALL = 4  # the result of a call takes more memory than a number
_SHORT = 1000  # bytes of a text whose letters are kept
_LONGEST_NUMBER = 40  # bytes of an integer: the magic number of a torch file has 10
_LARGEST_KEY = 1 << 60  # integers beyond it can share a hash, and a dict of such keys takes quadratic time
MOST_AXES = 64
SLACK = 64 << 20  # bytes that the values of a small file may use
GROWTH = 8  # bytes of values for each byte of the file: tensors may share a storage, arrays their bytes

# How many bytes hold the length of a text or of bytes; negative: the length is signed.
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: -4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # fmt: skip
# Bytes of an item, by dtype and by type of storage
_ITEM_SIZES = {
    "float64": 8, "double": 8, "complex64": 8, "int64": 8, "long": 8, "float32": 4, "float": 4, "int32": 4, "int": 4,
    "float16": 2, "half": 2, "bfloat16": 2, "int16": 2, "short": 2, "uint8": 1, "int8": 1, "bool": 1, "complex128": 16,
    "uint16": 2, "uint32": 4, "uint64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
}  # fmt: skip
_STORAGES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip


class _Long:
    """A text or bytes; only the length is kept."""

    def __init__(self, length: int) -> None:
        self.length = length


class _Dict:
    """A dict, ordered dict or counter; only the number of entries is kept."""

    def __init__(self, count: int = 0, *, ordered: bool = False) -> None:
        self.count, self.ordered = count, ordered


class _Name:
    """A global name, with the function that checks a call of it; without one it is a value by itself."""

    def __init__(self, name: str, call: _Call | None, item_size: int = 0) -> None:
        self.name, self.call, self.item_size = name, call, item_size


class _Thing:
    """A value of a different type.

    Args:
        kind: "storage", "tensor", "array", "dtype" or "plain".
        items: number of items of a storage.
        item_size: bytes of one item.
        key: whether it may be a key of a dict.
    """

    def __init__(self, kind: str, items: int = 0, item_size: int = 0, *, key: bool = False) -> None:
        self.kind, self.items, self.item_size, self.key = kind, items, item_size, key


_Operation = Callable[["_Machine", Any], object]
_Call = Callable[["_Machine", tuple], object]
Storages = Callable[[str, int, int], None]


def check(
    file: BinaryIO, end: int, *, names: str, size: int, protocol: int | None = None, storages: Storages | None = None
) -> object:
    """Check one pickle, from the file's position to its STOP. The position is then right after it.

    Args:
        file: open for reading.
        end: the offset beyond which the pickle must not reach.
        names: "torch" or "arrays": which table of names it may use.
        size: bytes of the whole weights file, which bounds the memory of tensors.
        protocol: the protocol that it must have; None for any.
        storages: called with (key, number of items, bytes of an item) of each storage; raises `Flaw` if it is missing.

    Returns:
        A stand-in for the value: plain numbers, short texts, lists and tuples are kept.

    Raises:
        Flaw: damaged, or out of bounds.
        Unwanted: it names something that does not describe tensors.
    """
    machine = _Machine(file, end, NAMES[names], size, storages)
    try:
        value = machine.run()
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise Flaw("its pickle is damaged") from error

    if protocol is not None and machine.protocol != protocol:
        raise Flaw(f"a pickle of protocol {machine.protocol}")
    return value


class _Machine:
    """The stack machine of the pickle format, with stand-ins as values."""

    def __init__(
        self, file: BinaryIO, end: int, names: Mapping[str, _Name], size: int, storages: Storages | None
    ) -> None:
        self.file, self.end, self.names, self.storages = file, end, names, storages
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.steps, self.protocol = 0, 0
        self.room = GROWTH * size + SLACK  # bytes that values may still take

    def run(self) -> object:
        """Run to STOP and return the stand-in of the result."""
        while (code := self.file.read(1)) != b".":
            if code not in _BY_CODE:
                raise Flaw("its pickle is cut off" if not code else f"its pickle has an operation {code!r}")
            self.spend(1)  # before the operation: the bound holds whatever it does
            operation, kind = _BY_CODE[code]
            operation(self, None if kind is None else self.argument(kind))

        if self.file.tell() > self.end or self.marks or len(self.stack) != 1:
            raise Flaw("its pickle is damaged")
        return self.stack[0]

    def argument(self, kind: pickletools.ArgumentDescriptor) -> object:
        """Return the argument of an operation: a number or a short text; for a long text or bytes, only the length."""
        if kind.name in ("stringnl", "unicodestringnl"):  # a line of text, of any length
            line = self.file.readline(self.end - self.file.tell())
            if not line.endswith(b"\n"):
                raise Flaw("its pickle is cut off")
            return _Long(len(line))

        # Numbers: pickletools reads them; only LONG1 has a length, of one byte
        if kind.n not in _LENGTHS or kind.name == "long1":
            return kind.reader(self.file)

        length = int.from_bytes(self.file.read(abs(_LENGTHS[kind.n])), "little", signed=_LENGTHS[kind.n] < 0)
        at = self.file.tell()
        # A length is never trusted before it is compared with the bytes that are left
        if not 0 <= length <= self.end - at:
            raise Flaw("its pickle is cut off")

        if length <= _SHORT and not kind.name.startswith("byte"):
            return self.file.read(length).decode("utf-8", "replace")
        self.file.seek(at + length)
        return _Long(length)

    def spend(self, steps: int) -> None:
        """Count operations and copied values; raise at the limit."""
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise Flaw(f"its pickle takes more than {MOST_STEPS} steps")

    def take(self, size: int) -> None:
        """Count the bytes that a value will take; raise at the limit."""
        self.room -= size
        if self.room < 0:
            raise Flaw("its values would take many times the size of the file")

    def items(self) -> list[object]:
        """Return the values that were pushed since the last mark."""
        if not self.marks:
            raise Flaw("its pickle is damaged")
        items, self.stack = self.stack, self.marks.pop()
        return items

    def name(self, full: str) -> None:
        """Push the meaning of a global name."""
        if full not in self.names:
            raise Unwanted(full)
        self.stack.append(self.names[full])

    def put(self, index: int) -> None:
        """Store the top of the stack in the memo. The C reader allocates its memo up to the index, so refuse gaps."""
        if not 0 <= index <= self.steps:
            raise Flaw("its pickle is damaged: an index that is not in order")
        self.memo[index] = self.stack[-1]

    def check_key(self, key: object) -> None:
        """Accept text, bytes and numbers as keys."""
        if isinstance(key, int) and abs(key) < _LARGEST_KEY:
            return
        if key is None or isinstance(key, str | float | _Long) or (isinstance(key, _Thing) and key.key):
            return
        raise Flaw("a dict whose keys are neither text nor small numbers")

    def extend(self, items: list[object]) -> None:
        """Append items to the list on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, list):
            raise Flaw("its pickle is damaged")
        target.extend(items)

    def set_items(self, items: list[object], target: object = None) -> None:
        """Check entries for a dict, by default the dict on top of the stack: key, value, key, value ..."""
        target = self.stack[-1] if target is None else target
        if not isinstance(target, _Dict) or len(items) % 2:
            raise Flaw("its pickle is damaged")
        for key in items[::2]:
            self.check_key(key)
        target.count += len(items) // 2


# The operations. `argument` follows the operation's code in the file; None if it has none.


def _keep(machine: _Machine, argument: object) -> None:
    """Push the value that the operation carries."""
    if isinstance(argument, int) and argument.bit_length() > 8 * _LONGEST_NUMBER:
        raise Flaw("a number with too many digits")
    machine.stack.append(argument)


def _proto(machine: _Machine, version: int) -> None:
    machine.protocol = version


def _frame(machine: _Machine, length: int) -> None:
    if length > machine.end - machine.file.tell():
        raise Flaw("its pickle is cut off")


def _mark(machine: _Machine, _: object) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _collect(make: Callable[[list[object]], object]) -> _Operation:
    """Return the operation LIST or TUPLE: collect the values above the mark."""

    def operation(machine: _Machine, _: object) -> None:
        items = machine.items()
        machine.stack.append(make(items))

    return operation


def _tuple_of(count: int) -> _Operation:
    def operation(machine: _Machine, _: object) -> None:
        if len(machine.stack) < count:
            raise Flaw("its pickle is damaged")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return operation


def _dict(machine: _Machine, _: object) -> None:
    items = machine.items()
    machine.stack.append(_Dict())
    machine.set_items(items)


def _set_item(machine: _Machine, _: object) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _stack_global(machine: _Machine, _: object) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Flaw("its pickle is damaged")
    machine.name(f"{module}.{name}")


def _reduce(machine: _Machine, _: object) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    if not isinstance(function, _Name) or function.call is None or not isinstance(arguments, tuple):
        raise Flaw("its pickle calls something that is not a function")
    machine.spend(_STEPS_OF_A_CALL)
    machine.stack.append(function.call(machine, arguments))


def _build(machine: _Machine, _: object) -> None:
    """Set the state of an object: a tuple for an array or dtype, a dict of attributes for an ordered dict."""
    state, target = machine.stack.pop(), machine.stack[-1]
    if isinstance(target, _Dict) and target.ordered and isinstance(state, _Dict):
        machine.spend(state.count)
    elif not (isinstance(target, _Thing) and target.kind in ("array", "dtype") and isinstance(state, tuple)):
        raise Flaw("its pickle sets attributes on something that has none")


def _persistent(machine: _Machine, _: object) -> None:
    """Push a storage: ("storage", type, key, device, number of items), in the older format also a view."""
    note = machine.stack.pop()
    if machine.storages is None or not isinstance(note, tuple) or len(note) not in (5, 6) or note[0] != "storage":
        raise Flaw("its pickle refers to something that is not a storage")

    _, kind, key, device, items, *view = note
    if not isinstance(kind, _Name) or not kind.item_size or kind.call:
        raise Flaw("a storage of an unknown type")
    if not isinstance(key, str) or not isinstance(device, str) or not _count(items):
        raise Flaw("a storage whose length is not a number")

    machine.storages(key, items, kind.item_size)
    if view and view[0] is not None:  # as torch before 0.4 wrote it
        items = _viewed(view[0], items)
    machine.stack.append(_Thing("storage", items, kind.item_size))


def _viewed(view: object, items: int) -> int:
    """Return the length of a view of a storage."""
    if not isinstance(view, tuple) or len(view) != 3 or not isinstance(view[0], str):
        raise Flaw("a view that is not described")
    if not _count(view[1]) or not _count(view[2]) or view[1] + view[2] > items:
        raise Flaw("a view that extends beyond its storage")
    return view[2]


def _count(value: object) -> TypeGuard[int]:
    """Return True for a whole number that can be a length."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


# Operations that are not in this table make `run` raise: INST, OBJ and EXT, which call functions too, are not needed
_VALUES = (
    "INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
_OPERATIONS: dict[str, _Operation] = {
    **dict.fromkeys(_VALUES, _keep),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append(_Dict()),
    "PROTO": _proto,
    "FRAME": _frame,
    "MARK": _mark,
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.items(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "LIST": _collect(list),
    "TUPLE": _collect(tuple),
    "DICT": _dict,
    **{f"TUPLE{count}": _tuple_of(count) for count in (1, 2, 3)},
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.items()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.items()),
    # Memo: PUT carries an index, MEMOIZE takes the next one
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, index: machine.put(index)),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.stack.append(machine.memo[index])),
    "GLOBAL": lambda machine, names: machine.name(names.replace(" ", ".")),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
    "BINPERSID": _persistent,
}
# pickletools knows the argument that follows each code
_BY_CODE = {
    opcode.code.encode("latin-1"): (_OPERATIONS[opcode.name], opcode.arg)
    for opcode in pickletools.opcodes
    if opcode.name in _OPERATIONS
}


# The meaning of names: functions (machine, arguments) -> stand-in for the result of the call.


def _ordered(machine: _Machine, arguments: tuple) -> _Dict:
    """Check `OrderedDict()`; Python 2 wrote `OrderedDict([[key, value], ...])`."""
    table = _Dict(ordered=True)
    if arguments:
        (pairs,) = arguments if len(arguments) == 1 else (None,)
        if not isinstance(pairs, list):
            raise Flaw("an ordered dict that is not made of pairs")

        machine.spend(len(pairs))
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise Flaw("an ordered dict that is not made of pairs")
            machine.set_items(list(pair), table)
    return table


def _counter(machine: _Machine, arguments: tuple) -> _Dict:
    """Check `Counter({...})`, the milestones of a schedule."""
    (counts,) = arguments if len(arguments) == 1 else (_Dict(),)
    if not isinstance(counts, _Dict):
        raise Flaw("a counter that is not made of a dict")
    machine.spend(counts.count)
    return _Dict(counts.count)


def _set(machine: _Machine, arguments: tuple) -> _Thing:
    """Check `set([...])` of plain values."""
    (values,) = arguments if len(arguments) == 1 else ([],)
    if not isinstance(values, list):
        raise Flaw("a set that is not made of a list")
    machine.spend(len(values))
    for value in values:
        machine.check_key(value)
    return _Thing("plain")


def _plain_call(machine: _Machine, arguments: tuple) -> _Thing:
    """Check a call with a few plain values, for a device or a size."""
    values = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple | list) else arguments
    if len(values) > MOST_AXES or not all(value is None or isinstance(value, int | float | str) for value in values):
        raise Flaw("a call with something other than plain values")
    return _Thing("plain")


def _encode(machine: _Machine, arguments: tuple) -> _Thing:
    """Check `encode(text, "latin1")`, which is how protocol 2 writes bytes. Other codecs may take for ever."""
    text = arguments[0] if arguments else None
    if not isinstance(text, str | _Long) or not _says_latin1(arguments[1:]):
        raise Flaw("bytes that are not written as latin1")
    machine.take(text.length if isinstance(text, _Long) else len(text))
    return _Thing("plain", key=True)


def _says_latin1(arguments: tuple) -> bool:
    """Return True for the codec latin1. Protocol 0 keeps only the length of its name; `arrays` then checks the name."""
    return len(arguments) == 1 and (arguments[0] == "latin1" or isinstance(arguments[0], _Long))


def _no_bytes(machine: _Machine, arguments: tuple) -> _Thing:
    """Check `bytes()`, which is how protocols 0 to 2 write bytes of length 0."""
    if arguments:
        raise Flaw("bytes with arguments")
    return _Thing("plain", key=True)


def _array(machine: _Machine, arguments: tuple) -> _Thing:
    """Return a stand-in. `arrays` builds the array later, within the same bounds."""
    return _Thing("array", key=True)


def _dtype(machine: _Machine, arguments: tuple) -> _Thing:
    return _Thing("dtype")


def _tensor(machine: _Machine, arguments: tuple) -> _Thing:
    """Check `_rebuild_tensor(storage, offset, size, stride, ...)`, with flags and empty hooks in later versions."""
    if len(arguments) < 4:
        raise Flaw("a tensor that is not described")

    storage, offset, size, stride, *rest = arguments
    # A storage without a type takes the dtype from the last argument
    item_size = 0 if not isinstance(storage, _Thing) or storage.kind != "storage" else storage.item_size
    dtypes = [value.item_size for value in rest if isinstance(value, _Name)]  # of a storage without a type
    rest = [value for value in rest if not isinstance(value, _Name)]
    if not item_size or len(dtypes) > 1 or 0 in dtypes or not _count(offset) or not all(map(_is_nothing, rest)):
        raise Flaw("a tensor that is not described")

    # The storage counts items of its own type, the tensor those of its dtype
    item = dtypes[0] if dtypes else item_size
    machine.take(item * _extent(storage.items * item_size // item, offset, size, stride))
    return _Thing("tensor")


def _extent(items: int, offset: int, size: object, stride: object) -> int:
    """Return the number of elements of a tensor, which must be inside a storage of `items`."""
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride):
        raise Flaw("a tensor whose shape is not described")
    if len(size) > MOST_AXES or not all(map(_count, size + stride)):
        raise Flaw("a tensor whose shape is not described")

    # The element with the highest index must be in the storage; an empty tensor has none
    number = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if number else offset - 1
    if last >= items:
        raise Flaw("a tensor that extends beyond its storage")
    return number


def _is_nothing(value: object) -> bool:
    """Return True for a flag, and for empty hooks or metadata."""
    return value is None or isinstance(value, bool) or (isinstance(value, _Dict) and value.count == 0)


def _parameter(machine: _Machine, arguments: tuple) -> _Thing:
    """Check `_rebuild_parameter(tensor, requires_grad, hooks)`."""
    if not arguments or not isinstance(arguments[0], _Thing) or arguments[0].kind != "tensor":
        raise Flaw("a parameter that is not a tensor")
    if not all(map(_is_nothing, arguments[1:])):
        raise Flaw("a parameter with hooks")
    return arguments[0]


def _named(table: Mapping[str, _Call | None]) -> dict[str, _Name]:
    return {name: _Name(name, call) for name, call in table.items()}


def _torch_names() -> dict[str, _Name]:
    names = _named(
        {
            "collections.OrderedDict": _ordered,
            "collections.Counter": _counter,
            "__builtin__.set": _set,
            "builtins.set": _set,
            "_codecs.encode": _encode,
            "torch.Size": _plain_call,
            "torch.device": _plain_call,
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_tensor_v3": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
        }
    )

    # Types are values, not functions: only the bytes of an item count
    sizes = {f"torch.{kind}": item_size for kind, item_size in _ITEM_SIZES.items()}
    sizes |= {f"torch.{kind}Storage": item_size for kind, item_size in _STORAGES.items()}
    sizes["torch.storage.UntypedStorage"] = 1
    return names | {name: _Name(name, None, item_size) for name, item_size in sizes.items()}


def _array_names() -> dict[str, _Name]:
    table: dict[str, _Call | None] = {
        "numpy.dtype": _dtype,
        "numpy.ndarray": None,
        "_codecs.encode": _encode,
        "__builtin__.bytes": _no_bytes,
        "collections.OrderedDict": _ordered,
    }
    # NumPy 2 moved its core; old files have the old names
    for package in ("numpy.core", "numpy._core"):
        table |= dict.fromkeys(
            (f"{package}.multiarray._reconstruct", f"{package}.multiarray.scalar", f"{package}.numeric._frombuffer"),
            _array,
        )
    return _named(table)


NAMES = {"torch": _torch_names(), "arrays": _array_names()}
