"""Hugging Face folders: `config.json` and `*.safetensors`, read and written. Nothing in a folder is run.

A folder that asks for code (`auto_map`), brings some (`*.py`), or has pickled weights only, is refused. Before a network
is built, its size follows from the tensors in the files, and the config must agree.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from methods.interop._config import HfConfig, read_json
from methods.interop._names import Converted
from utils import files, weights_file
from utils.faults import UserError, listed

CONFIG, WEIGHTS, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
FAMILIES = {"videomae": "videomae", "vjepa2": "vjepa2"}  # model_type: file of methods/interop
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
_CARD_BYTES = 1 << 20
_MOST_SHARDS = 10_000
_LABELLED = re.compile(r"^(license|license_name):\s*['\"]?([\w.+-]{1,60})['\"]?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class HfFolder:
    """What a Hugging Face folder holds.

    Attributes:
        path: the folder.
        family: name of the file of methods/interop that knows its names.
        config: the values of config.json.
        tensors: under the folder's names.
        converted: under ours.
        model: arguments of `methods.build`; `num_class` is missing where there is no classifier.
        needs: of these the ones that change logits but no tensor, as text.
        labels: class names in the order of the classifier's rows; None if the folder does not say.
        side: height and width of the frames that it was trained on, pixels.
        licence: as its card says, in lower case; else that of the published weights of its family.
        stated: whether the card says it.
        about: its name, and front matter and title of its card, in which the training data may be named.
    """

    path: Path
    family: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    converted: Converted
    model: dict[str, Any]
    needs: dict[str, str]
    labels: list[str] | None
    side: int
    licence: str
    stated: bool
    about: str


def is_folder(path: Path) -> bool:
    """Return True for a Hugging Face folder. An experiment has a config.yaml."""
    return (path / CONFIG).is_file() and not (path / "config.yaml").exists()


def files_of(path: Path) -> list[Path]:
    """Return the files of a folder that decide its logits, in a fixed order.

    Raises:
        UserError: there is no config.json, or no safetensors file.
    """
    return [path / CONFIG, *_shards(path)]


def digest(path: Path) -> str:
    """Return the sha256 of a weights file; of a folder that of the hashes of its files."""
    if not path.is_dir():
        return files.sha256(path)
    return hashlib.sha256("".join(files.sha256(file) for file in files_of(path)).encode()).hexdigest()


def read_folder(path: Path) -> HfFolder:
    """Read and check a folder.

    Raises:
        UserError: it asks for code, is damaged, contradicts itself, or is of another kind of network.
    """
    values = read_json(path / CONFIG)
    _refuse_code(path, values)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{path / CONFIG}: model_type is {kind!r:.60}, and folders of {', '.join(FAMILIES)} can be read")
    family = importlib.import_module(f"methods.interop.{FAMILIES[kind]}")
    tensors: dict[str, Tensor] = {}
    for file, names in _shards(path).items():
        found = weights_file.read(file)
        if names is not None and names != found.keys():
            raise UserError(f"{file}: its tensors are not those that {path / INDEX} names; take another copy of both")
        tensors |= found
    if not family.is_hf(tensors):
        raise UserError(f"{path}: its tensors ({', '.join(list(tensors)[:3])}) have other names than a {kind} folder's")
    config = HfConfig(path / CONFIG, values)
    converted = family.to_ours(tensors)
    model, labels = family.arguments(config, converted.state), config.labels()
    classifier = converted.state.get("classifier.weight")
    if classifier is not None:
        model["num_class"] = len(classifier)
        config.agree({"classes": len(classifier)}, **({"classes": len(labels)} if labels else {}))
    card = _card(path)
    licence = next((match[2].lower() for match in _LABELLED.finditer(card) if match[2].lower() != "other"), "")
    return HfFolder(
        path=path,
        family=FAMILIES[kind],
        config=values,
        tensors=tensors,
        converted=converted,
        model=model,
        needs=converted.needs | family.needs(config, converted.state),
        labels=labels if classifier is not None else None,
        side=family.side(config),
        licence=licence or family.LICENCE,
        stated=bool(licence),
        about=" ".join((path.resolve().name, str(values.get("_name_or_path", ""))[:200], card)),
    )


def _refuse_code(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a folder that brings code or asks for it."""
    asks = [key for key in ("auto_map", "custom_pipelines") if values.get(key)]
    brings = sorted(name for name in os.listdir(path) if name.endswith((".py", ".so", ".pyc")))
    if asks or brings:
        what = f"{asks[0]} in its {CONFIG} asks for code to be run" if asks else f"it brings code ({brings[0]:.60})"
        raise UserError(
            f"{path}: {what}, which is never done here; name the weights file in it instead, or a folder of plain "
            "config.json and safetensors"
        )


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """Return the weights files of a folder, each with the names of its tensors if the index says them."""
    index, single = path / INDEX, path / WEIGHTS
    if os.path.lexists(index) and os.path.lexists(single):
        raise UserError(f"{path} holds both {WEIGHTS} and {INDEX}; remove the one that is not meant")
    if not os.path.lexists(index):
        if not os.path.lexists(single):
            pickled = sorted(name for name in os.listdir(path) if name.endswith(_PICKLED))
            found = f"; {pickled[0]:.60} is not read: loading it could run code" if pickled else ""
            raise UserError(f"{path} holds no {WEIGHTS}{found}; take the folder's safetensors file")
        return {single: None}
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index}: it has no weight_map of tensor names and file names; take another copy of it")
    shards: dict[Path, set[str] | None] = {}
    for tensor, name in table.items():
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name) or len(shards) > _MOST_SHARDS:
            raise UserError(f"{index}: {name!r:.100} is not the name of a safetensors file beside it")
        held = shards.setdefault(path / name, set())
        assert held is not None
        held.add(tensor)
    return shards


