"""Check the options of `main.py train` and `main.py eval` with their own parsers, before a job is submitted."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from utils.errors import UserError, did_you_mean
from utils.options import train_parser


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser that main.py uses for this verb."""
    if verb == "train":
        return train_parser()
    from anal_tools import evaluate  # imported for `eval` only: it is a large module

    return evaluate.parser()


def check(verb: str, argv: Sequence[str], *, near: Iterable[str] = ()) -> None:
    """Refuse an option that a verb does not have.

    Args:
        verb: train or eval.
        argv: the user's arguments for it, without the experiment.
        near: options of the calling command, as further candidates for a hint.

    Raises:
        UserError: a word that is not one of its options, or a value that an option does not accept.
    """
    parser = parser_of(verb)
    parser.exit_on_error = False  # argparse would print its usage and exit

    try:
        _, unknown = parser.parse_known_args(["EXP", *(word for word in argv if word != "--")])
    except argparse.ArgumentError as error:
        raise UserError(f"{verb}: {error}") from error

    if unknown:
        # Used only for the hint: argparse has no public list of its options.
        known = [name for action in parser._actions for name in action.option_strings if name not in ("-h", "--help")]
        name = unknown[0].partition("=")[0]
        hint = did_you_mean(name, [*known, *(f"--{other}".replace("_", "-") for other in near)])
        raise UserError(f"{verb} has no option {unknown[0]!r}{hint}; it takes {', '.join(known)}")
