"""The parts of `schema.py`: `key` and `section`, and the types of values with their checks."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from utils import redact

# Limits of sizes; a larger value is a mistake, and would only fail later and with a worse message
MOST_DIGITS = 20  # of a frame number
MOST_SERVERS = 5_000
MOST_JITTER = 100
MOST_NAME_BYTES = 255  # of a file name, as on Linux


def key(meaning: str, *, default: object = ..., free: bool = False, why: str = "", **limits: Any) -> Any:
    """Declare one config key.

    Args:
        meaning: one line with the unit, for the documentation.
        default: the key is required without one.
        free: True if the key may change on resume.
        why: the reason for the upper limit, for the message about a larger number.
        limits: ge, gt, le, lt of a number.
    """
    return Field(default, description=meaning, json_schema_extra={"free": free, "why": why}, **limits)


def section(meaning: str, *, default: type[BaseModel] | None = None) -> Any:
    """Declare a group of keys; `default` is its class if every key in it has a default."""
    if default is None:
        return Field(description=meaning)
    return Field(default_factory=default, description=meaning)


def off_is_none(value: object) -> object:
    """Return None for `false` and 0, which switch something off."""
    return None if value is False or (value == 0 and isinstance(value, (int, float))) else value


def off_is_zero(value: object) -> object:
    """Return 0 for `false` and null."""
    return 0.0 if value is False or value is None else value


def switch_or_text(value: object) -> object:
    """Accept true, false or a path."""
    if not isinstance(value, bool) and not (isinstance(value, str) and value):
        raise ValueError("must be true, false or a path")
    return value


def switch_or_bn(value: object) -> object:
    """Accept true, false or the word bn."""
    if not isinstance(value, bool) and value != "bn":
        raise ValueError("must be true, false or bn")
    return value


def auto_or_base(value: object) -> object:
    """Accept the word auto, 0 or 1."""
    if isinstance(value, bool) or value not in ("auto", 0, 1):
        raise ValueError("must be auto, 0 or 1")
    return value


def frame_template(value: str) -> str:
    """Accept the word auto, or a file name with one number."""
    if value == "auto":
        return value

    if not re.fullmatch(r"[^{}]*\{(:0?\d+d?)?\}[^{}]*", value, re.ASCII):
        raise ValueError("must be auto or a file name with one frame number, like {:06d}.jpg or img_{:05d}.jpg")

    # A huge width would make a huge name out of every number
    width = re.search(r"\{:0?(\d+)", value)
    if width and (len(width[1]) > 2 or int(width[1]) > MOST_DIGITS):
        raise ValueError(f"a frame number has at most {MOST_DIGITS} digits, like {{:06d}}.jpg")

    if value.startswith("/") or ".." in value.split("/"):
        raise ValueError("names a file below the folder of its video: no leading / and no ..")
    return value


def server_list(value: tuple[str, ...] | str) -> tuple[str, ...] | str:
    """Accept the word auto, the path of a file, or a list of addresses host:port and unix:/path."""
    if not value:
        raise ValueError("must be auto, a file, or at least one server")

    if isinstance(value, tuple) and len(value) > MOST_SERVERS:
        raise ValueError(f"must hold at most {MOST_SERVERS:,} servers, not {len(value):,}")

    for server in value if isinstance(value, tuple) else ():
        host_and_port = re.fullmatch(r"[^\s/]+:(\d{1,5})", server, re.ASCII)
        if not (re.fullmatch(r"unix:/.+", server) or (host_and_port and 0 < int(host_and_port[1]) < 65536)):
            raise ValueError(f"{server!r} is not a server: write host:port (10.0.0.5:11211) or unix:/path")
    return value


def within(low: float, high: float) -> AfterValidator:
    """Check that a number, or each number of a sequence, is in [low, high]; None means off and passes."""

    def check(values: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
        each = values if isinstance(values, tuple) else () if values is None else (values,)
        wrong = [value for value in each if not low <= value <= high]

        if wrong:
            which = "each number must" if isinstance(values, tuple) else "must"
            raise ValueError(f"{which} lie between {low:g} and {high:g}, {wrong[0]:g} does not")
        return values

    check.limits = (low, high)  # pyright: ignore[reportFunctionMemberAccess]  # `verb.py` prints them in docs/config.md
    return AfterValidator(check)


def ascending(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Check that the lower end of a range comes first."""
    if values and values[0] > values[1]:
        raise ValueError(f"the first number is the lower end of the range: [{values[1]:g}, {values[0]:g}]")
    return values


