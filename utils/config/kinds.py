"""What the keys of `schema.py` are made of: `key` and `section`, and the types of values with their own checks."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def key(meaning: str, *, default: Any = ..., free: bool = False, **limits: Any) -> Any:
    """One config key: required unless it has a default; `free` keys may change on resume."""
    return Field(default, description=meaning, json_schema_extra={"free": free}, **limits)


def section(meaning: str, *, default: Any = ...) -> Any:
    """A group of keys; `default` is its class where every key has a default."""
    if default is ...:
        return Field(description=meaning)
    return Field(default_factory=default, description=meaning)


def off_is_none(value: Any) -> Any:
    """`false` and 0 mean that something is off."""
    return None if value is False or (value == 0 and isinstance(value, (int, float))) else value


def off_is_zero(value: Any) -> Any:
    """`false` and null mean 0."""
    return 0.0 if value is False or value is None else value


def switch_or_text(value: Any) -> Any:
    """True, false or a path."""
    if not isinstance(value, bool) and not (isinstance(value, str) and value):
        raise ValueError("must be true, false or a path")
    return value


def switch_or_bn(value: Any) -> Any:
    """True, false or the word bn."""
    if not isinstance(value, bool) and value != "bn":
        raise ValueError("must be true, false or bn")
    return value


def auto_or_base(value: Any) -> Any:
    """The word auto, 0 or 1."""
    if isinstance(value, bool) or value not in ("auto", 0, 1):
        raise ValueError("must be auto, 0 or 1")
    return value


def frame_template(value: str) -> str:
    """The word auto, or a file name with one number."""
    if value != "auto" and not re.fullmatch(r"[^{}]*\{(:0?\d+d?)?\}[^{}]*", value):
        raise ValueError("must be auto or a file name with one frame number, like {:06d}.jpg or img_{:05d}.jpg")
    return value


def server_list(value: tuple[str, ...] | str) -> tuple[str, ...] | str:
    """The word auto or the path of a file, or addresses host:port and unix:/path."""
    if not value:
        raise ValueError("must be auto, a file, or at least one server")
    for server in value if isinstance(value, tuple) else ():
        if not re.fullmatch(r"unix:/.+|[^\s/]+:\d{1,5}", server):
            raise ValueError(f"{server!r} is no server: write host:port (10.0.0.5:11211) or unix:/path")
    return value


def within(low: float, high: float) -> AfterValidator:
    """Each number of a sequence lies in [low, high]."""

    def check(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        wrong = [value for value in values or () if not low <= value <= high]
        if wrong:
            raise ValueError(f"each number must lie between {low:g} and {high:g}, {wrong[0]:g} does not")
        return values

    return AfterValidator(check)


def ascending(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """The lower end of a range first."""
    if values and values[0] > values[1]:
        raise ValueError(f"the first number is the lower end of the range: [{values[1]:g}, {values[0]:g}]")
    return values


def jitter(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Strengths of `colorjitter`."""
    if values and (min(values) < 0 or values[3] > 0.5):
        raise ValueError("strengths must not be negative, and the hue (the fourth) must be at most 0.5")
    return values


def erasing(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """The four numbers of `random_erasing`."""
    if values:
        probability, small, large, aspect = values
        if not (0 <= probability <= 1 and 0 < small <= large <= 1 and 0 < aspect <= 1):
            raise ValueError("[p, sl, sh, r1] needs 0 <= p <= 1, 0 < sl <= sh <= 1 and 0 < r1 <= 1")
    return values


def positive(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Each number above 0."""
    if values and min(values) <= 0:
        raise ValueError(f"each number must be greater than 0, {min(values):g} is not")
    return values


def class_pairs(pairs: tuple[tuple[int | str, ...], ...] | None) -> tuple[tuple[int | str, ...], ...] | None:
    """Pairs of classes, each class in one of them only."""
    named = [name for pair in pairs or () for name in pair]
    if any(isinstance(name, bool) or name in ("", None) for name in named):
        raise ValueError("a class is a number or a name")
    twice = [name for place, name in enumerate(named) if name in named[:place]]
    if twice:
        raise ValueError(f"each class has one mirror image, but {twice[0]} stands in two places")
    return pairs


def increasing(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Each number above the one before it."""
    if values and any(a >= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError("must increase from one number to the next")
    return values


ClassPair = Annotated[tuple[Annotated[int, Field(ge=0)] | str, ...], Field(min_length=2, max_length=2)]
Switchable = Literal[False] | None
Numbers = tuple[float, ...]
Two = Annotated[Numbers, Field(min_length=2, max_length=2)]
Three = Annotated[Numbers, Field(min_length=3, max_length=3)]
Four = Annotated[Numbers, Field(min_length=4, max_length=4)]
OffOrFour = Annotated[Four | None, BeforeValidator(off_is_none, json_schema_input_type=Four | Switchable)]
OffOrPositive = Annotated[
    Annotated[float, Field(gt=0)] | None,
    BeforeValidator(off_is_none, json_schema_input_type=Annotated[float, Field(ge=0)] | Switchable),
]
OffOrDecay = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | None,
    BeforeValidator(off_is_none, json_schema_input_type=Annotated[float, Field(ge=0, lt=1)] | Switchable),
]
Steps = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Length = Annotated[float, Field(gt=0)]


class Strict(BaseModel):
    """No unknown keys, no silent conversion (`"3"` and `true` are not numbers), no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
