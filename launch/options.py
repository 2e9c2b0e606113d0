"""The options of `main.py train` and `main.py eval`: a mistyped one is told before a start or a place in a queue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from utils.faults import UserError, did_you_mean

# Verb -> its options, and whether a value follows. The parsers themselves import torch; a test compares.
OPTIONS = {
    "train": {"--set": True, "--fresh": False},
    "eval": {
        "--set": True, "--checkpoint": True, "--list": True, "--root": True, "--name": True, "--keep": True,
        "--protocol": True, "--views": True, "--scale": True, "--crop-size": True, "--average": True,
        "--per-position": False, "--chunk": True, "--plain": False,
    },
}  # fmt: skip


def check(verb: str, words: Sequence[str], *, near: Iterable[str] = ()) -> None:
    """Refuse an option that a verb does not have.

    Args:
        verb: train or eval.
        words: what the user wrote for it, without the experiment.
        near: names of further options, of the command that calls, for a hint.

    Raises:
        UserError: the first word that is none of its options, nor the value of one.
    """
    known, left = OPTIONS[verb], [word for word in words if word != "--"]
    while left:
        word = left.pop(0)
        name, equals, _ = word.partition("=")
        meant = [name] if name in known else [option for option in known if option.startswith(name)]
        if not name.startswith("--") or len(meant) != 1:  # argparse too takes the beginning of a name
            hint = did_you_mean(name, [*known, *(f"--{other}".replace("_", "-") for other in near)])
            raise UserError(f"{verb} has no option {word!r}{hint}; it takes {', '.join(known)}")
        if known[meant[0]] and not equals:
            if not left:
                raise UserError(f"{verb}: {meant[0]} needs a value")
            left.pop(0)
