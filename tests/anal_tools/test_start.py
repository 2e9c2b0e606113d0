"""`main.py start`: what it finds in folders and tables, how it divides, what it refuses; and one run to the report."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anal_tools import intervals, start
from anal_tools.evaluate.results import Results
from anal_tools.start import duration, recipe, split, videos
from anal_tools.start.videos import Samples, Video
from datasets.lists.records import Records
from datasets.readers import open_reader
from datasets.readers.spec import ReaderSpec
from tests.conftest import ROOT
from tests.datasets.videos import number_in, write_video
from utils import config
from utils.errors import UserError


def folder(root: Path, *paths: str) -> Path:
    """A folder of empty files with the names of videos."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def collection(*paths: str) -> Samples:
    samples = [Video(path, path.split("/")[0]) for path in paths]
    return Samples("/root", "video", "the class folders", samples, classes=sorted({one.label for one in samples}))


# -------------------------------------------------------------------------------- what is there


def test_class_folders_with_blanks_unicode_and_folders_in_them(tmp_path: Path) -> None:
    root = folder(
        tmp_path / "my videos", "ein Tänzer/tief er/a b.mp4", "läuft/c, d.AVI", "läuft/.hidden.mp4", "note.txt"
    )
    seen = videos.look(root)
    assert [(one.path, one.label) for one in seen.videos] == [
        ("ein Tänzer/tief er/a b.mp4", "ein Tänzer"),
        ("läuft/c, d.AVI", "läuft"),
    ]
    assert (seen.kind, seen.classes, seen.root) == ("video", ["ein Tänzer", "läuft"], str(root))


