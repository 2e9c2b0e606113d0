"""How videos are divided into folds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.lists import folds, verb
from datasets.lists.records import Records
from tests.experiment import make
from utils import config
from utils.errors import UserError


def experiment(tmp_path: Path, lines: str, words: str) -> config.Config:
    """A config over one list."""
    exp = make(tmp_path / "exp", tmp_path)
    (tmp_path / "lists").mkdir()
    for name in ("train", "val"):
        (tmp_path / f"lists/{name}.txt").write_text(lines)
    text = (exp / "config.yaml").read_text().replace("sampling: tsn}", f"sampling: tsn, {words}}}")
    (exp / "config.yaml").write_text(text)
    return config.load(exp)


def read(fold: folds.Fold, root: Path) -> tuple[set[str], set[str]]:
    lists = [Records.load(file, root, num_class=8) for file in (fold.train, fold.val)]
    train, val = ({one.path(i) for i in range(len(one))} for one in lists)
    return train, val


PEOPLE = "".join(f"p{person}/{label} x.avi\t{20 + person}\t{label}\n" for person in range(1, 12) for label in range(3))


def test_leave_one_group_out(tmp_path: Path) -> None:
    cfg = experiment(tmp_path, PEOPLE, r"folds: groups, fold_group: 'p(\d+)/'")
    group_folds = folds.of(cfg, tmp_path / "made")
    assert [fold.name for fold in group_folds] == [f"{number:02d}" for number in range(1, 12)]
    for number, fold in enumerate(group_folds, 1):
        train, val = read(fold, tmp_path)
        assert val == {f"p{number}/{label} x.avi" for label in range(3)}
        assert len(train) == 30
    assert "p1/0 x.avi\t21\t0\n" in group_folds[0].val.read_text(), "frame counts of the list stay"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").iterdir()}
    assert folds.of(cfg, tmp_path / "made") == group_folds
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (tmp_path / "lists/train.txt").write_text(PEOPLE + "p1/new.avi\t9\t0\n")
    with pytest.raises(UserError, match="holds the lists of other folds"):
        folds.of(cfg, tmp_path / "made")


def test_a_number_of_folds_keeps_groups_whole_and_classes_even(tmp_path: Path) -> None:
    cfg = experiment(tmp_path, PEOPLE, r"folds: 4, fold_group: 'p\d+'")
    sizes = []
    for fold in folds.of(cfg, tmp_path / "made"):
        train, val = read(fold, tmp_path)
        assert not {path.split("/")[0] for path in train} & {path.split("/")[0] for path in val}
        sizes.append(len(val))
    assert sorted(sizes) == [6, 9, 9, 9]
    assert not folds.untrained(folds.of(cfg, tmp_path / "made"), cfg)


def test_a_class_that_one_group_has_alone_is_warned_of(tmp_path: Path) -> None:
    cfg = experiment(tmp_path, PEOPLE + "p3/only.avi\t5\t7\n", r"folds: groups, fold_group: 'p\d+'")
    (warning,) = folds.untrained(folds.of(cfg, tmp_path / "made"), cfg)
    assert warning == "WARNING: fold 03 holds out all videos of class: 7; they count as wrong"


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=2, max_size=60),
    st.integers(2, 5),
)
def test_any_groups_are_divided(videos: list[tuple[int, int]], count: int) -> None:
    groups, labels = [group for group, _ in videos], [label for _, label in videos]
    if len(set(groups)) < count:
        with pytest.raises(UserError, match="cannot make"):
            folds.assign(groups, labels, count)
        return
    places = folds.assign(groups, labels, count)
    assert set(places.tolist()) == set(range(count)), "no fold is empty"
    assert all(len(set(places[np.array(groups) == group])) == 1 for group in groups)
    alone = folds.assign(range(len(videos)), labels, min(count, len(videos)))
    for label in set(labels):
        numbers = Counter(alone[np.array(labels) == label].tolist())
        whole = [numbers[fold] for fold in range(min(count, len(videos)))]
        assert max(whole) - min(whole) <= 1, "the videos of a class are spread evenly"


def test_published_lists_are_folds(tmp_path: Path) -> None:
    for number in (2, 1, 10):
        for side in ("train", "val"):
            (tmp_path / f"fold{number:02d}_{side}.txt").write_text("a 0\n")
    assert [fold.name for fold in folds.beside(tmp_path / "fold01_train.txt")] == ["01", "02", "10"]
    (tmp_path / "fold03_val.txt").write_text("a 0\n")
    with pytest.raises(UserError, match=r"fold03_val.txt has no partner"):
        folds.beside(tmp_path / "x.txt")
    with pytest.raises(UserError, match="holds 0 pairs"):
        folds.beside(tmp_path / "none" / "x.txt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("folds: groups", r"data.folds: leaving one group out needs data.fold_group"),
        ("folds: groups, fold_group: '('", r"data.fold_group: .*is not a regular expression"),
        ("folds: 1", r"data.folds"),
        ("folds: groups, fold_group: 'p1/'", r"finds nothing in p2/0 x.avi"),
        ("folds: groups, fold_group: 'avi'", r"finds 1 groups, not 2 to 1000"),
        ("folds: 9, fold_group: 'q'", r"finds nothing in any path, for example p1/0 x.avi"),
        ("folds: 12, fold_group: 'p[0-9]+'", r"11 groups cannot make 12 folds"),
    ],
)
def test_what_is_refused(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        folds.of(experiment(tmp_path, PEOPLE, words), tmp_path / "made")


def test_the_official_splits_are_folds(shared_data: Path, tmp_path: Path) -> None:
    official, root = shared_data / "lists/official/ucf101_splits", tmp_path / "root"
    tests = [official.joinpath(f"testlist0{split}.txt").read_text().split() for split in (1, 2, 3)]
    for path in official.joinpath("trainlist01.txt").read_text().split()[::2] + tests[0]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    words = [
        "ucf101",
        "--annotations",
        str(official),
        "--root",
        str(root),
        "--out",
        str(tmp_path / "l"),
        "--split",
        "all",
    ]
    assert verb.main(words) == 0
    official_folds = folds.beside(tmp_path / "l/fold01_train.txt")
    for fold, test in zip(official_folds, tests, strict=True):
        val = Records.load(fold.val, root, num_class=101)
        assert [val.path(i) for i in range(len(val))] == test
    with pytest.raises(UserError, match="kinetics has no three official splits"):
        verb.main(["kinetics", *words[1:]])
