"""The content of a checkpoint: one list, `ENTRIES`, from which saving, loading and checking follow.

To add something to a checkpoint, add an entry: how to read its value from a run, how to restore it, and what a file
must hold for a run to resume. Order, augmentation, dropout and mixup are functions of (seed, step), so the step alone
restores all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils import checkpoint
from utils.checkpoint import CorruptCheckpoint
from utils.errors import UserError, listed

if TYPE_CHECKING:
    from utils.checkpoint import ResumePoint
    from utils.engine.learner import Learner

Values = Mapping[str, Any]


@dataclass
class TrainState:
    """The resumable state of a run.

    Attributes:
        learner: networks, optimiser and statistics.
        metadata: plain values that describe the run: config, classes, lists, resize, initial, code, token.
        step: finished iterations.
        validated_step: the last step whose validation was completed.
        best_metric: best value so far of `probes.criterion`, per cent; -1: never validated.
        window: the last `print_freq` values of the logged meters.
        precise_bn: (step, batch-norm statistics of the validation after it).
    """

    learner: Learner
    metadata: dict[str, Any]
    step: int = 0
    validated_step: int = -1
    best_metric: float = -1.0
    window: dict[str, list[float]] = field(default_factory=dict)
    precise_bn: tuple[int, dict[str, Tensor]] | None = None

    def values(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        saved = {entry.name: entry.save(self) for entry in ENTRIES}
        return {name: value for name, value in saved.items() if value is not ABSENT}

    def load(self, source: ResumePoint) -> None:
        """Restore this state from a checkpoint.

        Raises:
            UserError: the checkpoint does not fit the config.
        """
        for entry in ENTRIES:
            if entry.load is not None and entry.name in source.state:
                entry.load(self, source)


ABSENT = object()  # the value of an entry that a run does not have


@dataclass(frozen=True)
class CheckpointEntry:
    """One item in a checkpoint.

    Attributes:
        name: its key.
        save: returns a run's value, or ABSENT.
        load: restores a checkpoint's value; None: `setup.start`, `check_resume` or other readers of the file read it.
        types: types of the value if a run cannot resume without it; empty: it may be missing.
        needed: whether a run of this config (plain values) needs it.
        is_right: a further condition on the value.
    """

    name: str
    save: Callable[[TrainState], Any]
    load: Callable[[TrainState, ResumePoint], object] | None = None
    types: tuple[type, ...] = ()
    needed: Callable[[Values], bool] = lambda config: True
    is_right: Callable[[Any, Values], bool] = lambda value, config: True


def check(path: Path, values: Values) -> None:
    """Raise CorruptCheckpoint if no run can resume from a file: written by another program, or incomplete."""
    config = values.get("config")
    config = config if isinstance(config, Mapping) else {}

    needed = [entry for entry in ENTRIES if entry.types and entry.needed(config)]
    missing = [entry.name for entry in needed if entry.name not in values]
    odd = [entry.name for entry in needed if entry.name in values and not _fits(entry, values[entry.name], config)]

    if missing or odd:
        wrong = [listed("it has no", missing, most=8), listed("not what a run writes", odd, most=8)]
        raise CorruptCheckpoint(
            path, f"{'; '.join(text for text in wrong if text)}: not a checkpoint that a training run can resume from"
        )


def _fits(entry: CheckpointEntry, value: object, config: Values) -> bool:
    # bool is a subclass of int, but a run writes no bool
    return isinstance(value, entry.types) and not isinstance(value, bool) and entry.is_right(value, config)


def _is_weights(value: Any, config: Values) -> bool:
    return all(isinstance(tensor, Tensor) for tensor in value.values())


def _is_window(value: Any, config: Values) -> bool:
    return all(isinstance(numbers, list) for numbers in value.values())


def _second(config: Values) -> Values:
    """Return the `distill` part of a config."""
    section = config.get("distill")
    return section if isinstance(section, Mapping) else {}


def _is_mutual(config: Values) -> bool:
    return bool(_second(config).get("teacher")) and _second(config).get("kind") == "dml"


def _is_second(value: Any, config: Values) -> bool:
    return ("model" if _is_mutual(config) else "weights_hash") in value


def _of_second(name: str) -> Callable[[TrainState], Any]:
    def save(state: TrainState) -> Any:
        second = state.learner.distill
        return second.state().get(name, ABSENT) if second else ABSENT

    return save


def _load_peer(state: TrainState, source: ResumePoint) -> None:
    second = state.learner.distill
    if second and second.peer:
        checkpoint.load_model(second.peer, source.state["peer"], f"{source.path}, second network")


def _load_ema(state: TrainState, source: ResumePoint) -> None:
    if state.learner.ema:
        checkpoint.load_model(state.learner.ema.net, source.state["ema"], f"{source.path}, average of the weights")


_NEEDED_OF_GROUPS = ("lr", "weight_decay", "momentum", "nesterov", "betas", "eps")


def _load_optimizer(state: TrainState, source: ResumePoint) -> None:
    """Restore the optimiser. torch compares the numbers of groups and of parameters, so compare the shapes here."""
    # The loss scale belongs to the optimiser: both fit, or neither does
    optimizer, scaler = state.learner.optimizer, state.learner.scaler
    try:
        optimizer.load_state_dict(source.state["optimizer"])
        scaler.load_state_dict(source.state["scaler"])

        # 0-dimensional values are counters of steps, which have no parameter's shape
        wrong = [
            tuple(value.shape)
            for parameter, kept in optimizer.state.items()
            for value in kept.values()
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape
        ]

        # Options that a step reads from each group, and averages that AdamW reads for each parameter
        names = [name for name in _NEEDED_OF_GROUPS if name in optimizer.defaults]
        lacking = [name for name in names if any(name not in group for group in optimizer.param_groups)]
        if "betas" in optimizer.defaults:  # SGD works without its averages, AdamW fails in its next step
            averages = ("step", "exp_avg", "exp_avg_sq")
            lacking += [name for name in averages if any(name not in kept for kept in optimizer.state.values())]

        reason = f"values of a different shape, {wrong[0]}" if wrong else f"no {lacking[0]} in it" if lacking else ""
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = str(error)

    if reason:
        raise UserError(
            f"{source.path}: the optimiser's state is from a different model or recipe ({reason}); put the run's own "
            "checkpoint back, or start over with --fresh, which moves the old run to old/"
        )


def _precise_bn(state: TrainState) -> Any:
    # Only the checkpoint of the validated step has statistics that fit its weights
    if state.precise_bn is None or state.precise_bn[0] != state.step:
        return ABSENT
    return state.precise_bn[1]


def _counter(
    name: str, *types: type, is_right: Callable[[Any, Values], bool] = lambda value, config: True
) -> CheckpointEntry:
    """Return the entry for an attribute of TrainState that is saved as it is."""
    return CheckpointEntry(
        name,
        save=lambda state: getattr(state, name),
        load=lambda state, source: setattr(state, name, source.state[name]),
        types=types,
        is_right=is_right,
    )


def _fact(name: str, *types: type) -> CheckpointEntry:
    """Return the entry for one value of `metadata`."""
    return CheckpointEntry(name, save=lambda state: state.metadata[name], types=types)


# Networks, statistics and optimiser; then counters; then the metadata that describes the run
ENTRIES: tuple[CheckpointEntry, ...] = (
    CheckpointEntry(
        "model",
        save=lambda state: state.learner.net.state_dict(),
        load=lambda state, source: checkpoint.load_model(state.learner.net, source.state["model"], source.path),
        types=(dict,),
        is_right=_is_weights,
    ),
    CheckpointEntry(
        "peer",
        save=_of_second("peer"),
        load=_load_peer,
        types=(dict,),
        needed=_is_mutual,
        is_right=_is_weights,
    ),
    CheckpointEntry(
        "ema",
        save=lambda state: state.learner.ema.net.state_dict() if state.learner.ema else ABSENT,
        load=_load_ema,
        types=(dict,),
        needed=lambda config: bool(config.get("ema")),
        is_right=_is_weights,
    ),
    CheckpointEntry(
        "group_statistics",
        save=lambda state: state.learner.bn_stats.group_state(),
        load=lambda state, source: state.learner.bn_stats.load_group_state(source.state["group_statistics"]),
        types=(Tensor, type(None)),
    ),
    CheckpointEntry(
        "optimizer",
        save=lambda state: state.learner.optimizer.state_dict(),
        load=_load_optimizer,
        types=(dict,),
    ),
    CheckpointEntry(
        "scaler", save=lambda state: state.learner.scaler.state_dict(), types=(dict,)
    ),  # loaded with the optimiser
    CheckpointEntry("precise_bn", save=_precise_bn),
    CheckpointEntry(
        "distill",
        save=_of_second("distill"),
        types=(dict,),
        needed=lambda config: bool(_second(config).get("teacher")),
        is_right=_is_second,
    ),
    _counter("step", int),
    _counter("validated_step", int),
    _counter("best_metric", float, int),
    _counter("window", dict, is_right=_is_window),
    CheckpointEntry("seed", save=lambda state: state.learner.cfg.seed),
    CheckpointEntry(
        "shards",
        save=lambda state: state.learner.shards.total,
        types=(int,),
        is_right=lambda value, config: value >= 1,
    ),
    CheckpointEntry("global_batch", save=lambda state: state.learner.shards.global_batch),
    _fact("config", dict),
    _fact("classes"),
    _fact("resize"),
    _fact("lists", dict),
    CheckpointEntry("initial", save=lambda state: state.metadata.get("initial") or ABSENT),
    _fact("code"),
    _fact("token"),
    CheckpointEntry("versions", save=lambda state: checkpoint.versions()),
)
