"""Hide secrets in logs: environment variables that hold one, user names in URLs, secret files."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

HIDDEN = "***"
LEAST, LONG = 6, 16  # letters: shorter values occur in too many words, longer ones in none
_SECRET_NAME = re.compile("TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(?:API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
_PLACES = ("_FILE", "_DIR", "_PATH")  # such a variable names the place of a secret, not the secret
_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
_known: set[str] = set()  # secrets from files, in addition to those of the environment


def add_file(path: str | os.PathLike[str]) -> None:
    """Hide each line of a secret file, and each part of `user:password`, from now on."""
    try:
        lines = Path(path).read_text("utf-8", errors="replace").split()
    except OSError:
        return
    add(part for line in lines for part in (line, *line.split(":")[1:]))


def add(values: Iterable[str]) -> None:
    """Hide these texts from now on."""
    _known.update(value for value in values if len(value) >= LEAST)


@functools.cache
def from_environment() -> frozenset[str]:
    """Return the values of environment variables whose names mean a secret, as they are at the first call."""
    return frozenset(
        value
        for name, value in os.environ.items()
        if len(value) >= LEAST and _SECRET_NAME.search(name) and not name.upper().endswith(_PLACES)
    )


def hidden(text: str) -> str:
    """Return a text without known secrets and without values of environment variables whose names suggest a secret."""
    # Longest first: a secret that contains another one must go as a whole.
    for secret in sorted(from_environment() | _known, key=len, reverse=True):
        if len(secret) < LONG and (secret.isalpha() or secret.isdigit()):  # it may be part of another word or number
            text = re.sub(rf"(?<!\w){secret}(?!\w)", HIDDEN, text)
        else:
            text = text.replace(secret, HIDDEN)
    return hidden_users(text)


def hidden_users(text: str) -> str:
    """Return a text without the user names and passwords of its URLs."""
    return _USER.sub(f"{HIDDEN}@", text) if "://" in text else text