def test_folders_for_the_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    root = folder(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/a/3.mp4", "val/b/4.mp4")
    seen = videos.look(root)
    assert [(one.label, one.split) for one in seen.videos] == [
        ("a", "train"),
        ("b", "train"),
        ("a", "val"),
        ("b", "val"),
    ]
    assert split.divide(seen, [], group=None, count=5).places.tolist() == [1, 1, 0, 0]
    with pytest.raises(UserError, match=r"train/a/1.mp4 and val/a/3.mp4 are the same video, one for training"):
        split.divide(seen, [[0, 2]], group=None, count=5)


def test_a_split_that_has_no_meaning_is_refused(tmp_path: Path) -> None:
    seen = videos.look(folder(tmp_path, "train/a/1.mp4", "train/b/2.mp4", "val/a/3.mp4", "val/b/4.mp4"))
    for word in ("later", ""):
        odd = dataclasses.replace(seen, videos=[dataclasses.replace(seen.videos[0], split=word), *seen.videos[1:]])
        with pytest.raises(UserError, match="train/a/1.mp4: its split is"):
            split.divide(odd, [], group=None, count=5)


@pytest.mark.parametrize(
    "table",
    [
        "path,label\nx/a b.mp4,wave\nc.mp4,bend\nnone.mp4,bend\n",
        "Video;Class;other\nx/a b.mp4;wave;7\nc.mp4;bend;8\nnone.mp4;bend;9\n",
        "x/a b.mp4\twave\nc.mp4\tbend\nnone\tbend\n",
        "x/a b.mp4 wave\nc.mp4 bend\nnone.mp4 bend\n",
        "a b,wave\nc,bend\nnone,bend\n",
        "# comment\n\nsomewhere/else/a b.mp4,wave\nc.mp4,bend\nnone,bend\n",
    ],
)
def test_tables(tmp_path: Path, table: str) -> None:
    root = folder(tmp_path, "x/a b.mp4", "c.mp4")
    (root / "labels.csv").write_text(table)
    for where in (root, root / "labels.csv"):
        seen = videos.look(where)
        assert [(one.path, one.label) for one in seen.videos] == [("x/a b.mp4", "wave"), ("c.mp4", "bend")]
        assert seen.classes == ["bend", "wave"]
        assert "none" in seen.notes[0]


def test_a_column_of_persons_keeps_each_on_one_side(tmp_path: Path) -> None:
    names = [f"{number}.mp4" for number in range(12)]
    root = folder(tmp_path, *names)
    persons = ["ann", "bo", "cy", "dee"] * 3
    rows = [
        f"{name},{'wave' if k < 6 else 'bend'},{who},x"
        for k, (name, who) in enumerate(zip(names, persons, strict=True))
    ]
    (root / "t.csv").write_text("\n".join(["File, Class, Person ,Remark", *rows]))
    seen = videos.look(root)
    assert seen.source == "t.csv (columns: File, Class, Person; ignored: Remark)"
    division = split.divide(seen, [], group=None, count=5, at_most=True)
    assert division.why.startswith("4 groups by the column 'Person'")
    places = dict(zip(persons, division.places, strict=False))
    assert [places[who] for who in persons] == division.places.tolist()
    assert split.divide(seen, [], group="", count=3).groups is None, "--group '' asks for no groups"
    sides = start.Sides([0] * 12, division.places, 0, 4, False, "by person", division.groups)
    assert str(sides) == "4 folds; by person; held out in turn: " + " | ".join(
        sorted(places, key=lambda who: places[who])
    )

    # A split of the user's is kept, and the persons that it has on both sides are named
    kept = ["val" if who == "dee" else "train" for who in persons]
    for column, note in ((kept, ""), (["val", *kept[1:]], "; both sides have the Person: ann")):
        given = [f"{row},{side}" for row, side in zip(rows, column, strict=True)]
        (root / "t.csv").write_text("\n".join(["File, Class, Person ,Remark,split", *given]))
        division = split.divide(videos.look(root), [], group=None, count=5)
        assert division.why == f"as given by the folders or the table{note}"

    # Without a header the columns have a fixed order, and without a table beside the videos the message tells where
    (root / "t.csv").write_text("0.mp4,wave\n1.mp4,bend\n")
    assert videos.look(root).source == "t.csv (no header, so the columns are: path, label)"
    away = tmp_path / "away" / "t.csv"
    away.parent.mkdir()
    away.write_text("0.mp4,wave\n1.mp4,bend\n")
    with pytest.raises(UserError, match=r"away: contains neither videos .*put the table into the folder of the videos"):
        videos.look(away)


def test_numbers_in_a_table_get_their_names_and_times_are_read(tmp_path: Path) -> None:
    root = folder(tmp_path, "long.mp4", "other.mp4")
    (root / "labels.txt").write_text("long.mp4,0,0,1.5\nlong.mp4,1,0:01.5,1:00:02\nother.mp4,1,,\n")
    (root / "classInd.txt").write_text("0 wave\n1 bend\n")
    seen = videos.look(root)
    assert [(one.label, one.start, one.end) for one in seen.videos] == [
        ("wave", 0, 1.5), ("bend", 1.5, 3602), ("bend", None, None),
    ]  # fmt: skip
    assert seen.classes == ["wave", "bend"]
    (root / "labels.txt").write_text("long.mp4,0,3,2\n")
    with pytest.raises(UserError, match=r"labels.txt:1: the clip ends at 2 s, before or at its start at 3 s"):
        videos.look(root)


@pytest.mark.parametrize(
    ("paths", "table", "message"),
    [
        (["a/1.mp4", "a/2.mp4"], None, r"2 videos, all of one class, 'a'; a model needs at least two"),
        (["1.mp4", "a/2.mp4"], None, r"1.mp4: is not in a class folder; make FOLDER/CLASS/video, or put a csv"),
        (["note.doc"], None, r"contains neither videos nor folders of frames"),
        (["1.mp4"], "x.mp4,a\ny.mp4,b\n", r"none of its 2 videos is below .*, for example 'x.mp4'"),
        (["1.mp4"], "", r"is empty; write a line `path,label` for each video"),
        (["1.mp4"], "1.mp4,\n", r"t.csv:1: expected `path,label`"),
        (["1.mp4"], "path,label,start\n1.mp4,a,x\n", r"t.csv:2: 'x' is not a time"),
    ],
)
def test_what_is_no_data_set(tmp_path: Path, paths: list[str], table: str | None, message: str) -> None:
    root = folder(tmp_path, *paths)
    if table is not None:
        (root / "t.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        videos.look(root)


def test_names_that_contradict_their_folders() -> None:
    right = [f"{name}/v_{name.title()}_{number}.avi" for name in ("archery", "bowling") for number in range(9)]
    assert videos.contradictions(collection(*right, "archery/v_Bowling_9.avi")) == [
        "archery/v_Bowling_9.avi (bowling in the name, archery according to the class folders)"
    ]
    assert not videos.contradictions(collection(*right, "archery/v_9.avi"))
    assert not videos.contradictions(collection("archery/1.avi", "archery/bowling_2.avi", "bowling/3.avi")), (
        "names say nothing"
    )


# -------------------------------------------------------------------------------- the split


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["{person}_{label}", "{person}_{label}_mirror"], ["p1", "p2", "p3", "p4", "p5", "p6"]),
        (["v_{label}_g{person}_c01", "v_{label}_g{person}_c02"], ["gp1", "gp2", "gp3", "gp4", "gp5", "gp6"]),
        (["{label} {person}"], ["p1", "p2", "p3", "p4", "p5", "p6"]),
    ],
)
def test_a_person_in_the_names_is_found_and_stays_on_one_side(names: list[str], groups: list[str]) -> None:
    people = [f"p{number}" for number in range(1, 7)]
    seen = collection(
        *(f"{k}/{n.format(person=p, label=k)}.avi" for k in ("run", "walk", "sit") for p in people for n in names)
    )
    guess = split.guessed(seen.videos)
    assert guess is not None
    assert sorted(set(guess)) == groups
    places = split.divide(seen, [], group=None, count=5).places
    assert all(len(set(places[np.array(guess) == group])) == 1 for group in groups)


