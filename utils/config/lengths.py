"""A loaded config as plain values: epochs as iterations, dict form, and the differences of two configs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from utils.config.schema import Config, is_free, leaves
from utils.errors import UserError

MOST_ITERATIONS = 10**9


def resolve_lengths(cfg: Config, videos: int, global_batch: int) -> Config:
    """Turn lengths in epochs into iterations. Not part of `load`: it needs the list and the number of ranks.

    An epoch is `videos * num_sample / global_batch` iterations, which need not be whole: no last batch is dropped, and
    positions continue across epochs. The run's length is rounded up, all others to the nearest iteration.

    Args:
        videos: N, lines of the training list.
        global_batch: clips per iteration over all shards.

    Returns:
        A new config; lengths that were given in iterations are unchanged.

    Raises:
        UserError: the resolved lengths contradict each other.
    """
    per_epoch = videos * cfg.data.num_sample / global_batch
    schedule = cfg.lr_scheduler
    changes: dict[str, int | tuple[int, ...]] = {}

    # The schedule
    if schedule.max_epoch is not None:
        changes["max_iter"] = math.ceil(schedule.max_epoch * per_epoch)
    if schedule.warmup_epochs is not None:
        changes["warmup_steps"] = round(schedule.warmup_epochs * per_epoch)
    if schedule.lr_epochs is not None:
        changes["lr_steps"] = tuple(max(1, round(epoch * per_epoch)) for epoch in schedule.lr_epochs)
    resolved = schedule.model_copy(update=changes)

    # Validations, and precise batch norm before some of them
    val_freq = cfg.val_freq
    if cfg.val_freq_epochs is not None:
        val_freq = max(1, round(cfg.val_freq_epochs * per_epoch))
    precise = cfg.precise_bn
    if precise.every_epochs is not None:
        precise = precise.model_copy(update={"every_iters": max(1, round(precise.every_epochs * per_epoch))})

    _check(resolved.max_iter or 0, resolved.warmup_steps or 0, resolved.lr_steps or (), videos, global_batch)
    return cfg.model_copy(update={"lr_scheduler": resolved, "val_freq": val_freq, "precise_bn": precise})


def _check(max_iter: int, warmup_steps: int, lr_steps: tuple[int, ...], videos: int, global_batch: int) -> None:
    # The schema could not check these: in epochs each length was legal
    size = f"with {videos} videos and a global batch of {global_batch}"
    if max_iter > MOST_ITERATIONS:
        raise UserError(
            f"common.lr_scheduler.max_epoch: {size} the run has {max_iter:,} iterations; at most {MOST_ITERATIONS:,}"
        )
    if warmup_steps >= max_iter:
        raise UserError(
            f"common.lr_scheduler: {size} the warm-up takes {warmup_steps} of {max_iter} iterations; shorten it"
        )
    if any(a >= b for a, b in zip((0, *lr_steps), (*lr_steps, max_iter), strict=True)):
        raise UserError(
            f"common.lr_scheduler: {size} the steps come to {list(lr_steps)} of {max_iter} iterations; "
            "they must increase and end before the run does"
        )


def to_dict(cfg: Config) -> dict[str, object]:
    """Return the config as nested dicts of plain JSON values, in the order of the schema."""
    return cfg.model_dump(mode="json")


def from_dict(tree: Mapping[str, object]) -> Config:
    """Return the config that `to_dict` wrote, for instance into a checkpoint.

    Raises:
        ValueError: it has other keys or values than this version knows.
    """
    return Config.model_validate(_with_tuples(tree))


def _with_tuples(value: object) -> object:
    """Turn lists into tuples: JSON has lists where a config has tuples."""
    if isinstance(value, dict):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, (list, tuple)) else value


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[tuple[str, object, object, bool]]:
    """Return the changes from one `to_dict` form to another.

    A key that one of them lacks (a different version wrote it) counts as holding its default.

    Returns:
        (dotted key, old value, new value, free) in the order of the schema; free: the change does not alter the meaning
        of the run, so a resume may make it.
    """
    flat_old, flat_new = flat(old), flat(new)
    # Keys of the schema first, then options of the model and keys of other versions
    keys = [key for key, _ in leaves() if key != "model.kwargs"]
    keys += sorted((flat_old.keys() | flat_new.keys()) - set(keys))
    defaults = _defaults()

    changes = []
    for key in keys:
        before, after = (values.get(key, defaults.get(key)) for values in (flat_old, flat_new))
        if before != after:
            changes.append((key, before, after, is_free(key)))
    return changes


def with_defaults(tree: Mapping[str, object]) -> dict[str, object]:
    """Return a `to_dict` form, perhaps of an earlier version, with the default of each key that it lacks."""
    full: dict[str, object] = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}

    given = flat(tree)
    for key, default in _defaults().items():
        *sections, name = key.split(".")
        # Not in `given`, but there: an empty dict
        if key in given or (not sections and name in full):
            continue

        # Walk to the section, and copy each dict on the way: the caller's stay as they are
        place = full
        for section in sections:
            inner = place.get(section)
            copy: dict[str, object] = dict(inner) if isinstance(inner, dict) else {}
            place[section] = copy
            place = copy
        place.setdefault(name, default)
    return full


def flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return dotted key -> value of nested dicts."""
    dotted: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            dotted |= flat(value, f"{prefix}{name}.")
        else:
            dotted[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return dotted


def _defaults() -> dict[str, object]:
    defaults = {key: info.get_default() for key, info in leaves() if not info.is_required()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
