"""Format text that tools print and write: names of videos on one line, aligned columns, notes below a table."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from datasets.loading.bad_media import printable
from utils import files


def one_line(text: str) -> str:
    r"""Return `text` with tabs, line ends and other control characters as \t, \n, \x1b ...; all else is unchanged."""
    if text.isprintable():  # fast path: most texts are, and lists are long
        return text
    breaks = "\u2028\u2029\x85"  # str.splitlines breaks at these, too
    return "".join(ascii(c)[1:-1] if ord(c) < 32 or ord(c) == 127 or c in breaks else c for c in text)


def shown(text: str) -> str:
    """Return `text` for a screen: on one line, and with bytes that were not UTF-8 as escapes."""
    return printable(one_line(text))


def columns(rows: Sequence[Sequence[str]], *, left: Container[int] = ()) -> list[str]:
    """Return the rows of a table as lines with aligned columns: those in `left` to the left, others to the right."""
    # Letters: wide characters of a terminal are not considered
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


class Notes:
    """Notes below a table, each once, with the marks in the table that refer to them."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """Return ` [2]`, the mark of a note, or "" for none."""
        if not text:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        """Return the notes with their marks."""
        return [f"[{number}] {text}" for number, text in enumerate(self.texts, start=1)]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file whose names may hold bytes that are not UTF-8."""
    files.write_text(path, "".join(line + "\n" for line in lines), errors="surrogateescape")