@pytest.mark.parametrize("pattern", [None, r"(?<=/)[a-z]+"])
def test_fewer_persons_than_folds_stay_on_one_side_too(pattern: str | None) -> None:
    people = ("daria", "eli", "ido", "moshe")
    paths = [f"{action}/{person}_{action}.avi" for action in ("run", "walk", "side") for person in people]
    seen = collection(*(path for path in paths if path not in ("run/daria_run.avi", "side/daria_side.avi")))
    division = split.divide(seen, [], group=pattern, count=5, at_most=True)
    for person in people:
        rows = [number for number, one in enumerate(seen.videos) if f"/{person}_" in one.path]
        assert len(set(division.places[rows])) == 1, person
    assert division.places.max() == 3
    with pytest.raises(UserError, match="4 groups cannot make 5 folds; make at most 4"):
        split.divide(seen, [], group=r"(?<=/)[a-z]+", count=5)


def test_a_number_that_counts_videos_is_no_person() -> None:
    seen = collection(
        *(f"{name}/{name}_{number:03d}.mp4" for name, count in (("run", 9), ("walk", 12)) for number in range(1, count))
    )
    assert split.guessed(seen.videos) is None
    divided = split.divide(seen, [], group=None, count=4)
    assert "neighbours by name stay together" in divided.why
    assert divided.places[:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_copies_stay_together_and_may_not_have_two_classes() -> None:
    seen = collection(*(f"{name}/{number}x.mp4" for name in ("run", "walk") for number in range(10)))
    places = split.divide(seen, [[0, 9], [9, 4]], group=None, count=5).places
    assert len({places[0], places[4], places[9]}) == 1
    with pytest.raises(
        UserError, match=r"run/0x.mp4 \(run\) and walk/0x.mp4 \(walk\) are the same video with different classes"
    ):
        split.divide(seen, [[0, 10]], group=None, count=5)


def test_a_class_that_cannot_be_validated_is_named() -> None:
    seen = collection("run/1.mp4", "run/2.mp4", "walk/1.mp4")
    with pytest.raises(
        UserError, match=r"no validation is possible for the class: walk \(1 videos\): .*--leave-out CLASS"
    ):
        split.divide(seen, [], group=None, count=5)
    people = collection("run/p1.mp4", "run/p2.mp4", "walk/p1_1.mp4", "walk/p1_2.mp4")
    with pytest.raises(UserError, match=r"walk \(2 videos\).* in different groups"):
        split.divide(people, [], group=r"p\d", count=2)


def test_the_held_out_fold_has_as_many_classes_as_there_can_be() -> None:
    assert split.held_out(np.array([0, 1, 2, 0, 1]), [0, 0, 0, 1, 1], 2) == 0
    assert split.held_out(np.array([0, 1, 2, 0, 1]), [0, 0, 0, 1, 1], 1) == 1


# -------------------------------------------------------------------------------- the recipe


def summary(**changes: Any) -> recipe.DataSummary:
    values = {
        "kind": "video",
        "train": 60,
        "classes": ["a", "b"],
        "frames": np.array([50]),
        "short_side": np.array([240]),
    }
    values |= {"long_side": np.array([320])}
    return recipe.DataSummary(**(values | {"gpus": 0, "cores": 2} | changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given", "weights", "asked", "expected"),
    [
        ({}, True, {}, ("mobilenetv2", 112, 27)),
        ({}, False, {}, ("resnet18", 56, 60)),
        ({"gpus": 1}, True, {}, ("mobilenetv2", 224, 60)),
        ({"train": 100_000, "gpus": 1}, True, {}, ("mobilenetv2", 224, 10)),
        ({"short_side": np.array([40])}, False, {}, ("resnet18", 32, 60)),
        ({}, True, {"size": 64, "epochs": 3, "name": "small"}, ("resnet18", 64, 3)),
    ],
)
def test_choices(given: dict, weights: bool, asked: dict, expected: tuple, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    if weights:
        (tmp_path / "pretrained").mkdir()
        (tmp_path / recipe.WEIGHTS).touch()
    options: dict[str, Any] = {"name": None, "weights": None, "size": None, "segments": None, "epochs": None} | asked
    chosen = recipe.choose(summary(**given), **options)
    assert (chosen.recipe.backbone, chosen.size, chosen.epochs) == expected
    assert chosen.views == "3crop", "240 x 320 is wide"
    paths = {name: '"/x"' for name in ("root", "train", "val", "classes", "metadata")}
    text = recipe.config_text(chosen, summary(**given), paths, folds=True, seed=3, about="two classes")
    (tmp_path / "config.yaml").write_text(text)
    cfg = config.load(tmp_path / "config.yaml")
    assert (cfg.data.folds, cfg.seed, cfg.data.flip) == ("lists", 3, True)
    options["name"] = "x"
    with pytest.raises(UserError, match="--recipe x: no such recipe; choose one of finetune"):
        recipe.choose(summary(), **options)


def test_left_and_right_are_not_mirrored() -> None:
    options: dict[str, Any] = {"name": "small", "weights": None, "size": None, "segments": None, "epochs": None}
    flips = {
        name: recipe.choose(summary(classes=[name, "b"]), **options).flip
        for name in ("turn_left", "Right hand", "bright")
    }
    assert flips == {"turn_left": False, "Right hand": False, "bright": True}


# -------------------------------------------------------------------------------- a run


@pytest.mark.system
def test_clips_of_long_videos_are_read_from_their_start_to_their_end(tmp_path: Path, capsys) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    for number, name in enumerate(("a", "b", "c")):
        write_video(root / f"{name}.mp4", "libx264", frames=50 + number)
    shutil.copy(root / "a.mp4", root / "broken.mp4")
    (root / "broken.mp4").write_bytes((root / "broken.mp4").read_bytes()[:50])
    rows = [
        f"{name}.mp4,{label},{first},{end}"
        for name in ("a", "b", "c")
        for label, first, end in (("wave", 0, 0.4), ("bend", 0.4, 1))
    ]
    (root / "t.csv").write_text(
        "\n".join(["path,label,start,end", *rows, "a.mp4,bend,7,8", "broken.mp4,wave,0,1", "c.mp4,wave,,"])
    )
    assert (
        start.main([str(root), "--out", str(tmp_path / "exp"), "--no-train", "--recipe", "small", "--folds", "3"]) == 0
    )
    output = capsys.readouterr().out
    assert "1 file left out, because unreadable: broken.mp4" in output
    assert "a.mp4: left out, it ends at 2.0 s and the clip starts at 7 s" in output
    assert "the clips of each of the 3 files stay on one side" in output
    assert "from t.csv (columns: path, label, start, end)" in output
    cfg = config.load(tmp_path / "exp")
    records = Records.load(cfg.val_source, cfg.val_root, num_class=2)
    spec = ReaderSpec("video", missing_share=0.05, metadata=cfg.data.metadata)
    reader = open_reader(spec, records)
    parts = {int(records.labels[i]): i for i in range(2)}
    assert {label: reader.probe(i).frames for label, i in parts.items()} == {1: 10, 0: 15}
    out = np.empty((2, 64, 64, 3), np.uint8)
    reader.read(parts[0], np.array([0, 14]), None, (64, 64), out)
    assert [number_in(image) for image in out] == [10, 24], "bend runs from 0.4 s to 1 s"
    reader.close()

    twice = ["a.mp4,wave", "a.mp4,bend", "b.mp4,wave", "c.mp4,bend"]
    (root / "t.csv").write_text("\n".join(twice))
    with pytest.raises(UserError, match=r"a.mp4 \(wave\) and a.mp4 \(bend\) are the same video with different classes"):
        start.main([str(root), "--out", str(tmp_path / "twice"), "--no-train", "--recipe", "small"])


def sides(exp: Path) -> dict[str, set[str]]:
    """Names of the files on each side."""
    lines = {name: (exp / "lists" / f"{name}.txt").read_text().splitlines() for name in ("train", "val")}
    return {name: {line.split("\t")[0] for line in text} for name, text in lines.items()}


@pytest.mark.system
@pytest.mark.parametrize("times", [((0, 0.4), (0.4, 1)), ((0.1, 0.5), (0.6, 1.2))])
@pytest.mark.parametrize("seed", ["0", "3"])
def test_clips_of_copies_of_a_source_stay_on_one_side(tmp_path: Path, times: tuple, seed: str) -> None:
    """A copy under another name holds other clips of the same recording, and one of the same range."""
    root = tmp_path / "videos"
    root.mkdir()
    for number, name in enumerate("abcdef"):
        write_video(root / f"{name}.mp4", "mpeg4", frames=40 + number)
    copied = {"a.mp4": "z.mp4", "b.mp4": "y.mp4"}
    for name, copy in copied.items():
        shutil.copy(root / name, root / copy)
    rows = [
        f"{name}.mp4,{label},{a},{b}"
        for name in "abcdef"
        for label, (a, b) in zip(("wave", "bend"), times, strict=True)
    ]
    rows += [f"z.mp4,wave,{times[0][0]},{times[0][1]}", "z.mp4,bend,1.3,1.5", "y.mp4,wave,1.3,1.5"]
    (root / "t.csv").write_text("\n".join(["path,label,start,end", *rows]))
    words = [str(root), "--out", str(tmp_path / "exp"), "--no-train", "--no-doctor", "--recipe", "small"]
    assert start.main([*words, "--seed", seed]) == 0
    lists = sides(tmp_path / "exp")
    assert not lists["train"] & lists["val"]
    for name, copy in copied.items():
        assert {name, copy} <= lists["train"] or {name, copy} <= lists["val"], lists


@pytest.mark.system
def test_clips_of_a_copy_with_one_clip_each_stay_with_their_source(tmp_path: Path) -> None:
    """No file has two clips, so nothing but the content tells that two files are one recording."""
    root = tmp_path / "videos"
    root.mkdir()
    for number, name in enumerate("acegik"):
        write_video(root / f"{name}.mp4", "mpeg4", frames=40 + number)
    shutil.copy(root / "a.mp4", root / "z.mp4")
    rows = [f"{name}.mp4,{label},0,0.5" for name, label in zip("acegik", ["wave", "bend"] * 3, strict=True)]
    (root / "t.csv").write_text("\n".join(["path,label,start,end", *rows, "z.mp4,bend,1,1.5"]))
    words = [str(root), "--no-train", "--no-doctor", "--recipe", "small"]
    for seed in range(3):
        exp = tmp_path / f"exp{seed}"
        assert start.main([*words, "--out", str(exp), "--seed", str(seed)]) == 0
        assert any({"a.mp4", "z.mp4"} <= side for side in sides(exp).values())


@pytest.mark.system
def test_a_group_stays_on_one_side(tmp_path: Path) -> None:
    for number in range(12):
        target = tmp_path / "videos" / ("wave", "bend")[number % 2] / f"day{number // 2}_{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, "mpeg4", frames=20 + number)
    words = [str(tmp_path / "videos"), "--no-train", "--no-doctor", "--recipe", "small", "--out", str(tmp_path / "exp")]
    assert start.main([*words, "--group", r"day\d"]) == 0
    train, val = ({Path(name).name[:4] for name in side} for side in sides(tmp_path / "exp").values())
    assert len(train) + len(val) == 6
    assert not train & val


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    for number in range(6):
        target = root / ("wave", "bend")[number % 2] / f"{number}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_video(target, "mpeg4", frames=20 + number)
    return root


@pytest.mark.system
@pytest.mark.parametrize("given", [False, True])
def test_a_person_whose_name_is_no_utf8_can_be_printed(given: bool, two_classes: Path, tmp_path: Path, capsys) -> None:
    """A table from an old Windows: printed as it was read, the name would end `start` on a strict terminal."""
    people = (b"J\xfcrgen", b"Ann\x1b[2J", b"Bo")
    for file in list(two_classes.rglob("*.mp4")):
        file.rename(two_classes / file.name)
    rows = [
        b"%d.mp4,%s,%s,%s" % (number, (b"wave", b"bend")[number % 2], people[number // 2], side)
        for number, side in enumerate((b"train", b"train", b"train", b"val", b"val", b"val"))
    ]
    columns = 4 if given else 3
    lines = [b",".join(line.split(b",")[:columns]) for line in (b"path,label,person,split", *rows)]
    (two_classes / "t.csv").write_bytes(b"\n".join(lines))
    words = [str(two_classes), "--out", str(tmp_path / "exp"), "--no-train", "--no-doctor", "--recipe", "small"]
    assert start.main([*words, *([] if given else ["--folds", "3"])]) == 0
    output = capsys.readouterr().out
    output.encode("utf-8")  # strict: fails for a byte that was no UTF-8
    assert "\x1b" not in output
    assert ("both sides have the person: Ann\\x1b[2J" if given else "J\\udcfcrgen") in output


@pytest.mark.system
def test_the_doctor_stops_what_would_be_lost(two_classes: Path, tmp_path: Path, capsys) -> None:
    words = [str(two_classes), "--out", str(tmp_path / "exp"), "--recipe", "small", "--yes"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"stop this run .*\n  limits: no file may be larger than 50 MB"):
            start.main([*words, "--no-train"])
        assert not (tmp_path / "exp").exists()
        assert start.main([*words, "--no-train", "--no-doctor"]) == 0
        with pytest.raises(UserError, match="limits: no file may be larger"):
            start.main(words)  # before the training too
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    two_classes.rename(tmp_path / "moved")
    capsys.readouterr()
    with pytest.raises(UserError, match=r"would stop this run .*\n  files: .*there is no folder"):
        start.main(words)
    assert not (tmp_path / "exp/log.txt").exists()


@pytest.mark.system
@pytest.mark.slow
def test_a_user_at_a_terminal_hears_the_duration_and_may_decline(tmp_path: Path, motion_videos: Path) -> None:
    for label, name in enumerate("ab"):
        for line in (motion_videos / "lists/train.txt").read_text().splitlines()[3 * label : 3 * label + 3]:
            target = tmp_path / "videos" / name / Path(line.split()[0]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(motion_videos / line.split()[0])
    argv = [sys.executable, "main.py", "start", tmp_path / "videos", "--out", tmp_path / "exp", "--no-doctor"]
    argv += ["--recipe", "small", "--size", "32", "--segments", "2", "--trust"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*map(str, argv)], cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, text=True)
    os.write(ours, b"n\n")
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert re.search(r"training takes about \d+ \w+ here: \d+ steps of ", output)
    assert "too few for a reliable accuracy; --folds 5 holds out each video once, in 5 runs" in output
    assert output.endswith("run the same command again to train it\n")
    assert not (tmp_path / "exp/log.txt").exists()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations_are_said_as_a_person_would(seconds: float, words: str) -> None:
    assert duration.duration(seconds) == words


def test_from_a_folder_to_the_report_and_again(tmp_path: Path, motion_videos: Path, capfd) -> None:
    names = (motion_videos / "lists/classInd.txt").read_text().split()[1::2]
    for line in (motion_videos / "lists/train.txt").read_text().splitlines():
        path, _, label = line.split()
        target = tmp_path / "videos" / names[int(label)] / f"my {Path(path).name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(motion_videos / path)
    words = [str(tmp_path / "videos"), "--out", str(tmp_path / "it's exp"), "--yes"]
    words += ["--recipe", "small", "--size", "32", "--segments", "2", "--epochs", "2"]
    assert start.main(words) == 0
    output = capfd.readouterr().out
    match = re.search(r"top-1 ([\d.]+) on (\d+) held-out videos, 95 % interval ([\d.]+) to ([\d.]+)\n", output)
    assert match is not None
    share, count, low, high = match.groups()
    ends = intervals.wilson(round(float(share) * int(count) / 100), int(count))
    assert (float(low), float(high)) == pytest.approx(ends, abs=0.01), "with a width, also where all are right"
    assert "recipe: small: TSM on ResNet-18 from random weights, as requested" in output
    assert "flip: clips are not mirrored" in output
    exp = tmp_path / "it's exp"
    results = Results.load(exp, "latest")
    assert len(results.ids) == len((exp / "lists/val.txt").read_text().splitlines()) > 0
    assert (exp / "report/index.html").is_file()
    assert json.loads((exp / "start.json").read_text())["epochs"] == 2
    steps = re.search(r" iterations=(\d+)", (exp / "log.txt").read_text())
    assert steps
    assert f": {steps[1]} steps of " in duration.estimate(exp)

    assert start.main(words) == 0
    again = capfd.readouterr()
    assert "already exists; resuming it" in again.out
    assert "INFO run: nothing_to_do iteration=" in again.out
    with pytest.raises(UserError, match=r"was started with other options: epochs 2.*, now 3.*; choose another --out"):
        start.main([*words, "--epochs", "3"])
    (exp / "start.json").unlink()
    with pytest.raises(UserError, match="holds an experiment that `start` did not write"):
        start.main(words)
