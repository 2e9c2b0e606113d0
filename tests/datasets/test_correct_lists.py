"""`lists LIST --drop TABLE --relabel TABLE`: the tables of label suspects go back into lists of every layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from anal_tools import label_errors
from anal_tools.evaluate.results import Results
from datasets.lists import verb
from datasets.lists.records import Records
from tests.evaluated import write_results
from utils.errors import UserError

NAMES = ["a b/\u00fc 1.mp4", "a, b/2.mp4", "\udcff.mp4", "d/4.mp4", "a b/\u00fc 1.mp4", "=2+3.mp4"]
LABELS = [0, 1, 2, 0, 1, 2]


def table_of(path: Path, rows: list[dict[str, object]]) -> Path:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def run(*words: object) -> int:
    return verb.main([str(word) for word in words])


def list_of(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape", newline="")
    return path


@pytest.mark.parametrize("layout", ["{0}\t{1}\n", "{0}\t16\t{1}\r\n", '"{0}",{1}\n', "{0}\t3\t16\t{1} \n"])
def test_lines_change_their_label_and_nothing_else(tmp_path: Path, layout: str, capsys) -> None:
    lines = [layout.format(name, label) for name, label in zip(NAMES, LABELS, strict=True)]
    if layout.startswith('"'):
        lines.insert(0, "path,label\n")
    old = list_of(tmp_path / "all.txt", [*lines[:3], "\n", *lines[3:]])
    drop = table_of(tmp_path / "drop.csv", [{"path": NAMES[2], "label": 2}])
    relabel = table_of(
        tmp_path / "relabel.csv",
        [
            {"path": NAMES[4], "entry": 2, "label": 1, "suggested": 10},
            {"path": NAMES[5], "entry": 1, "label": 2, "suggested": 0},
        ],
    )
    before = old.read_bytes()
    assert run(old, "--drop", drop, "--relabel", relabel, "--out", tmp_path / "new.txt") == 0
    assert "1 videos left out, 2 with a new label" in capsys.readouterr().out
    assert old.read_bytes() == before

    kept = [layout.format(name, label) for name, label in zip(NAMES, [0, 1, 2, 0, 10, 0], strict=True)]
    del kept[2]
    if layout.startswith('"'):
        kept.insert(0, "path,label\n")
    blank = len(kept) - 3
    expected = "".join([*kept[:blank], "\n", *kept[blank:]])
    assert (tmp_path / "new.txt").read_bytes() == expected.encode("utf-8", "surrogateescape")
    records = Records.load(tmp_path / "new.txt", tmp_path, num_class=None)
    assert records.labels.tolist() == [0, 1, 0, 10, 0]


def test_a_json_list(tmp_path: Path) -> None:
    entries = [{"filename": name, "label": label, "more": [1]} for name, label in zip(NAMES, LABELS, strict=True)]
    old = tmp_path / "all.json"
    old.write_text(json.dumps({"metainfo": {"x": 1}, "data_list": entries}))
    table = table_of(tmp_path / "t.csv", [{"path": NAMES[2], "label": 2, "suggested": 1}])
    assert run(old, f"--relabel={table}", "--out", tmp_path / "new.json") == 0
    entries[2]["label"] = 1
    assert json.loads((tmp_path / "new.json").read_text()) == {"metainfo": {"x": 1}, "data_list": entries}


def test_the_suspects_of_an_evaluation_go_back_into_its_list(tmp_path: Path) -> None:
    """Four planted label errors are found, written, and corrected by the table as it is."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 80)
    given = true.copy()
    planted = [int(np.flatnonzero(true[42:] == k)[0]) + 42 for k in range(4)]
    given[planted] = (true[planted] + 1) % 4
    logits = rng.normal(0, 0.3, (80, 1, 4)).astype(np.float32)
    logits[np.arange(80), 0, true] += 4
    ids = [f"v {row}.mp4" for row in range(80)]
    ids[planted[1]] = ids[40]  # a list that names a video twice
    exp = write_results(tmp_path / "exp", labels=given.tolist(), logits=logits, names=["a", "b", "=c", "d"], ids=ids)
    suspects = label_errors.suspects(Results.load(exp).scores, given)
    assert {one.row for one in suspects} == set(planted)
    label_errors.write_csv(tmp_path / label_errors.CSV, suspects, Results.load(exp))
    old = list_of(tmp_path / "val.txt", [f"{name}\t{label}\n" for name, label in zip(ids, given, strict=True)])
    assert run(old, "--relabel", tmp_path / label_errors.CSV, "--out", tmp_path / "new.txt") == 0
    assert Records.load(tmp_path / "new.txt", tmp_path, num_class=4).labels.tolist() == true.tolist()
    assert run(old, "--drop", tmp_path / label_errors.CSV, "--out", tmp_path / "less.txt") == 0
    assert len(Records.load(tmp_path / "less.txt", tmp_path, num_class=4)) == 76
    with pytest.raises(UserError, match="was corrected before"):
        run(tmp_path / "new.txt", "--relabel", tmp_path / label_errors.CSV, "--out", tmp_path / "newer.txt")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,label\nx.mp4,0\n", "no column suggested"),
        ("path,label,suggested\nx.mp4,0,one\n", r"t.csv:2: suggested is 'one'; give a whole number"),
        ("path,label,suggested\nx.mp4,0,-1\n", "give a whole number, 0 or more"),
        ("path,label,suggested\nx.mp4,0,99999999999999999999\n", "give a whole number, 0 or more"),
        ("path,label,suggested\nx.mp4,0\n", "suggested is ''"),
        ("path,label,suggested\nx.mp4,0,1\nx.mp4,0,2\n", "t.csv:3: x.mp4 is also in .*t.csv:2"),
        ("path,label,suggested\ny.mp4,0,1\n", "none of the 1 videos of the table is in it"),
        ("path,label,suggested\n", "the table has no rows"),
        ("path,label,suggested\nx.mp4,1,2\n", "the label is 1 here and 0 in"),
        ("", "no column path, label, suggested"),
    ],
)
def test_bad_tables_are_one_sentence(tmp_path: Path, table: str, message: str) -> None:
    old = list_of(tmp_path / "val.txt", ["x.mp4 0\n", "z.mp4 1\n"])
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        run(old, "--relabel", tmp_path / "t.csv", "--out", tmp_path / "new.txt")
    assert not (tmp_path / "new.txt").exists()


def test_files_that_are_missing_or_in_the_way(tmp_path: Path) -> None:
    old = list_of(tmp_path / "val.txt", ["x.mp4 0\n", "z.mp4 1\n"])
    table = table_of(tmp_path / "t.csv", [{"path": "x.mp4", "label": 0, "suggested": 1}])
    with pytest.raises(UserError, match="no such list file"):
        run(tmp_path / "absent.txt", "--drop", table, "--out", tmp_path / "new.txt")
    with pytest.raises(UserError, match=r"absent.csv: cannot be read"):
        run(old, "--drop", tmp_path / "absent.csv", "--out", tmp_path / "new.txt")
    with pytest.raises(UserError, match=r"val.txt would change"):
        run(old, "--drop", table, "--out", old)
    with pytest.raises(UserError, match=r"x.mp4 is in .*t.csv:2 too"):
        run(old, "--drop", table, "--relabel", table, "--out", tmp_path / "new.txt")
    assert run(old, "--relabel", table, "--out", old, "--force") == 0
    assert old.read_text() == "x.mp4 1\nz.mp4 1\n"
