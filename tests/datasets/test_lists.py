from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from datasets.lists import verb as lists
from datasets.lists.class_names import read_class_names
from datasets.lists.files import Media, walk
from datasets.lists.records import Records
from tests.golden import LABEL_MAPS
from utils.errors import UserError


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def make(data_set: str, tmp_path: Path, *extra: str, root: Path | None = None) -> Path:
    out = tmp_path / "lists"
    assert lists.main([data_set, "--root", str(root or tmp_path / "root"), "--out", str(out), *extra]) == 0
    return out


def rows(out: Path, name: str, root: Path, classes: int) -> list[tuple[str, int]]:
    records = Records.load(out / f"{name}.txt", root, num_class=classes)
    return [(records.path(i), int(records.labels[i])) for i in range(len(records))]


# ------------------------------------------------------------------------------------------------------ official files


def test_ucf101_official_splits(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official, root = shared_data / "lists/official/ucf101_splits", tmp_path / "root"
    train = official.joinpath("trainlist02.txt").read_text().split()[::2]
    test = official.joinpath("testlist02.txt").read_text().split()
    gone = {"Archery/v_Archery_g01_c01.avi", "YoYo/v_YoYo_g25_c05.avi"}
    for folder in {path.split("/")[0] for path in train}:
        (root / folder).mkdir(parents=True)
    for path in set(train + test) - gone:
        (root / path).touch()
    out = make("ucf101", tmp_path, "--annotations", str(official), "--split", "2")
    names = read_class_names(out / "classInd.txt", 101)
    assert names == (LABEL_MAPS / "mmaction2__ucf101__label_map.txt").read_text().split()
    assert rows(out, "train", root, 101) == [(p, names.index(p.split("/")[0])) for p in train if p not in gone]
    assert rows(out, "val", root, 101) == [(p, names.index(p.split("/")[0])) for p in test if p not in gone]
    missing = (out / "missing_train.txt").read_text() + (out / "missing_val.txt").read_text()
    assert {line.split("\t")[0] for line in missing.splitlines()} == {"v_Archery_g01_c01", "v_YoYo_g25_c05"}
    output = capsys.readouterr().out
    assert "9584 of 9586 samples (99.97 %)" in output
    assert "  Archery: 103 of 104" in output


def test_hmdb51_official_splits_as_frames(shared_data: Path, tmp_path: Path) -> None:
    official, root = shared_data / "lists/official/hmdb51_splits", tmp_path / "root"
    names: dict[str, tuple[str, str]] = {}
    for file in official.glob("*_test_split1.txt"):
        for line in file.read_text().splitlines():
            name, number = line.rsplit(maxsplit=1)
            names[f"{file.name.removesuffix('_test_split1.txt')}/{name.removesuffix('.avi')}"] = (number, name)
    chosen = sorted(names)[::40]
    touch(root, *(f"{path}/img_00001.jpg" for path in chosen))
    out = make("hmdb51", tmp_path, "--annotations", str(official))
    classes = read_class_names(out / "classInd.txt", 51)
    assert classes == (LABEL_MAPS / "mmaction2__hmdb51__label_map.txt").read_text().split()
    listed = dict(rows(out, "train", root, 51)) | dict(rows(out, "val", root, 51))
    assert listed == {path: classes.index(path.split("/")[0]) for path in chosen if names[path][0] != "0"}
    coverage = json.loads((out / "coverage.json").read_text())
    assert coverage["store"] == "frames"
    assert (coverage["splits"]["train"]["wanted"], coverage["splits"]["val"]["wanted"]) == (3570, 1530)
    assert coverage["not_in_the_annotations"] == sum(names[path][0] == "0" for path in chosen)


KINETICS = """label,youtube_id,time_start,time_end,split
dancing ballet,-6thFyf-FCc,100,110,{0}
abseiling,_4YTwq0-73Y,44,54,{0}
"tasting food, slowly",aaaaaaaaaa_,0,10,{0}
"""


def test_kinetics_csv(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for split in ("train", "validate"):
        (tmp_path / f"{split}.csv").write_text(KINETICS.format(split))
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\nbbbbbbbbbbb,1,11,test\n")
    touch(root, "train/abseiling/_4YTwq0-73Y_000044_000054.mp4", "val/abseiling/_4YTwq0-73Y_000044_000054.webm")
    touch(root, "train/dancing_ballet/-6thFyf-FCc_000100_000110.mkv", "val/tasting/aaaaaaaaaa__0_10.mp4")
    annotations = [str(tmp_path / name) for name in ("train.csv", "validate.csv", "test.csv")]
    out = make("kinetics", tmp_path, "--annotations", *annotations)
    assert read_class_names(out / "classInd.txt", 3) == ["abseiling", "dancing ballet", "tasting food, slowly"]
    assert rows(out, "train", root, 3)[:2] == [
        ("train/dancing_ballet/-6thFyf-FCc_000100_000110.mkv", 1),
        ("train/abseiling/_4YTwq0-73Y_000044_000054.mp4", 0),
    ]
    assert rows(out, "val", root, 3)[1] == ("val/abseiling/_4YTwq0-73Y_000044_000054.webm", 0)
    assert json.loads((out / "coverage.json").read_text())["unlabelled"] == 1


@pytest.mark.parametrize("name", ["kinetics700_train_2020.csv", "train-v2.csv", "kinetics_train.csv"])
def test_the_split_of_a_kinetics_csv_without_that_column(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("label,youtube_id,time_start,time_end\nabseiling,_4YTwq0-73Y,44,54\n")
    touch(tmp_path / "root", "_4YTwq0-73Y_000044_000054.mp4")
    out = make("kinetics", tmp_path, "--annotations", str(tmp_path / name))
    assert rows(out, "train", tmp_path / "root", 1) == [("_4YTwq0-73Y_000044_000054.mp4", 0)]


def test_class_order_of_others(tmp_path: Path) -> None:
    """Names differ in blanks and underscores; the numbers are those of the other list."""
    order = LABEL_MAPS / "paddlevideo__Kinetics-400_label_list.txt"
    (tmp_path / "val.csv").write_text(KINETICS.format("val").replace('"tasting food, slowly"', "zumba"))
    touch(tmp_path / "root", "_4YTwq0-73Y_000044_000054.mp4", "-6thFyf-FCc_000100_000110.mp4")
    out = make("kinetics", tmp_path, "--annotations", str(tmp_path / "val.csv"), "--classes", str(order))
    names = read_class_names(out / "classInd.txt", 400)
    assert [names[label] for _, label in rows(out, "val", tmp_path / "root", 400)] == ["dancing_ballet", "abseiling"]
    (tmp_path / "val.csv").write_text(KINETICS.format("val").replace("abseiling", "abseilin"))
    with pytest.raises(UserError, match="did you mean abseiling"):
        make("kinetics", tmp_path, "--annotations", str(tmp_path / "val.csv"), "--classes", str(order))


def test_something_v1_and_v2(tmp_path: Path) -> None:
    labels = (LABEL_MAPS / "mmaction2__sthv1__label_map.txt").read_text().splitlines()
    one, root = tmp_path / "v1", tmp_path / "root"
    one.mkdir()
    (one / "something-something-v1-labels.csv").write_text("\n".join(labels) + "\n")
    (one / "something-something-v1-train.csv").write_text(f"100218;{labels[3]}\n24413;{labels[0]}\n")
    (one / "something-something-v1-validation.csv").write_text(f"7;{labels[173]}\n")
    (one / "something-something-v1-test.csv").write_text("8\n")
    touch(root, "100218/00001.jpg", "7/00001.jpg", "7.webm")
    out = make("sthv1", tmp_path, "--annotations", str(one))
    assert read_class_names(out / "classInd.txt", 174) == labels
    assert rows(out, "train", root, 174) == [("100218", 3)]
    assert rows(out, "val", root, 174) == [("7", 173)]
    assert (out / "missing_train.txt").read_text().startswith("24413\tHolding something\t")

    two = tmp_path / "v2"
    two.mkdir()
    (two / "something-something-v2-labels.json").write_text(json.dumps({"Holding something": "1", "Moving [x]": "0"}))
    entry = {"id": "7", "label": "holding a cup", "template": "Holding [something]"}
    (two / "something-something-v2-train.json").write_text("[]")
    (two / "something-something-v2-validation.json").write_text(json.dumps([entry]))
    out = make("sthv2", tmp_path, "--annotations", str(two), "--store", "video", "--force")
    assert rows(out, "val", root, 2) == [("7.webm", 1)]


ACTIVITYNET = {
    "database": {
        "aa": {
            "subset": "training",
            "annotations": [{"segment": [0.5, 4], "label": "B"}, {"segment": [5, 6], "label": "B"}],
        },
        "bb": {"subset": "validation", "annotations": [{"segment": [1, 2], "label": "A"}]},
        "cc": {"subset": "testing", "annotations": []},
    }
}  # fmt: skip


def test_activitynet_whole_videos_and_segments(tmp_path: Path) -> None:
    (tmp_path / "anet.json").write_text(json.dumps(ACTIVITYNET))
    root = tmp_path / "root"
    touch(root, "v_aa.mp4", "v_bb.mp4", "frames/v_aa/img_00001.jpg")
    out = make("activitynet", tmp_path, "--annotations", str(tmp_path / "anet.json"))
    assert rows(out, "train", root, 2) == [("v_aa.mp4", 1)]
    extra = ("--annotations", str(tmp_path / "anet.json"), "--store", "frames", "--segments", "10", "--force")
    out = make("activitynet", tmp_path, *extra)
    segments = Records.load(out / "train.txt", root, num_class=2)
    assert (segments.starts.tolist(), segments.frames.tolist()) == ([5, 50], [35, 10])


# -------------------------------------------------------------------------------------------------- folders and errors


def test_folders_without_annotations(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, *(f"{name}/p{person}_{i}.mp4" for name in ("a", "b c") for person in range(5) for i in range(4)))
    out = make("folder", tmp_path)
    train, val = rows(out, "train", root, 2), rows(out, "val", root, 2)
    assert (len(train), len(val)) == (32, 8)
    assert sorted(label for _, label in val) == [0] * 4 + [1] * 4
    touch(root, "a/p9_0.mp4")
    more = lists.main(["folder", "--root", str(root), "--out", str(tmp_path / "more")])
    assert more == 0
    assert len(set(rows(tmp_path / "more", "val", root, 2)) & set(val)) >= 7  # a new video moves no others
    out = make("folder", tmp_path, "--group", r"p\d", "--force")
    people = [{path.split("/")[1][:2] for path, _ in rows(out, split, root, 2)} for split in ("train", "val")]
    assert all(people)
    assert not people[0] & people[1]


def test_videos_without_a_match_are_groups_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    touch(root, *(f"{name}/p{person}_{i}.mp4" for name in "ab" for person in range(3) for i in range(4)))
    touch(root, *(f"c/v_{i}.avi" for i in range(6)))
    out = make("folder", tmp_path, "--group", r"p\d+(?=_)")
    output = capsys.readouterr().out
    assert "3 groups, none of them in both lists; 6 videos without a match each form a group of their own" in output
    lists_of = {split: [path for path, _ in rows(out, split, root, 3)] for split in ("train", "val")}
    people = [{path.split("/")[1][:2] for path in paths if path[0] in "ab"} for paths in lists_of.values()]
    assert not people[0] & people[1]
    assert sum(map(len, lists_of.values())) == 30

    with pytest.raises(UserError, match="finds nothing in any path, for example not in a/p0_0.mp4"):
        make("folder", tmp_path, "--group", r"person\d", "--force")
    touch(tmp_path / "split", "train/a/p1_0.mp4", "val/a/p1_1.mp4")
    with pytest.raises(UserError, match="--group: the split folders already determine"):
        make("folder", tmp_path, "--group", r"p\d", "--force", root=tmp_path / "split")


def test_classes_without_a_video_in_a_list_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    touch(root, *(f"a/{i}.mp4" for i in range(8)), "b/only.mp4", "c/0.mp4", "c/1.mp4")
    make("folder", tmp_path)
    output = capsys.readouterr().out
    assert f"scan {tmp_path}/lists/train.txt {tmp_path}/lists/val.txt --root {root}\n" in output
    train, val = output.split("val.txt: ", 1)
    assert "no video of" not in train
    assert "  no video of: b\n" in val  # of two videos one is drawn, of one none


def test_folders_of_splits_may_repeat_names(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "train/a/1.mp4", "train/a/x/1.mp4", "val/a/1.mp4", "val/b/1.mp4")
    out = make("folder", tmp_path)
    assert rows(out, "train", root, 2) == [("train/a/1.mp4", 0), ("train/a/x/1.mp4", 0)]
    assert rows(out, "val", root, 2) == [("val/a/1.mp4", 0), ("val/b/1.mp4", 1)]


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root, "a/1.mp4", "a/2.mp4")
    out = make("folder", tmp_path)
    before = {path: path.read_bytes() for path in out.iterdir()}
    make("folder", tmp_path)  # the same again is no change
    touch(root, "a/3.mp4")
    with pytest.raises(UserError, match=r"train\.txt.*would change.*--force"):
        make("folder", tmp_path)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    make("folder", tmp_path, "--force")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classInd.txt", "1 Archery\n3 Bowling\n", r"classInd\.txt:2: expected `2 NAME`"),
        ("trainlist01.txt", "Archery/v_a.avi 1\nArchery/v_b.avi 2\n", r"trainlist01\.txt:2: label 2, but .* as 1"),
        ("testlist01.txt", "Archary/v_c.avi\n", r"testlist01\.txt:1: 'Archary' is not one.*mean Archery"),
        ("testlist01.txt", "v_c.avi\n", r"testlist01\.txt:1: expected `CLASS/NAME\.avi`"),
        ("trainlist01.txt", None, "the train list of split 1 is missing"),
    ],
)
def test_wrong_annotations_are_named_with_their_line(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    official = tmp_path / "official"
    official.mkdir()
    (official / "classInd.txt").write_text("1 Archery\n2 Bowling\n")
    (official / "trainlist01.txt").write_text("Archery/v_a.avi 1\n")
    (official / "testlist01.txt").write_text("Bowling/v_b.avi\n")
    touch(tmp_path / "root", "v_a.avi")
    if text is None:
        (official / name).unlink()
    else:
        (official / name).write_text(text)
    with pytest.raises(UserError, match=message):
        make("ucf101", tmp_path, "--annotations", str(official))


def test_a_root_without_the_videos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text(KINETICS.format("val"))
    touch(tmp_path / "root", "other.mp4")
    with pytest.raises(UserError, match=r"none of the 3 samples is below the root.*found other\.mp4"):
        make("kinetics", tmp_path, "--annotations", str(tmp_path / "val.csv"))
    shutil.rmtree(tmp_path / "root")
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match="no video"):
        make("kinetics", tmp_path, "--annotations", str(tmp_path / "val.csv"))


