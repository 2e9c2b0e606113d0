"""Read and write Hugging Face folders: `config.json` and `*.safetensors`. Nothing in a folder is run.

A folder is refused if it asks for code (`auto_map`), contains code (`*.py`), or has pickled weights only. The size of a
network follows from the tensors in the files before it is built, and the config must agree.
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

from torch import Tensor

from methods.interop import _vit
from methods.interop._config import HfConfig, read_json
from methods.interop._files import digest_of
from methods.interop._names import Converted, Options
from utils import weights_file
from utils.errors import UserError, listed

CONFIG, WEIGHTS, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
FAMILIES = {"videomae": "videomae", "vjepa2": "vjepa2"}  # {model_type: file of methods/interop}
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack")
_CARD_BYTES = 1 << 20  # of a card, whose front matter and title come first
_MOST_SHARDS = 10_000  # more are damage, or an attack
# lines of a card's front matter
_LABELLED = re.compile(r"^(license|license_name):\s*['\"]?([\w.+-]{1,60})['\"]?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class HfFolder:
    """Hold what a Hugging Face folder contains.

    Attributes:
        path: the folder.
        family: the file of methods/interop for its names.
        config: the values of config.json.
        tensors: under the folder's names.
        converted: the same under our names.
        model: arguments of `methods.build`; `num_class` is missing if there is no classifier.
        needs: those of them that change logits but no tensor, as text.
        labels: class names in the order of the classifier's rows; None if the folder does not name them.
        side: height and width of the frames that it was trained on, pixels.
        licence: licence on its card, in lower case; else that of the published weights of its family.
        stated: True if the card states the licence.
        about: its name, and front matter and title of its card, which may name the training data.
    """

    path: Path
    family: str
    config: Options
    tensors: dict[str, Tensor]
    converted: Converted
    model: Options
    needs: dict[str, str]
    labels: list[str] | None
    side: int
    licence: str
    stated: bool
    about: str


def is_folder(path: Path) -> bool:
    """Return True for a Hugging Face folder; an experiment has a config.yaml and is not one."""
    return (path / CONFIG).is_file() and not (path / "config.yaml").exists()


def files_of(path: Path) -> list[Path]:
    """Return the files of a folder that decide its logits, in a fixed order.

    Raises:
        UserError: there is no config.json, or no safetensors file.
    """
    return [path / CONFIG, *_shards(path)]


def digest(path: Path) -> str:
    """Return the sha256 of a weights file, or for a folder that of the hashes of its files."""
    if not path.is_dir():
        return digest_of(path)
    return hashlib.sha256("".join(digest_of(file) for file in files_of(path)).encode()).hexdigest()


def read_folder(path: Path) -> HfFolder:
    """Read and check a folder.

    Raises:
        UserError: it asks for code, is damaged, contradicts itself, or is of a different kind of network.
    """
    # code first: no tensor is read if the folder asks for it
    values = read_json(path / CONFIG)
    _refuse_code(path, values)

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{path / CONFIG}: model_type is {kind!r:.60}, and folders of {', '.join(FAMILIES)} can be read"
        )

    # All tensors of all shards, under the names that the index promises.
    family = importlib.import_module(f"methods.interop.{FAMILIES[kind]}")
    tensors: dict[str, Tensor] = {}
    for file, names in _shards(path).items():
        shard = weights_file.read(file)
        if names is not None and names != shard.keys():
            raise UserError(f"{file}: its tensors are not those that {path / INDEX} names; get another copy of both")
        tensors |= shard

    if not family.is_hf(tensors):
        raise UserError(f"{path}: its tensors ({', '.join(list(tensors)[:3])}) have other names than a {kind} folder's")

    config = HfConfig(path / CONFIG, values)
    # the config must agree with the tensors, which decide the size of the network
    converted = family.to_ours(tensors)
    model, labels = family.arguments(config, converted.state), config.labels()
    classifier = converted.state.get("classifier.weight")
    if classifier is not None:
        model["num_class"] = len(classifier)
        config.agree({"classes": len(classifier)}, **({"classes": len(labels)} if labels else {}))

    card = _card(path)
    # "license: other" is followed by the licence's name in another line
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


def _refuse_code(path: Path, values: Options) -> None:
    """Refuse a folder that contains code or asks for it."""
    asks = [key for key in ("auto_map", "custom_pipelines") if values.get(key)]
    brings = sorted(name for name in os.listdir(path) if name.endswith((".py", ".so", ".pyc")))
    if asks or brings:
        what = f"{asks[0]} in its {CONFIG} asks for code to be run" if asks else f"it contains code ({brings[0]:.60})"
        raise UserError(
            f"{path}: {what}, which is never done here; name the weights file in it instead, or a folder of plain "
            "config.json and safetensors"
        )


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """Return the weights files of a folder, each with the names of its tensors if the index lists them."""
    index, single = path / INDEX, path / WEIGHTS
    # the two may differ, and nothing shows which one is meant
    if os.path.lexists(index) and os.path.lexists(single):
        raise UserError(f"{path} holds both {WEIGHTS} and {INDEX}; remove the one that is not meant")

    if not os.path.lexists(index):
        if not os.path.lexists(single):
            pickled = sorted(name for name in os.listdir(path) if name.endswith(_PICKLED))
            hint = f"; {pickled[0]:.60} is not read: loading it could run code" if pickled else ""
            raise UserError(f"{path} holds no {WEIGHTS}{hint}; use the folder's safetensors file")
        return {single: None}

    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise UserError(f"{index}: it has no weight_map of tensor names and file names; get another copy of it")

    shards: dict[Path, set[str] | None] = {}
    for tensor, name in table.items():
        # a plain name: a path could lead out of the folder
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise UserError(f"{index}: {name!r:.100} is not the name of a safetensors file next to it")
        if len(shards) > _MOST_SHARDS:
            raise UserError(f"{index}: it names more than {_MOST_SHARDS:,} files; get another copy of it")
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
    arch: _vit.Architecture,
    labels: list[str],
    carried: Mapping[str, Tensor],
    extra: Options,
) -> None:
    """Write config.json and model.safetensors into an empty folder.

    Args:
        out: the folder.
        family: "videomae" or "vjepa2".
        state: one of our state dicts.
        arch: the values for config.json.
        labels: class names.
        carried: tensors in addition to those of the network, under the folder's names.
        extra: more keys of config.json.
    """
    from safetensors.torch import save_file

    module = importlib.import_module(f"methods.interop.{family}")
    tensors = _vit.to_theirs(state, module.table(state)) | {name: tensor.clone() for name, tensor in carried.items()}

    config = {
        "architectures": [module.ARCHITECTURE],
        "model_type": module.MODEL_TYPE,
        **module.written(arch),
        "id2label": {str(number): name for number, name in enumerate(labels)},
        "label2id": {name: number for number, name in enumerate(labels)},
        # transformers renamed `torch_dtype`: both versions read one of these
        "dtype": "float32",
        "torch_dtype": "float32",
        **extra,
    }

    (out / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def misfits(state: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> str:
    """Return why tensors of a folder cannot fill a network; "" if they can.

    Args:
        state: under our names.
        shapes: state dict of the network that the folder describes, on the meta device.
    """
    inner = {name: tensor for name, tensor in shapes.items() if name.startswith("backbone.")}
    lacking = [name for name in inner if name not in state]
    other = [name for name, tensor in inner.items() if name in state and state[name].shape != tensor.shape]
    return "; ".join(filter(None, (listed("missing", lacking), listed("a different shape", other))))
