"""Which checkpoint a run goes on from, and whether it fits the model and the config of now.

A folder that ever held a good checkpoint always holds one (utils/checkpoint_file.py writes them). Reading walks
latest -> previous -> best to the newest that verifies, and says what it did.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.checkpoint_file import BEST, LATEST, PREVIOUS, CheckpointError, CorruptCheckpoint, load, save
from utils.faults import AgreedError, UserError

if TYPE_CHECKING:
    from utils.dist import World

__all__ = [
    "BEST",
    "LATEST",
    "PREVIOUS",
    "CheckpointError",
    "CorruptCheckpoint",
    "Found",
    "check_resume",
    "evaluated_weights",
    "file_hash",
    "find",
    "find_on_all_ranks",
    "load",
    "load_model",
    "save",
    "versions",
]

_LISTED = 8  # keys named in a message about a model that does not fit


class Found(NamedTuple):
    """What `find` chose, and the sentences for the log that say why."""

    path: Path
    state: dict[str, Any]
    messages: list[str]


def find(folder: Path) -> Found | None:
    """The newest checkpoint of a run that verifies: latest, else the newer of previous and best.

    Returns:
        None if the folder holds none of the three names: a new run.

    Raises:
        UserError: there are checkpoints and none can be read. Starting over is then the user's decision, not ours.
    """
    present = [folder / name for name in (LATEST, PREVIOUS, BEST) if os.path.lexists(folder / name)]
    if not present:
        return None
    messages: list[str] = []
    good: list[tuple[int, Path, dict[str, Any]]] = []
    for path in present:
        try:
            state = load(path)
            _check_whole(path, state)
            good.append((state["step"], path, state))
        except CorruptCheckpoint as error:
            messages.append(f"{path.name} is passed over: {error.reason}")
        if good and path.name == LATEST:
            break
    if not good:
        raise UserError(
            f"{folder}: no checkpoint can be read ({'; '.join(messages)}). Put a good one back, "
            "or start over with --fresh, which moves the old run to old/"
        )
    step, path, state = max(good, key=lambda entry: entry[0])  # of equal steps the first: previous before best
    messages += [f"{other.name} is passed over: it is older (step {at})" for at, other, _ in good if at < step]
    if path.name != LATEST and not os.path.lexists(folder / LATEST):
        messages.insert(0, f"{LATEST} is missing")
    messages.append(f"going on from {path.name}, step {step}")
    return Found(path, state, messages)


def find_on_all_ranks(folder: Path, world: World) -> Found | None:
    """`find`, decided by rank 0 and read by all, so that no two ranks go on from different files.

    Raises:
        UserError: on every rank, when rank 0 finds checkpoints and none that can be read, or a rank reads another file.
    """
    if world.size == 1:
        return find(folder)
    names = (LATEST, PREVIOUS, BEST)
    choice = torch.tensor([-1, -1], dtype=torch.int64, device=world.device)  # number of the name, step
    found: Found | None = None
    failure: UserError | None = None
    if world.is_main:
        try:
            found = find(folder)
        except UserError as error:
            failure, choice[0] = error, -2
        if found:
            choice[0], choice[1] = names.index(found.path.name), found.state["step"]
    number, step = world.broadcast_(choice).tolist()
    if failure:
        raise failure
    if number == -2:
        raise AgreedError(f"{folder}: rank 0 finds no checkpoint that can be read")
    if number >= 0 and not world.is_main:
        path = folder / names[number]
        found = Found(path, load(path), [])
        if found.state.get("step") != step:
            raise UserError(
                f"{path}: rank 0 reads step {step}, this rank {found.state.get('step')}: not one file system"
            )
    return found


def load_model(model: nn.Module, state_model: Mapping[str, Tensor], path: Path | str) -> None:
    """Put the weights of a checkpoint into `model`; all of them, or none and a sentence that says which differ.

    Args:
        model: the bare model (not wrapped by DDP).
        state_model: the checkpoint's ``model`` entry.
        path: where it came from, for the message.

    Raises:
        UserError: keys or shapes differ.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_model]
    unknown = [key for key in state_model if key not in own]
    reshaped = [key for key in own if key in state_model and own[key].shape != state_model[key].shape]
    if not (missing or unknown or reshaped):
        model.load_state_dict(dict(state_model))
        return
    heads = {(state_model[key].shape[:1], own[key].shape[:1]) for key in reshaped}
    same_rest = all(state_model[key].shape[1:] == own[key].shape[1:] for key in reshaped)
    if not missing and not unknown and same_rest and len(heads) == 1:
        ((theirs, ours),) = heads
        raise UserError(
            f"{path}: trained with num_class: {theirs[0]}, this model has num_class: {ours[0]} "
            f"({', '.join(reshaped[:_LISTED])}); a new task starts from these weights with model.pretrained: FILE"
        )
    shapes = [f"{key} {tuple(state_model[key].shape)} in the file, {tuple(own[key].shape)} here" for key in reshaped]
    parts = [
        _listed("missing in the file", missing),
        _listed("not in the model", unknown),
        _listed("another shape", shapes),
    ]
    raise UserError(f"{path}: weights of another model; " + "; ".join(part for part in parts if part))


