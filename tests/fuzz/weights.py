"""Fuzz target: weights files of every format that `utils.weights_file` reads.

The first byte of an input chooses the name of the file, the rest is its content. The mutators take an input apart (zip
members, operations of a pickle, JSON header), change a part, and put it together again with right lengths and
checksums, so that most mutants reach the code behind the first checks.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from methods import interop
from utils import checkpoint, weights_file
from utils.errors import UserError
from utils.weights_file import archive
from utils.weights_file.flaws import Flaw

NAME = "weights"
MODULES = [
    "utils/weights_file/__init__.py",
    "utils/weights_file/archive.py",
    "utils/weights_file/arrays.py",
    "utils/weights_file/opcodes.py",
    "utils/weights_file/safetensors.py",
    "methods/interop/_files.py",
]
NAMES = ("x.pth", "x.pkl", "x.pdparams", "x.safetensors", "resnet18-5c106cde.pth")  # the last one is published
NUMBERS = (
    -(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32,
    2**62, 2**63 - 1, 2**64, 10**30,
)  # fmt: skip
_GLOBALS = (
    b"posix\nsystem", b"builtins\neval", b"builtins\nbytearray", b"collections\nOrderedDict", b"collections\nCounter",
    b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter", b"torch._utils\n_rebuild_qtensor",
    b"torch\nFloatStorage", b"torch\nDoubleStorage", b"torch\nint64", b"torch\nSize", b"_codecs\nencode",
    b"numpy\ndtype", b"numpy\nndarray", b"numpy.core.multiarray\n_reconstruct", b"numpy.core.multiarray\nscalar",
    b"__builtin__\nset", b"torch\ndevice", b"functools\npartial", b"torch._utils\n_rebuild_meta_tensor_no_storage",
)  # fmt: skip
_OPERATIONS = (
    b"(", b")", b"]", b"}", b"N", b"0", b"1", b"2", b"R", b"b", b"Q", b"a", b"e", b"s", b"u", b"t", b"l", b"d", b"\x85",
    b"\x86", b"\x87", b"\x88", b"\x94", b"K\x00", b"K\xff", b"J\xff\xff\xff\x7f", b"h\x00", b"q\x00",
    b"X\x00\x00\x00\x00",
    b"r\xff\xff\xff\x0f", b"j\xff\xff\xff\x0f", b"X\xff\xff\xff\x7f", b"\x8a\x00", b"G" + bytes(8), b"C\x00", b".",
    b"}(", b"u)", b"\x85\x94", b"\x96" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"I12\n", b"L5L\n", b"F1.5\n", b"S'a'\n",
    b"Va\n", b"T\x01\x00\x00\x00a", b"p1\n", b"g1\n", b"\x8f", b"\x90", b"\x91", b"\x81", b"i", b"o", b"P1\n",
    b"\x82\x01",
)  # fmt: skip


def seeds() -> list[bytes]:
    """Return valid files of every format, a few kilobytes each."""
    torch.manual_seed(0)
    image = {
        "conv1.weight": torch.randn(4, 3, 3, 3), "bn1.running_mean": torch.zeros(4),
        "bn1.num_batches_tracked": torch.tensor(3), "layer1.0.conv1.weight": torch.randn(4, 4, 1, 1),
        "fc.weight": torch.randn(5, 4), "fc.bias": torch.randn(5).half(),
    }  # fmt: skip
    model = {"backbone.conv1.weight": torch.randn(2, 3), "classifier.weight": torch.randn(4, 2)}
    run = {
        "model": model, "ema": {key: value * 2 for key, value in model.items()}, "precise_bn": {"b": torch.ones(2)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1}]},
        "config": {"ema": 0.9, "precise_bn": {"batches": 2}, "names": ["a", None, True]}, "step": 3, "best": 1.5,
    }  # fmt: skip
    wrapped = {
        "state_dict": OrderedDict((f"module.{key}", nn.Parameter(value.float())) for key, value in image.items()),
        "meta": {"milestones": Counter({3: 1}), "size": torch.Size([1, 2]), "bytes": b"ab", "classes": {1, 2}},
        "device": torch.device("cpu"), "dtype": torch.float32,
    }  # fmt: skip
    flat = torch.randn(60)
    views = {"model_state_dict": {"a": flat[:20].view(4, 5), "b": flat[20:].view(5, 8).t(), "c": flat[:0]}}
    eighths = {"w": torch.zeros(4).to(torch.float8_e4m3fn), "v": torch.ones(3, dtype=torch.bfloat16)}
    named = {key: value.float().numpy() for key, value in image.items()}
    arrays = OrderedDict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3), f=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        b=np.arange(3, dtype=">i4"), n=np.zeros((0, 2), np.int64), s=np.float64(0.5), nested=[1, ("x", None, b"y")],
    )  # fmt: skip
    inputs = [b"\0" + _saved(value) for value in (image, run, wrapped, views, eighths)]
    inputs += [b"\0" + _saved(value, zipped=False) for value in (image, wrapped, views)]
    inputs += [b"\0" + _python2(), b"\0" + _deflated(_saved(image))]
    inputs += [b"\1" + pickle.dumps({"blobs": named}, protocol) for protocol in (0, 2, 4)]
    inputs += [b"\2" + pickle.dumps(arrays, protocol) for protocol in (0, 1, 2, 3, 4, 5)]
    return [*inputs, b"\3" + _safetensors({"fc.weight": ("F32", [2, 3]), "h": ("F16", [4]), "none": ("I64", [0])})]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Return a damaged copy of an input."""
    ending, content = data[:1], data[1:]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _changed(rng, ending, content)
    if rng.random() < 0.02:
        ending = bytes([rng.randrange(len(NAMES))])
    return ending + content


