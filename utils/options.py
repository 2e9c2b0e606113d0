"""Parse the command line of every verb; define the options of `main.py train`.

The launcher checks the options of a verb before a start, and main.py reads them in every rank.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NoReturn

from utils.errors import UserError, did_you_mean

_CHOICE = re.compile(r"invalid choice: '?(.*?)'? \(choose from (.*)\)$")  # argparse's own sentence


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one sentence, like all mistakes here, and prints no pages of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError that explains what is wrong with the command line and suggests the nearest known word."""
        # argparse passes only its message: take the mistyped word out of it.
        near = ""
        if choice := _CHOICE.search(message):
            near = did_you_mean(choice[1], re.findall(r"[^',\s]+", choice[2]))
        elif message.startswith("unrecognized arguments: -"):
            word = message.split()[2].partition("=")[0]
            near = did_you_mean(word, [name for action in self._actions for name in action.option_strings])

        command = f"python {self.prog}" if self.prog.startswith("main.py") else f"python -m {self.prog}"

        raise UserError(f"{message}{near}; `{command} --help` shows the options")


def train_parser() -> Parser:
    """Return the parser of the verb train."""
    parser = Parser(prog="main.py train", description="train an experiment or resume it (train.sh runs this)")
    parser.add_argument("exp", type=Path, help="experiment folder with a config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for this run")
    parser.add_argument("--fresh", action="store_true", help="move an earlier run to old/ and start again")
    return parser
