"""Fuzz target: Hugging Face folders, from their files to the network that they describe.

An input holds the files of a folder: config.json, the index, two weights files (the second only with an index) and the
card, each behind its length. The mutators change values of the JSON files, tensors and headers of the weights files, or
plain bytes, and put the folder together again.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import methods
from methods.interop import hf
from tests import hf_folders
from tests.fuzz import weights
from tests.fuzz.mutators import NUMBERS
from utils.errors import UserError

NAME = "hf_folders"
MODULES = ["methods/interop/hf.py", "methods/interop/_config.py", "methods/interop/_vit.py"]
FILES = ("config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors", "README.md")
CARD = b"---\nlicense: cc-by-nc-4.0\nlicense_name: x\n---\n# Trained on Kinetics-710\n"
SMALL = {
    "videomae": {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "patch_size": 2},
    "vjepa2": {"hidden_size": 16, "num_attention_heads": 2, "mlp_ratio": 1.5, "patch_size": 2, "pred_hidden_size": 4},
}
_VALUES: tuple[Any, ...] = (
    *NUMBERS, 0.0, -1.5, 1e-300, 1e308, float("nan"), float("inf"), "", "x" * 3000, "\ud800", "gelu", "videomae",
    "vjepa2", "../a.safetensors", "/etc/passwd", "modeling.py", True, False, None, [], {}, [16, 16], [1] * 1000,
    {"0": "a"}, {"AutoModel": "modeling.Evil"}, [[[[[[]]]]]],
)  # fmt: skip
_KEYS = ("auto_map", "custom_pipelines", "qv_bias", "hidden_size", "id2label", "num_channels", "\udfff", "", "a" * 500)


@functools.cache
def seeds() -> list[bytes]:
    """Return folders of both networks, whole and in two parts, with and without classifier."""
    inputs = []
    with tempfile.TemporaryDirectory() as work:
        for kind, small in SMALL.items():
            config = hf_folders.KINDS[kind] | small
            state = hf_folders.tensors(kind, config)
            bare = {name: tensor for name, tensor in state.items() if not name.startswith(("classifier", "pooler"))}
            for number, (tensors, shards) in enumerate(((state, 1), (state, 2), (bare, 1))):
                folder = Path(work) / f"{kind}{number}"
                hf_folders.write(folder, kind, state=tensors, shards=shards, labels=list("abcde"), **small)
                names = sorted(folder.glob("*.safetensors"))
                index = folder / hf.INDEX
                text = index.read_text() if index.exists() else ""
                for place, name in enumerate(names, 1):
                    text = text.replace(name.name, f"model-{place}.safetensors")
                parts = [(folder / "config.json").read_bytes(), text.encode(), *(name.read_bytes() for name in names)]
                inputs.append(_joined([*parts, *[b""] * (4 - len(parts)), CARD]))
    return inputs


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Return a damaged copy of an input."""
    parts = _parts(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.choice((0, 0, 0, 1, 2, 2, 3, 4))
        if not parts[place]:
            place = 0
        changes: dict[int, Callable[[random.Random, bytes], bytes]] = {0: _json_changed, 1: _json_changed}
        change = changes.get(place, weights._header_changed if place < 4 else weights._bytes_changed)
        if rng.random() < 0.05:
            change = weights._bytes_changed
        try:
            parts[place] = change(rng, parts[place])
        except (ValueError, KeyError, TypeError, IndexError, UnicodeError):  # what an earlier change broke
            parts[place] = weights._bytes_changed(rng, parts[place])
    if rng.random() < 0.02:
        parts[1], parts[3] = rng.choice(((b"", parts[3]), (b"{}", parts[3]), (parts[1], b"")))
    return _joined(parts)


def run(data: bytes, folder: Path) -> str:
    """Build the network of a folder as `methods.from_pretrained` does."""
    place = folder / "given"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    parts = _parts(data)
    names = [*FILES] if parts[1] else [FILES[0], FILES[1], hf.WEIGHTS, FILES[3], FILES[4]]
    for name, part in zip(names, parts, strict=True):
        if part:
            (place / name).write_bytes(part)
    try:
        model = methods.from_pretrained(place, num_class=5)
    except UserError as error:
        if not str(error) or "\n" in str(error):
            raise AssertionError(f"not one sentence: {error}") from error
        return "refused" if _is_json(parts[0]) else "stage0"
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size > 8 * len(data) + (1 << 20):
        raise AssertionError(f"a network of {size} bytes from a folder of {len(data)}")
    return "ok"


def _is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def _joined(parts: list[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def _parts(data: bytes) -> list[bytes]:
    """Return the files in an input; what is missing at its end is empty."""
    parts, at = [], 0
    for _ in FILES:
        length = int.from_bytes(data[at : at + 4], "little")
        parts.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return parts


def _json_changed(rng: random.Random, data: bytes) -> bytes:
    """Change, remove or add a value of a JSON object, or of one in it."""
    values = json.loads(data)
    inner = [values, *(value for value in values.values() if isinstance(value, dict) and value)]
    chosen = rng.choice(inner)
    key = rng.choice(list(chosen))
    kind = rng.randrange(5)
    if kind == 0:
        del chosen[key]
    elif kind == 1:
        chosen[rng.choice(_KEYS)] = rng.choice(_VALUES)
    elif kind == 2 and type(chosen[key]) in (int, float):
        chosen[key] = rng.choice((chosen[key] + 1, chosen[key] * 2, chosen[key] - 1, -chosen[key], str(chosen[key])))
    elif kind == 3 and isinstance(chosen[key], dict):
        chosen[key] |= {str(number): "c" for number in range(rng.choice((1, 7, 2000)))}
    else:
        chosen[key] = rng.choice(_VALUES)
    return json.dumps(values).encode()