def test_walk_follows_links_and_comes_back(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.mp4", "a/f/img_00001.jpg", "a/f/img_00002.jpg", "a/2.fsh", "a/notes.txt", ".hidden/3.mp4")
    os.symlink(tmp_path / "a", tmp_path / "a" / "loop")
    assert list(walk(str(tmp_path))) == [Media("a/1.mp4", "video"), Media("a/2.fsh", "frames"), Media("a/f", "frames")]


def test_names_with_a_line_feed_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    touch(root, "a/1.mp4", "a/2.mp4", "a/x\ny.mp4")
    (root / os.fsdecode(b"b\xff")).mkdir()
    touch(root, os.fsdecode(b"b\xff/1.mp4"))
    out = make("folder", tmp_path)
    assert r"their names hold a line feed (1): 'a/x\ny.mp4'" in capsys.readouterr().out
    assert len(rows(out, "train", root, 2) + rows(out, "val", root, 2)) == 3
    touch(root, "v_aa.mp4")
    for label in ("two\nlines", "\ud800"):
        text = json.dumps(ACTIVITYNET).replace('"A"', json.dumps(label))
        (tmp_path / "anet.json").write_text(text.replace('"bb"', json.dumps(f"bb{label}")))
        with pytest.raises(UserError, match="the class name .* does not fit into a line"):
            make("activitynet", tmp_path, "--annotations", str(tmp_path / "anet.json"), "--force", root=root)
    (tmp_path / "anet.json").write_text(json.dumps(ACTIVITYNET).replace('"bb"', json.dumps("b\nb\ud800")))
    out = make("activitynet", tmp_path, "--annotations", str(tmp_path / "anet.json"), "--force", root=root)
    assert (out / "missing_val.txt").read_text().split("\t")[0] == r"'v_b\nb\ud800'"


@pytest.mark.parametrize("rate", ["inf", "nan", "0", "1e12"])
def test_segments_fit_into_32_bits(rate: str, tmp_path: Path) -> None:
    (tmp_path / "anet.json").write_text(json.dumps(ACTIVITYNET))
    touch(tmp_path / "root", "frames/v_aa/img_00001.jpg")
    with pytest.raises(UserError, match="--segments"):
        make("activitynet", tmp_path, "--annotations", str(tmp_path / "anet.json"), "--segments", rate)


def test_segments_without_an_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "anet.json").write_text(json.dumps(ACTIVITYNET).replace("[1, 2]", "[1, Infinity]"))
    touch(tmp_path / "root", "frames/v_aa/img_00001.jpg")
    with pytest.raises(UserError, match=r"anet\.json: bb: expected"):
        make("activitynet", tmp_path, "--annotations", str(tmp_path / "anet.json"))