def run(data: bytes, folder: Path) -> str:
    """Read the file as `model.pretrained`, `eval` and `convert` do."""
    file = folder / NAMES[data[0] % len(NAMES)]
    file.write_bytes(data[1:])
    try:
        content = interop.content_of(file)
        if data[1:3] == b"PK":  # what can be read can be written
            weights_file.check_written(file)
            weights_file.read_archive(file)
        if weights_file.is_checkpoint(content):
            interop.check_finite(checkpoint.evaluated_weights(content)[0], file)
            return "ok"
        state = interop.tensors_of(content, file)
        interop.check_finite(state, file)
    except UserError as error:
        if not str(error) or "\n" in str(error):
            raise AssertionError(f"not one sentence: {error}") from error
        return "refused" if _past_first_stage(file) else "stage0"
    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > 8 * len(data) + (64 << 20):
            raise AssertionError(f"{name} is much larger than its file")
    try:
        interop.what_is(file)
    except UserError:  # names of no family, which are not a fault of the file
        return "ok"
    return "ok"


def _past_first_stage(file: Path) -> bool:
    """Return True if the container is whole: zip with right checksums, pickle of known operations, JSON header."""
    data = file.read_bytes()
    try:
        with file.open("rb") as opened:
            kind = weights_file.kind_of(file, opened, len(data))
            if kind == "zip":
                archive.verify(opened, archive.members(opened, len(data)))
            elif kind == "safetensors":
                length = int.from_bytes(data[:8], "little")
                json.loads(data[8 : 8 + length] if length <= len(data) else b"")
            else:
                _operations(data)
    except (Flaw, ValueError, RecursionError):
        return False
    return True