def evaluated_weights(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors with which a run validated, and which evaluation therefore takes.

    Args:
        state: a checkpoint.

    Returns:
        The ``model`` entry, or with `ema` the average of the weights; with the recomputed batch-norm statistics where
        precise batch norm made some at this very step. And a sentence for the log that says which.
    """
    averaged, statistics = state.get("ema"), state.get("precise_bn")
    said = "moving average of the weights" if averaged else "weights as trained (no moving average)"
    config = state.get("config")
    config = config if isinstance(config, Mapping) else {}
    if averaged and config.get("ema"):
        said += f" (decay {config['ema']:g})"
    wanted = (config.get("precise_bn") or {}).get("batches")
    if statistics:
        said += f", batch-norm statistics averaged over {wanted} batches"
    elif wanted:
        said += ", running batch-norm statistics (this step was not one of precise_bn)"
    return {**(averaged or state["model"]), **(statistics or {})}, said


def check_resume(
    state: Mapping[str, Any],
    differences: Iterable[tuple[str, object, object, bool]],
    lists: Mapping[str, str] | None = None,
    kernel: str | None = None,
) -> list[str]:
    """Decide whether a run may go on with a config that was changed.

    Args:
        state: the checkpoint.
        differences: (key, value in the checkpoint, value now, whether it leaves the meaning of the run as it was), as
            `utils.config.differences` gives them.
        lists: sha256 of the lists of now, by the names of the checkpoint's ``lists``: a list may move, not change.
        kernel: name of the resize kernel of now; a checkpoint from before it was kept (``resize``) has the same.

    Returns:
        Lines for the log, one for each change that is allowed.

    Raises:
        UserError: lists the changes that are not.
    """
    changes = list(differences)
    known = state.get("lists", {})
    moved = [key for key, value in (lists or {}).items() if known.get(key) != value]
    changes += [(f"{key}_source", "this list", "other content", False) for key in moved]
    resize = state.get("resize", kernel)
    changes += [("the resize kernel of the readers", resize, kernel, False)] if kernel and resize != kernel else []
    refused = [f"  {key}: {old!r} -> {new!r}" for key, old, new, free in changes if not free]
    if refused:
        raise UserError(
            f"the config has changed what this run means (it stands at step {state.get('step')}):\n"
            + "\n".join(refused)
            + "\nUndo the change to go on, or start over with --fresh, which moves the old run to old/"
        )
    return [f"config: {key}: {old!r} -> {new!r} (allowed on resume)" for key, old, new, _ in changes]


def versions() -> dict[str, str]:
    """What a checkpoint says about the software that wrote it."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# What a run takes from a checkpoint without asking: each key with the types that it may have.
_NEEDED: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "validated_step": (int,),
    "best_prec1": (float, int),
    "window": (dict,),
    "shards": (int,),
    "model": (dict,),
    "optimizer": (dict,),
    "scaler": (dict,),
    "group_statistics": (Tensor, type(None)),
    "config": (dict,),
    "lists": (dict,),
}


def _check_whole(path: Path, state: Mapping[str, Any]) -> None:
    """CorruptCheckpoint if a run cannot go on from this: another program's file, or one that was cut down."""
    needed = dict(_NEEDED)
    config = state.get("config")
    config = config if isinstance(config, Mapping) else {}
    second = config.get("distill")
    second = second if isinstance(second, Mapping) else {}
    mutual = second.get("kind") == "dml"
    if config.get("ema"):
        needed["ema"] = (dict,)
    if second.get("teacher"):
        needed |= {"distill": (dict,)} | ({"peer": (dict,)} if mutual else {})
    missing = [key for key in needed if key not in state]
    odd = [key for key in needed if key in state and not _is_a(state[key], needed[key])]
    odd += [key for key in ("model", "ema", "peer") if key in needed and key in state and not _is_weights(state[key])]
    odd += [key for key, least in (("step", 0), ("shards", 1)) if key not in [*missing, *odd] and state[key] < least]
    if "distill" in needed and not odd + missing and ("model" if mutual else "weights_hash") not in state["distill"]:
        odd.append("distill")
    if not odd + missing and not all(isinstance(values, list) for values in state["window"].values()):
        odd.append("window")
    if missing or odd:
        wrong = [_listed("it has no", missing), _listed("not what a run writes", list(dict.fromkeys(odd)))]
        raise CorruptCheckpoint(
            path, f"{'; '.join(text for text in wrong if text)}: no checkpoint that a training run can go on from"
        )


def _is_a(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _is_weights(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f", ... {len(keys)} in all" if len(keys) > _LISTED else ""
    return f"{what}: {', '.join(keys[:_LISTED])}{more}"