def _card(path: Path) -> str:
    """Return the front matter and the title of the folder's README.md; "" if there is none."""
    file = path / CARD
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        text = opened.read(_CARD_BYTES).decode("utf-8", "replace")
    front = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    title = re.search(r"^# (.{1,200})$", text, re.MULTILINE)
    return "\n".join(match[1] for match in (front, title) if match)


def write_folder(
    out: Path,
    *,
    family: str,
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    labels: list[str],
    carried: Mapping[str, Tensor],
    extra: Mapping[str, Any],
) -> None:
    """Write config.json and model.safetensors into an empty folder.

    Args:
        out: the folder.
        family: "videomae" or "vjepa2".
        state: a state dict of ours.
        facts: what tensors do not show; see `videomae.written`.
        labels: class names.
        carried: tensors beside the network's own, under the folder's names.
        extra: more keys of config.json.
    """
    from safetensors.torch import save_file

    module = importlib.import_module(f"methods.interop.{family}")
    from methods.interop import _vit

    tensors = _vit.to_theirs(state, module.table(state)) | {name: tensor.clone() for name, tensor in carried.items()}
    config = {
        "architectures": [module.ARCHITECTURE],
        "model_type": module.MODEL_TYPE,
        **module.written({**facts, "carried": carried}),
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
        "dtype": "float32",
        "torch_dtype": "float32",
        **extra,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def misfits(state: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> str:
    """Return what keeps tensors of a folder from filling a network; "" if nothing does.

    Args:
        state: under our names.
        shapes: state dict of the network that it describes, on the meta device.
    """
    inner = {name: tensor for name, tensor in shapes.items() if name.startswith("backbone.")}
    lacking = [name for name in inner if name not in state]
    other = [name for name, tensor in state.items() if name in shapes and shapes[name].shape != tensor.shape]
    return "; ".join(filter(None, (listed("missing", lacking), listed("another shape", other))))
