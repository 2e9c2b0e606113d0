"""Apply a table of names to a state dict: what the family files share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Rules = Iterable[tuple[str, str | None]]  # (pattern, replacement as in re.sub, or None to leave the tensor out)
Options = dict[str, Any]  # plain values by name: arguments of `methods.build`, keys of a config.json


@dataclass
class Converted:
    """Hold a state dict under our names.

    Attributes:
        state: {our name: tensor}.
        changed: {our name: how} of tensors whose values or shape were changed on the way.
        skipped: their names that mean nothing here, such as counters of an optimiser.
        unknown: their names that no rule matches.
        carried: tensors that change no logit and belong to an export, under the names that it gives them.
        needs: for this file the options of the model that change the result but no tensor, as text.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    carried: dict[str, Tensor] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)


def convert(state: Mapping[str, Tensor], rules: Rules) -> Converted:
    """Rename tensors, each with the first rule whose pattern matches its whole name.

    Args:
        state: {their name: tensor}.
        rules: (pattern, replacement as in re.sub, or None to leave the tensor out).
    """
    table = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    result = Converted()

    for name, tensor in state.items():
        for pattern, replacement in table:
            match = pattern.fullmatch(name)
            if match:
                if replacement is None:
                    result.skipped.append(name)
                else:
                    result.state[match.expand(replacement)] = tensor
                break
        else:
            result.unknown.append(name)

    return result


def rename(names: Iterable[str], rules: Rules) -> dict[str, str]:
    """Return {their name: the name by the first matching rule, or the same name}."""
    table = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}

    for name in names:
        hits = (pattern.fullmatch(name).expand(new) for pattern, new in table if new and pattern.fullmatch(name))  # pyright: ignore[reportOptionalMemberAccess]
        renamed[name] = next(hits, name)
    return renamed


def has(names: Iterable[str], pattern: str) -> bool:
    """Return True if a name begins with the pattern."""
    return any(re.match(pattern, name) for name in names)
