"""What the family files share: a table of names and the result of applying it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Rules = Iterable[tuple[str, str | None]]


@dataclass
class Converted:
    """A state dict under our names.

    Attributes:
        state: our name: tensor.
        changed: our names of tensors whose values or shape were changed on the way, and how.
        skipped: their names that mean nothing here (counters of an optimiser and the like).
        unknown: their names that no rule knows.
        carried: tensors that change no logit and belong to an export, under the names that it gives them.
        needs: options of the model that change the result but no tensor, for this file, as text.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    carried: dict[str, Tensor] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)


def convert(state: Mapping[str, Tensor], rules: Rules) -> Converted:
    """Rename with the first rule whose pattern matches a whole name.

    Args:
        state: their name: tensor.
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
    """Their name: the name by the first matching rule, or the same name."""
    table = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    found = {}
    for name in names:
        hits = (pattern.fullmatch(name).expand(new) for pattern, new in table if new and pattern.fullmatch(name))  # pyright: ignore[reportOptionalMemberAccess]
        found[name] = next(hits, name)
    return found


def has(names: Iterable[str], pattern: str) -> bool:
    """Whether a name begins with the pattern."""
    return any(re.match(pattern, name) for name in names)
