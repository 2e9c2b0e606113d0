"""Choose the checkpoint from which a run resumes, and check that it fits the current model and config.

A folder that ever held a good checkpoint always holds one (utils/checkpoint_file.py writes them). Reading tries
latest, previous and best, takes the newest that verifies, and reports why it skipped others.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.checkpoint_file import (
    BEST,
    LATEST,
    PREVIOUS,
    CheckpointContent,
    CheckpointError,
    CorruptCheckpoint,
    load,
    peek,
    save,
)
from utils.checkpoint_names import kept_name, publish, split_name
from utils.checkpoint_names import present as present_names
from utils.errors import AgreedError, UserError, listed
from utils.version import VERSION

if TYPE_CHECKING:
    from utils.dist import World
    from utils.run_dir import RunDir

__all__ = [
    "BEST",
    "LATEST",
    "PREVIOUS",
    "CheckpointError",
    "CorruptCheckpoint",
    "ResumePoint",
    "check_resume",
    "evaluated_weights",
    "find",
    "find_on_all_ranks",
    "load",
    "load_model",
    "newest",
    "save",
    "take_over",
    "versions",
]

_LISTED = 8  # keys named in a message about a model that does not fit


Check = Callable[[Path, CheckpointContent], object]


def _accept(path: Path, state: CheckpointContent) -> None:
    """Accept any checkpoint that can be read."""


class ResumePoint(NamedTuple):
    """The checkpoint that `find` chose, and the log lines that explain the choice."""

    path: Path
    state: CheckpointContent
    messages: list[str]


def find(folder: Path, check: Check = _accept) -> ResumePoint | None:
    """Find the newest checkpoint of a run that verifies: the highest (token, step) of latest, previous and best.

    Among equals the order is latest, previous, best. docs/cluster.md explains tokens. Names that a start keeps for
    itself (`kept`) count like the plain name.

    Args:
        folder: an experiment folder.
        check: called with (path, state); raises CorruptCheckpoint if a run cannot resume from it.

    Returns:
        None if the folder holds none of the names: a new run.

    Raises:
        UserError: there are checkpoints but none can be read. Only the user may decide to start over.
    """
    present = present_names(folder, LATEST, PREVIOUS, BEST)
    if not present:
        return None
    for path in present:
        _require_access(path)

    # `peek` reads no tensors, so that only the chosen file is read in full.
    orders = {path: peek(path) for path in present}
    states: dict[Path, CheckpointContent] = {}
    reasons: dict[Path, str] = {}

    def is_good(path: Path) -> bool:
        """Return True if a checkpoint can be loaded; keep its state, or the reason why it cannot."""
        try:
            state = load(path)
            check(path, state)
            for name, value in (("step", state.get("step")), ("token", state.get("token", 0))):
                if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                    raise CorruptCheckpoint(path, f"its {name} is not a count: no run can resume from it")
        except CorruptCheckpoint as error:
            reasons[path] = error.reason
            return False
        states[path], orders[path] = state, (state.get("token", 0), state["step"])
        return True

    # A file that cannot be ranked by its table of contents is read in full: it may still be a good one.
    for path in [path for path, order in orders.items() if order is None]:
        is_good(path)
    ranked = sorted((path for path in present if orders[path]), key=lambda path: orders[path] or (), reverse=True)
    chosen = next((path for path in ranked if path in states or is_good(path)), None)

    # Never start over silently: that would overwrite what may still be repaired.
    if chosen is None:
        failures = "; ".join(f"{path.name} is skipped: {reason}" for path, reason in reasons.items())
        raise UserError(
            f"{folder}: no checkpoint can be read ({failures}). Put a good one back, "
            "or start over with --fresh, which moves the old run to old/"
        )

    messages = _passed_over(present, chosen, orders, reasons)
    messages.append(f"resuming from {chosen.name}, step {states[chosen]['step']}")
    return ResumePoint(chosen, states[chosen], messages)


def _require_access(path: Path) -> None:
    """Raise a UserError for a file that may not be opened now, so that no older checkpoint takes its place."""
    if not path.is_file():
        return  # `load` reports what is wrong with it

    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); nothing was changed") from error


def _passed_over(
    present: list[Path], chosen: Path, orders: Mapping[Path, tuple[int, int] | None], reasons: Mapping[Path, str]
) -> list[str]:
    """Return the log lines that explain why `find` skipped the files that a reader would have expected."""
    if chosen.name == LATEST:
        return [f"{path.name} is skipped: {reasons[path]}" for path in reasons if split_name(path.name)[1]]

    lines = [] if os.path.lexists(chosen.with_name(LATEST)) else [f"{LATEST} is missing"]
    token, step = orders[chosen] or (0, 0)

    for path in present:
        order = orders[path]
        if path in reasons:
            lines.append(f"{path.name} is skipped: {reasons[path]}")
        elif order and order < (token, step):
            earlier = f", of start {order[0]} and not {token}" if order[0] < token else ""
            lines.append(f"{path.name} is skipped: it is older (step {order[1]}{earlier})")

    return lines


def newest(folder: Path, name: str) -> Path | None:
    """Return the file to open for the best or the latest checkpoint of a folder.

    The highest (token, step) wins: for BEST among the best checkpoint and its kept names, for LATEST among all files
    that `find` considers. A file with the plain name that cannot be ranked is returned too: its reader then reports
    what is wrong, instead of a silent choice of another file.

    Args:
        folder: an experiment folder.
        name: BEST or LATEST.

    Returns:
        None if there is no file of that name.
    """
    named = folder / name
    files = present_names(folder, name)

    if name == LATEST and files:
        files += present_names(folder, PREVIOUS, BEST)
    if len(files) < 2:
        return files[0] if files else None

    orders = {path: peek(path) for path in files}
    if named in orders and orders[named] is None:
        return named
    return max(files, key=lambda path: orders[path] or (-1, -1))


def take_over(run_dir: RunDir, resume_from: ResumePoint | None, *, fresh: bool) -> None:
    """Take over an experiment folder for this start, once config, lists and weights have been checked.

    Takes the token: from here on no earlier start can hide what this one finds or writes.

    Args:
        run_dir: the folder, locked.
        resume_from: the checkpoint to resume from. None: an old run is moved away.
        fresh: move everything, not only the reports on bad samples.

    Raises:
        UserError: the folder cannot be written, or another process has taken it.
    """
    run_dir.enter(above=resume_from.state.get("token", 0) if resume_from else 0)
    if resume_from is None:
        run_dir.move_to_old(everything=fresh)
        return

    keep = run_dir.has_predecessor
    try:
        for name, source in ((LATEST, resume_from.path), (BEST, newest(run_dir.exp, BEST))):
            # The newest file may have only a kept name: give it the plain one, which everyone opens.
            if source is not None and split_name(source.name)[1]:
                publish(source, run_dir.exp / name)
            if source is not None and keep:
                publish(source, run_dir.exp / kept_name(name, run_dir.token))
        run_dir.settle()
    except OSError as error:
        raise UserError(f"{error.filename or run_dir.exp}: cannot be written ({error.strerror or error})") from error


def find_on_all_ranks(folder: Path, world: World, check: Check = _accept) -> ResumePoint | None:
    """Find the checkpoint on rank 0 and read it on all ranks, so that all resume from the same file.

    Raises:
        UserError: on every rank, if rank 0 finds checkpoints but can read none, or if a rank reads another file.
    """
    if world.size == 1:
        return find(folder, check)
    names = (LATEST, PREVIOUS, BEST)
    # Index of the name (-1: no checkpoint, -2: none can be read), token of a kept name, step.
    choice = torch.tensor([-1, 0, -1], dtype=torch.int64, device=world.device)
    chosen: ResumePoint | None = None
    failure: UserError | None = None

    # Rank 0 decides. Its error is raised only after the broadcast, or the other ranks would wait for ever.
    if world.is_main:
        try:
            chosen = find(folder, check)
        except UserError as error:
            failure, choice[0] = error, -2
        if chosen:
            name, token = split_name(chosen.path.name)
            choice = torch.tensor([names.index(name), token, chosen.state["step"]], device=world.device)

    number, token, step = world.broadcast_(choice).tolist()
    if failure:
        raise failure
    if number == -2:
        raise AgreedError(f"{folder}: rank 0 finds no checkpoint that can be read")

    # The others open the same name and compare the step: on another file system it could be another file.
    if number >= 0 and not world.is_main:
        path = folder / (kept_name(names[number], token) if token else names[number])
        chosen = ResumePoint(path, load(path), [])
        if chosen.state.get("step") != step:
            raise UserError(
                f"{path}: rank 0 reads step {step}, this rank {chosen.state.get('step')}: is it the same file system?"
            )
    world.barrier()  # rank 0 may now rename what the others have read
    return chosen


def load_model(model: nn.Module, state_model: Mapping[str, Tensor], path: Path | str) -> None:
    """Load the weights of a checkpoint into `model`: either all, or none and an error that names the differences.

    Args:
        model: the bare model (not wrapped by DDP).
        state_model: the checkpoint's ``model`` entry.
        path: where it came from, for the message.

    Raises:
        UserError: keys or shapes differ.
    """
    needed = model.state_dict()
    missing = [key for key in needed if key not in state_model]
    unknown = [key for key in state_model if key not in needed]
    reshaped = [key for key in needed if key in state_model and needed[key].shape != state_model[key].shape]

    if not (missing or unknown or reshaped):
        model.load_state_dict(dict(state_model))
        return

    # Only the classifier differs, in the number of classes: the most frequent mistake gets its own message.
    heads = {(state_model[key].shape[:1], needed[key].shape[:1]) for key in reshaped}
    same_rest = all(state_model[key].shape[1:] == needed[key].shape[1:] for key in reshaped)
    if not missing and not unknown and same_rest and len(heads) == 1:
        ((theirs, ours),) = heads
        raise UserError(
            f"{path}: trained with num_class: {theirs[0]}, this model has num_class: {ours[0]} "
            f"({', '.join(reshaped[:_LISTED])}); a new task starts from these weights with model.pretrained: FILE"
        )

    shapes = [f"{key} {tuple(state_model[key].shape)} in the file, {tuple(needed[key].shape)} here" for key in reshaped]
    parts = [
        listed("missing in the file", missing, most=_LISTED),
        listed("not in the model", unknown, most=_LISTED),
        listed("a different shape", shapes, most=_LISTED),
    ]

    raise UserError(f"{path}: weights of a different model; " + "; ".join(part for part in parts if part))


def evaluated_weights(state: CheckpointContent) -> tuple[dict[str, Tensor], str]:
    """Return the tensors with which a run validated, and which evaluation therefore uses.

    Args:
        state: a checkpoint.

    Returns:
        The ``model`` entry, or with `ema` the moving average of the weights. Batch-norm statistics that precise batch
        norm recomputed at this step replace the running ones. Second, a phrase for the log that names the choice.
    """
    averaged, bn_stats = state.get("ema"), state.get("precise_bn")
    phrase = "moving average of the weights" if averaged else "weights as trained (no moving average)"

    config = state.get("config")
    config = config if isinstance(config, Mapping) else {}
    if averaged and config.get("ema"):
        phrase += f" (decay {config['ema']:g})"

    batches = (config.get("precise_bn") or {}).get("batches")
    if bn_stats:
        phrase += f", batch-norm statistics averaged over {batches} batches"
    elif batches:
        phrase += ", running batch-norm statistics (this step was not one of precise_bn)"

    # The statistics go last: they are entries of the same model and must win.
    return {**(averaged or state["model"]), **(bn_stats or {})}, phrase


def check_resume(
    state: CheckpointContent,
    differences: Iterable[tuple[str, object, object, bool]],
    lists: Mapping[str, str] | None = None,
    kernel: str | None = None,
) -> list[str]:
    """Decide whether a run may resume with a config that was changed.

    Args:
        state: the checkpoint.
        differences: (key, value in the checkpoint, value now, whether the run keeps its meaning), as
            `utils.config.differences` yields them.
        lists: sha256 of the current lists, by the names of the checkpoint's ``lists``: a list may move, not change.
        kernel: name of the current resize kernel. Older checkpoints do not store it (``resize``); theirs is the same.

    Returns:
        Log lines, one for each change that is allowed.

    Raises:
        UserError: lists the changes that are not allowed.
    """
    changes = list(differences)

    # A list is compared by content, so that a copied data set with other paths can resume.
    known = state.get("lists", {})
    moved = [key for key, value in (lists or {}).items() if known.get(key) != value]
    changes += [(f"{key}_source", "this list", "other content", False) for key in moved]

    resize = state.get("resize", kernel)
    changes += [("the resize kernel of the readers", resize, kernel, False)] if kernel and resize != kernel else []

    refused = [f"  {key}: {old!r} -> {new!r}" for key, old, new, free in changes if not free]
    if refused:
        raise UserError(
            f"the config has changed what this run means (it is at step {state.get('step')}):\n"
            + "\n".join(refused)
            + "\nUndo the change to continue, or start over with --fresh, which moves the old run to old/"
        )
    return [f"config: {key}: {old!r} -> {new!r} (allowed on resume)" for key, old, new, _ in changes]


def versions() -> dict[str, str]:
    """Return the versions of the software that writes a checkpoint."""
    return {
        "zoetrope": VERSION,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