def jitter(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Check the strengths of `colorjitter`; the hue turns by at most half a circle either way."""
    if values and (min(values) < 0 or values[3] > 0.5 or max(values) > MOST_JITTER):
        raise ValueError(
            f"strengths must lie between 0 and {MOST_JITTER}, and the hue (the fourth) must be at most 0.5"
        )
    return values


def erasing(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Check the four numbers of `random_erasing`."""
    if values:
        probability, small, large, aspect = values
        if not (0 <= probability <= 1 and 1e-4 <= small <= large <= 1 and 0.01 <= aspect <= 1):
            raise ValueError(
                "[p, sl, sh, r1] needs 0 <= p <= 1, 0 < sl <= sh <= 1 and 0 < r1 <= 1 (sl >= 0.0001, r1 >= 0.01)"
            )
    return values


class RandPolicy(NamedTuple):
    """The numbers of a policy such as rand-m7-n4-mstd0.5-inc1; defaults are timm's.

    Attributes:
        m: magnitude, 0..10.
        n: number of operations, one after the other.
        p: probability that one of them is applied.
        mstd: standard deviation of the magnitude.
        inc: 1 if every operation grows stronger with the magnitude.
    """

    m: float = 10
    n: int = 2
    p: float = 0.5
    mstd: float = 0.0
    inc: int = 0


_LARGEST_OF_POLICY = {"m": 10, "n": 16, "p": 1, "mstd": 100, "inc": 1}


def rand_policy(text: str) -> RandPolicy:
    """Parse the text of a RandAugment policy; ValueError if it is not one."""
    # for-else: a part that is not a name and a number breaks out, past `else`, to the error
    name, *parts = text.split("-")
    settings: dict[str, float] = {}
    for part in parts:
        known = re.fullmatch(r"(m|n|p|mstd|inc)(\d{1,3}(?:\.\d{1,6})?)", part, re.ASCII)
        if not known or known[1] in settings or float(known[2]) > _LARGEST_OF_POLICY[known[1]]:
            break
        settings[known[1]] = float(known[2])
    else:
        n, inc = settings.get("n", 2.0), settings.get("inc", 0.0)
        if name == "rand" and parts and n >= 1 and n.is_integer() and inc.is_integer():
            rest = {key: number for key, number in settings.items() if key in ("m", "p", "mstd")}
            return RandPolicy(n=int(n), inc=int(inc), **rest)

    raise ValueError(
        "must be a policy like rand-m7-n4-mstd0.5-inc1: rand, then m (magnitude, at most 10), n (operations, 1 to 16), "
        "p (probability), mstd (at most 100) and inc (0 or 1), each at most once"
    )


def rand_text(value: str | None) -> str | None:
    """Check the text of a RandAugment policy."""
    if value is not None:
        rand_policy(value)
    return value


def class_pairs(pairs: tuple[tuple[int | str, ...], ...] | None) -> tuple[tuple[int | str, ...], ...] | None:
    """Check pairs of classes: each class is in one pair only."""
    named = [name for pair in pairs or () for name in pair]
    if any(isinstance(name, bool) or name in ("", None) for name in named):
        raise ValueError("a class is a number or a name")

    twice = next((name for name, count in Counter(named).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"each class has one mirror image, but {twice} occurs twice")
    return pairs


def increasing(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Check that each number is larger than the one before it."""
    if values and any(a >= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError("must increase from one number to the next")
    return values


def pattern(value: str) -> str:
    """Check that a text is a regular expression."""
    try:
        re.compile(value)
    except (re.error, RecursionError) as error:
        raise ValueError(f"is not a regular expression ({error})") from None
    return value


def printable(value: str) -> str:
    """Refuse control characters and halves of surrogate pairs, which no terminal prints and no file name holds."""
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise ValueError("must not hold control characters or halves of surrogate pairs")
    return value


def path_text(value: str) -> str:
    """Check that a text can be the path of a file."""
    longest = max(len(part.encode()) for part in value.split("/"))
    if longest > MOST_NAME_BYTES:
        raise ValueError(f"names a file of {longest} bytes; file systems take at most {MOST_NAME_BYTES}")
    return value


def without_user(value: str) -> str:
    """Refuse a URL with a user name in it: logs, checkpoints and reports contain the config."""
    if redact.hidden_users(value) != value:
        raise ValueError("must not hold a URL with a user name; give such a URL in an environment variable")
    return value


# Types of `schema.py`. AfterValidators run in order; a BeforeValidator sees the raw value
ShortText = Annotated[str, Field(max_length=1000), AfterValidator(printable), AfterValidator(without_user)]
LongText = Annotated[str, Field(max_length=10_000), AfterValidator(without_user)]
PathText = Annotated[
    str,
    Field(min_length=1, max_length=4000),
    AfterValidator(printable),
    AfterValidator(path_text),
    AfterValidator(without_user),
]
ClassPair = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=1_000_000)] | ShortText, ...], Field(min_length=2, max_length=2)
]
Switchable = Literal[False] | None
Numbers = tuple[float, ...]
Two = Annotated[Numbers, Field(min_length=2, max_length=2)]
Three = Annotated[Numbers, Field(min_length=3, max_length=3)]
Four = Annotated[Numbers, Field(min_length=4, max_length=4)]
OffOrFour = Annotated[Four | None, BeforeValidator(off_is_none, json_schema_input_type=Four | Switchable)]
OffOrPolicy = Annotated[
    Annotated[str, Field(max_length=100)] | None,
    AfterValidator(rand_text),
    BeforeValidator(off_is_none, json_schema_input_type=str | Switchable),
]
OffOrPositive = Annotated[
    Annotated[float, Field(gt=0)] | None,
    BeforeValidator(off_is_none, json_schema_input_type=Annotated[float, Field(ge=0)] | Switchable),
]
OffOrDecay = Annotated[
    Annotated[float, Field(gt=0, lt=1)] | None,
    BeforeValidator(off_is_none, json_schema_input_type=Annotated[float, Field(ge=0, lt=1)] | Switchable),
]
Steps = Annotated[int, Field(ge=0, le=10**9)]  # iterations, clips: a number of 32 bits
Count = Annotated[int, Field(ge=1, le=10**9)]
Length = Annotated[float, Field(gt=0, le=1e6)]  # epochs


class Strict(BaseModel):
    """No unknown keys, no silent conversion (`"3"` and `true` are not numbers), no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
