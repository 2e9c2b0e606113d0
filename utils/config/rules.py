"""Rules between keys: mistakes that no key alone can show.

A rule is a function of a look-up and yields (key, text) for each problem. The look-up raises `Unknown` for a key that
is itself in error. That skips the rule, so that all other problems of a file are reported at once.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from utils.config.schema import PAIRS

MOST_BATCH_BYTES = 500 * 10**9  # of the clips of one micro-batch on the device, as float32
MOST_QUEUE_BYTES = 2 * 10**12  # of the clips that one rank reads ahead, as uint8
MOST_RATE = 1e30  # RATE of schema.py

Problem = tuple[str, str]  # dotted key, text
LookUp = Callable[[str], Any]


class Unknown(Exception):
    """The value of this key is missing or wrong."""


def broken_rules(values: Mapping[str, object], in_error: set[str]) -> list[Problem]:
    """Apply all rules.

    Args:
        values: dotted key -> value, with defaults filled in; None means off.
        in_error: dotted keys (or sections) whose value cannot be used.

    Returns:
        (key, text) of every broken rule.
    """

    def look_up(key: str) -> Any:
        # A section in error makes all its keys unknown
        if key not in values or any(key == bad or key.startswith(f"{bad}.") for bad in in_error):
            raise Unknown
        return values[key]

    problems: list[Problem] = []
    for rule in _RULES:
        try:
            problems.extend(rule(look_up))
        except Unknown:
            continue
    return problems


def _pair(first: str, second: str, required: bool) -> Callable[[LookUp], Iterator[Problem]]:
    def rule(value: LookUp) -> Iterator[Problem]:
        given = [key for key in (first, second) if value(key) is not None]
        names = f"{_short(first)} or {_short(second)}"
        if len(given) == 2:
            yield second, f"give either {names}, not both"
        if required and not given:
            yield first, f"missing: give {names}"

    return rule


def _crop_fits(value: LookUp) -> Iterator[Problem]:
    if value("augmentation.input_size") > value("augmentation.test_resize"):
        size, short = value("augmentation.input_size"), value("augmentation.test_resize")
        yield "augmentation.input_size", f"a crop of {size} pixels does not fit a short side (test_resize) of {short}"


def _memory(value: LookUp) -> Iterator[Problem]:
    """Refuse a micro-batch, or a queue of them, that no machine can hold; each factor may be legal."""
    frames, size = value("model.num_segments") * value("data.clip_len"), value("augmentation.input_size")
    pixels = value("batch_size") * frames * size**2
    product = "batch_size x num_segments x clip_len x input_size^2"

    # On the device: float32, 3 channels of 4 bytes per pixel
    if 12 * pixels > MOST_BATCH_BYTES:
        yield (
            "batch_size",
            f"{value('batch_size'):,} clips of {frames:,} frames of {size} x {size} pixels take {_bytes(12 * pixels)} "
            f"as 32-bit numbers ({product} x 12 bytes), and no GPU has more than {_bytes(MOST_BATCH_BYTES)}",
        )

    # In the memory of the host: uint8, 3 bytes per pixel
    ahead = value("data.prefetch")
    if 3 * pixels * ahead > MOST_QUEUE_BYTES:
        yield (
            "data.prefetch",
            f"{ahead:,} micro-batches read ahead take {_bytes(3 * pixels * ahead)} of memory in each rank "
            f"({product} x 3 bytes each); at most {_bytes(MOST_QUEUE_BYTES)}",
        )


def _bytes(number: float) -> str:
    """Return a number of bytes with a fitting unit."""
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if number < 1000 or unit == "PB":
            break
        number /= 1000
    return f"{number:,.1f} {unit}"


def _mixed_pairs(value: LookUp) -> Iterator[Problem]:
    mixes = [name for name in ("mix_up", "cutmix") if value(f"augmentation.{name}")]
    if mixes and value("batch_size") % 2:
        yield (
            "batch_size",
            f"{mixes[0]} mixes neighbouring clips, so batch_size must be even, not {value('batch_size')}",
        )

    # The clips of a video are neighbours, and a clip must not be mixed with another one of its video
    size, count = value("batch_size"), value("data.num_sample")
    if mixes and size % (2 * count) and not size % 2:
        yield (
            "data.num_sample",
            f"{mixes[0]} mixes neighbouring clips, which must be of two videos: batch_size ({size}) must be a "
            f"multiple of 2 x num_sample, {2 * count}",
        )
    elif size % count:
        yield "data.num_sample", f"must divide batch_size, which counts clips: {size} is not a multiple of {count}"

    if len(mixes) < 2 and value("augmentation.mix_up_switch") != 0.5:
        yield "augmentation.mix_up_switch", "has no effect unless both mix_up and cutmix are on; remove it"


def _mirrored_labels(value: LookUp) -> Iterator[Problem]:
    pairs, classes = value("data.flip_labels"), value("model.num_class")
    if pairs and not value("data.flip"):
        yield "data.flip_labels", "has no effect with flip: false; remove it, or set flip: true"
    wrong = [name for pair in pairs or () for name in pair if isinstance(name, int) and name >= classes]
    if wrong:
        yield "data.flip_labels", f"class {wrong[0]} is not one of the {classes} classes, which count from 0"


def _policy(value: LookUp) -> Iterator[Problem]:
    if value("policy") and value("no_wd"):
        yield "policy", "has no effect with no_wd, which makes other parameter groups; set one of them to false"


def _nesterov(value: LookUp) -> Iterator[Problem]:
    if value("nesterov") and value("momentum") == 0:
        yield "nesterov", "needs a momentum greater than 0"


def _optimizer(value: LookUp) -> Iterator[Problem]:
    # Options of one optimiser at other than their defaults are a mistake with the other one
    of_sgd = {"policy": False, "nesterov": False, "no_wd": False, "momentum": 0.9}
    if value("optimizer.type") == "adamw":
        for key, default in of_sgd.items():
            if value(key) != default:
                yield key, "belongs to sgd and has no effect with optimizer.type: adamw; remove it"
        return

    for key, is_default in (
        ("betas", tuple(value("optimizer.betas")) == (0.9, 0.999)),
        ("eps", value("optimizer.eps") == 1e-8),
    ):
        if not is_default:
            yield f"optimizer.{key}", "belongs to adamw and has no effect with optimizer.type: sgd; remove it"


def _warm_up_ends(value: LookUp) -> Iterator[Problem]:
    for unit in (("warmup_steps", "max_iter"), ("warmup_epochs", "max_epoch")):
        short, long = (value(f"lr_scheduler.{key}") for key in unit)
        if short is not None and long is not None and short >= long:
            yield f"lr_scheduler.{unit[0]}", f"must be less than {unit[1]} ({short:g} is not less than {long:g})"


def _peak(value: LookUp) -> Iterator[Problem]:
    warm_up = value("lr_scheduler.warmup_steps") or value("lr_scheduler.warmup_epochs")
    base, peak = value("lr_scheduler.base_lr"), value("lr_scheduler.warmup_lr")
    if warm_up and peak is None:
        yield "lr_scheduler.warmup_lr", "missing: the peak learning rate, at which the warm-up ends"

    if not warm_up and peak is not None and peak != base:
        yield (
            "lr_scheduler.warmup_lr",
            f"has no effect without a warm-up: the peak would be base_lr, {base:g}; remove it",
        )

    for name, default in (("warmup_type", "to_peak"), ("warmup_by", "iteration")):
        if not warm_up and value(f"lr_scheduler.{name}") != default:
            yield f"lr_scheduler.{name}", "has no effect without a warm-up; remove it, or give warmup_steps"

    # The highest rate of the run
    top = peak if warm_up and peak is not None else base
    if value("lr_scheduler.min_lr") > top:
        yield "lr_scheduler.min_lr", f"must not be greater than the peak learning rate, {top:g}"


def _cosine_begin(value: LookUp) -> Iterator[Problem]:
    begin, last = value("lr_scheduler.cosine_begin_epoch"), value("lr_scheduler.max_epoch")
    if begin is None:
        return
    if value("lr_scheduler.type") != "COSINE":
        yield "lr_scheduler.cosine_begin_epoch", "has no effect with type: STEP; remove it, or set type: COSINE"
    elif last is not None and begin >= last:
        yield "lr_scheduler.cosine_begin_epoch", f"{begin:g} is not before the end of the run (max_epoch {last:g})"


def _steps(value: LookUp) -> Iterator[Problem]:
    mults = value("lr_scheduler.lr_mults")
    where = {"lr_steps": value("lr_scheduler.lr_steps"), "lr_epochs": value("lr_scheduler.lr_epochs")}

    if value("lr_scheduler.type") == "COSINE":
        for name, given in {**where, "lr_mults": mults}.items():
            if given is not None:
                yield f"lr_scheduler.{name}", "has no effect with type: COSINE; remove it, or set type: STEP"
        return

    given = next((steps for steps in where.values() if steps is not None), None)
    if given is None:
        yield "lr_scheduler.lr_steps", "missing: type: STEP needs lr_steps (or lr_epochs) and lr_mults"
    elif mults is None:
        yield "lr_scheduler.lr_mults", "missing: type: STEP needs a factor for each of its steps"
    elif len(given) != len(mults):
        name = next(name for name, steps in where.items() if steps is not None)
        yield "lr_scheduler.lr_mults", f"{len(mults)} factors for {len(given)} {name}; there must be one for each"
    else:
        # The factors multiply: the highest rate may come in the middle of the run
        peak = value("lr_scheduler.warmup_lr") or value("lr_scheduler.base_lr")
        highest = max(itertools.accumulate((peak, *mults), operator.mul))
        if highest > MOST_RATE:
            yield "lr_scheduler.lr_mults", f"the factors raise the learning rate to {highest:g}; training diverges"


def _steps_end(value: LookUp) -> Iterator[Problem]:
    for steps, end in (("lr_steps", "max_iter"), ("lr_epochs", "max_epoch")):
        given, last = value(f"lr_scheduler.{steps}"), value(f"lr_scheduler.{end}")
        if given and last is not None and given[-1] >= last:
            yield (
                f"lr_scheduler.{steps}",
                f"the last one, {given[-1]:g}, is not before the end of the run ({end} {last:g})",
            )


def _several_labels(value: LookUp) -> Iterator[Problem]:
    if value("data.list_layout") != "auto" and value("loss") == "ce":
        yield "data.list_layout", "several labels per video need loss: bce; set it, or data.list_layout: auto"


def _folds(value: LookUp) -> Iterator[Problem]:
    if value("data.folds") == "groups" and value("data.fold_group") is None:
        yield "data.folds", "leaving one group out needs data.fold_group, a pattern that finds the group in a path"


def _precise_bn(value: LookUp) -> Iterator[Problem]:
    for name in ("every_iters", "every_epochs"):
        if value(f"precise_bn.{name}") is not None and not value("precise_bn.batches"):
            yield f"precise_bn.{name}", "has no effect without precise_bn.batches (200 is usual); set it or remove this"


def _distill(value: LookUp) -> Iterator[Problem]:
    kind, weight = value("distill.kind"), value("distill.weight")
    if value("distill.teacher") is None:
        if kind == "dml" or weight is not None:
            yield "distill.teacher", "missing: the experiment folder or weights file of the second network"
        return

    if value("loss") == "bce":
        yield "distill.teacher", "distillation compares softmax outputs, so it needs loss: ce"
    if kind == "dml" and value("distill.temperature") != 4.0:
        yield "distill.temperature", "has no effect with kind: dml; remove it"
    if kind == "kd" and weight is not None and weight > 1:
        yield "distill.weight", f"kd: the teacher's share of the loss, at most 1, not {weight:g}"


# The order of the problems of a line
_RULES: tuple[Callable[[LookUp], Iterator[Problem]], ...] = (
    *itertools.starmap(_pair, PAIRS),
    _crop_fits,
    _memory,
    _mixed_pairs,
    _mirrored_labels,
    _policy,
    _nesterov,
    _optimizer,
    _warm_up_ends,
    _peak,
    _cosine_begin,
    _steps,
    _steps_end,
    _several_labels,
    _folds,
    _precise_bn,
    _distill,
)


def _short(key: str) -> str:
    return key.rpartition(".")[2]
