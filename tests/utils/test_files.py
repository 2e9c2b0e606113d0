"""File duties: a file is the old one or the whole new one, a torn row costs nothing else."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from utils import files


def test_after_an_error_the_old_file_stays_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    files.write_text(file, "old\n")

    def fail() -> None:
        with files.replacing(file) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert file.read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_the_temporary_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt.tmp")
    files.write_text(tmp_path / "a.txt", "new \udcff\n", errors="surrogateescape")
    assert (tmp_path / "a.txt").read_bytes() == b"new \xff\n"


def test_rows_outlive_a_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "rows.jsonl"
    assert files.read_rows(file) == []
    files.append_row(file, {"a": 1})
    with file.open("a") as stream:
        stream.write('{"torn\n[1]\n')
    files.append_row(file, {"b": "é"})
    assert files.read_rows(file) == [{"a": 1}, {"b": "é"}]
    assert files.read_lines(file)[1] == [1]


def test_hash_of_more_than_one_block(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 3)
    files.write(tmp_path / "a", data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_only_old_leftovers_go(tmp_path: Path) -> None:
    young, old = tmp_path / "young.tmp", tmp_path / "old.tmp"
    for file in (young, old):
        file.touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    files.remove_old([*tmp_path.glob("*.tmp"), tmp_path / "gone"])
    assert list(tmp_path.iterdir()) == [young]