def _saved(value: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _deflated(data: bytes) -> bytes:
    return _zipped([(info.filename, content, True) for info, content in _members(data)])


def _python2() -> bytes:
    """A file as Python 2 and torch 0.3 wrote it: ordered dict of pairs, short strings, views of storages."""
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x06(U\x01vK\x01K\x04ttQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00K\x02K\x02\x86K\x02K\x01\x86tR"
    content = b"\x80\x02ccollections\nOrderedDict\n](](U\x09fc.weight" + tensor + b"ee\x85R."
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    return head + content + pickle.dumps(["0"], 2) + struct.pack("<q6f", 6, *range(6))


def _safetensors(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    sizes = {"F32": 4, "F16": 2, "I64": 8}
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + sizes[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def _changed(rng: random.Random, ending: bytes, data: bytes) -> bytes:
    """Change one part; bytes that were taken apart in vain are changed as they are."""
    if not data or rng.random() < 0.1:
        return _bytes_changed(rng, data)
    if data[:2] == b"PK" and rng.random() < 0.1:  # the directory lies at the end, a header at the start
        near = rng.randrange(1, 70) if rng.random() < 0.3 else len(data) - rng.randrange(1, min(len(data), 700))
        return data[:near] + _bytes_changed(rng, data[near : near + 1]) + data[near + 1 :]
    try:
        if ending == b"\3":
            return _header_changed(rng, data)
        if data[:2] == b"PK":
            return _archive_changed(rng, data)
        return _pickles_changed(rng, data)
    except Exception:  # noqa: BLE001  an input that a mutation before this one broke cannot be taken apart
        return _bytes_changed(rng, data)


def _bytes_changed(rng: random.Random, data: bytes) -> bytes:
    at, length = rng.randrange(len(data) + 1), rng.randrange(1, 9)
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(length) + data[at:]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * rng.randrange(2, 9) + data[at + length :]
    return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def _members(data: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return [(info, opened.read(info)) for info in opened.infolist()]


def _zipped(parts: list[tuple[str, bytes, bool]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, deflated in parts:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
            archive.writestr(info, content)
    return buffer.getvalue()


def _archive_changed(rng: random.Random, data: bytes) -> bytes:
    parts = [(info.filename, content, info.compress_type == 8) for info, content in _members(data)]
    index = next((k for k, part in enumerate(parts) if part[0].endswith("data.pkl")), 0)
    if rng.random() < 0.35:
        index = rng.randrange(len(parts))
    name, content, deflated = parts[index]
    kind = rng.randrange(10)
    if kind < 5 and name.endswith(".pkl"):
        parts[index] = (name, _pickle_changed(rng, content), deflated)
    elif kind < 7:
        parts[index] = (name, _bytes_changed(rng, content), deflated)
    elif kind == 7:
        parts[index] = (
            rng.choice((name + "0", name.upper(), "x/" + name, name[:-1], "archive/constants.pkl")),
            content,
            deflated,
        )
    elif kind == 8:
        del parts[index]
    else:
        big = b"\0" * rng.choice((1 << 12, 1 << 16, 1 << 20)) if rng.random() < 0.2 else content
        parts[index] = (name, big, not deflated)
    unique = {part[0]: part for part in parts}  # zipfile warns about two of one name
    return _zipped(list(unique.values()))


def _operations(data: bytes) -> list[bytes]:
    """Return the operations of one pickle, each with its argument; what follows STOP is the last entry."""
    buffer = io.BytesIO(data)
    begins = [at or 0 for _, _, at in pickletools.genops(buffer)]
    ends = [*begins[1:], begins[-1] + 1]
    operations = [data[begin:end] for begin, end in zip(begins, ends, strict=True)]
    return [*operations, data[ends[-1] :]]


def _pickles_changed(rng: random.Random, data: bytes) -> bytes:
    """Change one of the pickles of a file, or the storages behind them."""
    parts: list[bytes] = []
    while data and data[:1] in (b"\x80", b"(", b"}", b"c") and len(parts) < 5:
        *operations, rest = _operations(data)
        parts.append(b"".join(operations))
        data = rest
    index = rng.randrange(len(parts)) if rng.random() < 0.2 else min(3, len(parts) - 1)
    if data and rng.random() < 0.1:
        return b"".join(parts) + _bytes_changed(rng, data)
    parts[index] = _pickle_changed(rng, parts[index])
    return b"".join(parts) + data


def _pickle_changed(rng: random.Random, data: bytes) -> bytes:
    operations = _operations(data)
    at = rng.randrange(len(operations))
    other = rng.randrange(len(operations))
    kind = rng.randrange(9)
    if kind == 0:
        del operations[at]
    elif kind == 1:
        operations.insert(at, operations[other])
    elif kind == 2:
        operations[at], operations[other] = operations[other], operations[at]
    elif kind == 3:
        operations.insert(at, rng.choice(_OPERATIONS))
    elif kind == 4:
        operations[at:at] = operations[min(at, other) : max(at, other)][: rng.randrange(1, 40)] * rng.choice(
            (1, 1, 2, 20)
        )
    elif kind == 5:
        operations[at:at] = [b"\x85" * rng.randrange(1, 60)] if rng.random() < 0.3 else [b"h\x00h\x00\x86q\x00"] * 40
    elif kind == 6:
        names = [k for k, part in enumerate(operations) if part[:1] == b"c"]
        if names:
            operations[rng.choice(names)] = b"c" + rng.choice(_GLOBALS) + b"\n"
    else:
        numbers = [k for k, part in enumerate(operations) if part[:1] in (b"K", b"J", b"M", b"I")]
        if numbers:
            operations[rng.choice(numbers)] = _number(rng)
    return b"".join(operations)


def _number(rng: random.Random) -> bytes:
    value = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.randrange(300)
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _header_changed(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice(list(header))
    entry = header[name]
    kind = rng.randrange(6)
    if kind == 0:
        header[rng.choice(("", "fc.weight", "x" * 2000, "\ud800", "__metadata__"))] = header.pop(name)
    elif kind == 1 and "shape" in entry:
        entry["shape"] = rng.choice(
            ([], [rng.choice(NUMBERS)], entry["shape"] * rng.randrange(1, 70), "x", [1.5], [True])
        )
    elif kind == 2 and "shape" in entry:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif kind == 3:
        entry["dtype"] = rng.choice(("F64", "BF16", "BOOL", "U8", "F4", "", None, [1], "C64", "F8_E4M3"))
    elif kind == 4:
        header[name] = rng.choice((None, [], {}, 3, {"a": [[[[]]]]}, entry))
    else:
        rest = _bytes_changed(rng, rest)
    text = json.dumps(header).encode()
    if rng.random() < 0.05:
        text = text[:-1] + b"," + text[1:]  # entries twice
    return struct.pack("<Q", len(text)) + text + rest
