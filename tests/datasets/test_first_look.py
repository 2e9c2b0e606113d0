"""Messages before the first iteration: wrong roots, the wrong reader, the same video in both lists."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from anal_tools import check_config
from datasets.lists import first_look
from datasets.lists.records import Records
from utils import config
from utils.config import verb
from utils.config.paths import ROOT
from utils.errors import UserError

NAMES = [f"class{n % 3}/v{n:03d}.mp4" for n in range(40)]
JPEG = b"\xff\xd8\xff\xe0" + bytes(20)


def make_folder(
    folder: Path, names: list[str] = NAMES, *, form: str = "video", data: bytes = b"\0\0\0\x18ftypmp42"
) -> Path:
    """A folder with empty videos, or folders of images."""
    for name in names:
        path = folder / name
        if form == "frames":
            path.mkdir(parents=True)
            (path / "img_00001.jpg").write_bytes(JPEG)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def listed(file: Path, root: Path, names: list[str] = NAMES, *, offsets: bool = False) -> Records:
    lines = (f"{name} {n * 10} 8 {n % 3}\n" if offsets else f"{name} {n % 3}\n" for n, name in enumerate(names))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))
    return Records.load(file, root, num_class=3)


def cfg_of(reader: str) -> Any:
    return types.SimpleNamespace(data=types.SimpleNamespace(reader=reader))


def look(reader: str, train: Records, val: Records) -> list[str]:
    return first_look.look(cfg_of(reader), train, val)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "videos")


def test_good_lists_say_nothing(tmp_path: Path, videos: Path) -> None:
    train, val = listed(tmp_path / "a.txt", videos, NAMES[:30]), listed(tmp_path / "b.txt", videos, NAMES[30:])
    assert look("video", train, val) == look("dali", train, val) == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_wrong_root_is_named_with_the_full_path(tmp_path: Path, videos: Path, split: str) -> None:
    good, bad = listed(tmp_path / "a.txt", videos), listed(tmp_path / "b.txt", tmp_path / "else")
    with pytest.raises(UserError) as caught:
        look("video", *((bad, good) if split == "train" else (good, bad)))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/b.txt: none of 8 videos of 40 that were looked at exists below {tmp_path}/else")
    assert f"for example {tmp_path}/else/class0/v000.mp4" in text
    assert f"common.{split}_root" in text
    assert "\n" not in text


def test_the_right_root_is_proposed(tmp_path: Path, videos: Path) -> None:
    for root, says in (
        (videos / "class0", f"It exists below {videos}."),
        (tmp_path, f"It exists below {videos}."),
        (videos, f"It exists below {tmp_path}."),
    ):
        names = [f"videos/{name}" for name in NAMES] if root == videos else NAMES
        with pytest.raises(UserError, match=says):
            first_look.check_files(cfg_of("video"), "train", listed(tmp_path / "l.txt", root, names))


def test_some_missing_videos_are_left_to_the_budget(tmp_path: Path, videos: Path) -> None:
    for name in NAMES[:35]:
        (videos / name).unlink()
    first_look.check_files(cfg_of("video"), "train", listed(tmp_path / "a.txt", videos))


def test_one_video(tmp_path: Path, videos: Path) -> None:
    first_look.check_files(cfg_of("video"), "val", listed(tmp_path / "a.txt", videos, NAMES[:1]))
    with pytest.raises(UserError, match="the only video does not exist below"):
        first_look.check_files(cfg_of("video"), "val", listed(tmp_path / "a.txt", videos, ["no.mp4"]))


@pytest.mark.parametrize("reader", ["frames", "memcached"])
def test_videos_for_a_reader_of_frames(tmp_path: Path, videos: Path, reader: str) -> None:
    records = listed(tmp_path / "a.txt", videos)
    with pytest.raises(UserError, match=r"are video files, for example .*class0/v000.mp4: set data.reader: video"):
        look(reader, records, records)


AVI, WEBP = (b"RIFF\0\1\0\0" + kind for kind in (b"AVI LIST", b"WEBPVP8 "))


def test_avi_files_are_videos_and_webp_files_are_not(tmp_path: Path) -> None:
    names = [name.replace(".mp4", ".avi") for name in NAMES]
    films = listed(tmp_path / "a.txt", make_folder(tmp_path / "films", names, data=AVI), names)
    with pytest.raises(UserError, match=r"are video files, for example .*class0/v000.avi: set data.reader: video"):
        look("frames", films, films)
    first_look.check_files(
        cfg_of("frames"), "train", listed(tmp_path / "b.txt", make_folder(tmp_path / "i", data=WEBP))
    )


def test_folders_for_the_video_reader(tmp_path: Path) -> None:
    records = listed(tmp_path / "a.txt", make_folder(tmp_path / "frames", form="frames"))
    with pytest.raises(UserError, match=r"are folders.*set data.reader: frames"):
        look("video", records, records)
    assert "both lists" in look("frames", records, records)[0]


def test_images_with_the_ending_of_a_video_are_no_videos(tmp_path: Path) -> None:
    records = listed(tmp_path / "a.txt", make_folder(tmp_path / "images", data=JPEG))
    first_look.check_files(cfg_of("frames"), "train", records)


def test_shards_are_for_the_reader_of_frames(tmp_path: Path) -> None:
    names = [name.replace(".mp4", ".fsh") for name in NAMES]
    first_look.check_files(
        cfg_of("frames"), "train", listed(tmp_path / "a.txt", make_folder(tmp_path / "s", names), names)
    )


# ------------------------------------------------------------------------------------------------- the same in both


def test_the_same_videos_in_both_lists(tmp_path: Path, videos: Path) -> None:
    train, val = listed(tmp_path / "a.txt", videos, NAMES[:30]), listed(tmp_path / "b.txt", videos, NAMES[25:])
    (text,) = look("video", train, val)
    assert text.startswith(f"WARNING: 5 videos are in both lists ({tmp_path}/a.txt, {tmp_path}/b.txt), for example ")
    assert f"{videos}/class" in text
    (text,) = look("video", train, listed(tmp_path / "b.txt", videos, NAMES[29:]))
    assert "1 video of the validation list is in both lists" in text


def test_another_root_that_leads_to_the_same_files(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "link").symlink_to(videos)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "same").symlink_to(videos / "class0")
    train = listed(tmp_path / "a.txt", videos)
    for root, names in (
        (tmp_path / "link", NAMES[:1]),
        (videos / "class0", ["v000.mp4"]),
        (tmp_path, ["videos/class0/v000.mp4"]),
        (tmp_path / "other", ["same/v000.mp4"]),
        (videos, ["class0/../class0/v000.mp4"]),
        (videos, [f"{videos}/class0/v000.mp4"]),
    ):
        assert len(first_look.both_lists(train, listed(tmp_path / "b.txt", root, names))) == 1, (root, names)
        assert len(first_look.both_lists(listed(tmp_path / "b.txt", root, names), train)) == 1, (root, names)
    copy = make_folder(tmp_path / "copy")
    assert first_look.both_lists(train, listed(tmp_path / "b.txt", copy)) == []


def test_parts_of_one_video_are_not_the_same(tmp_path: Path, videos: Path) -> None:
    train = listed(tmp_path / "a.txt", videos, ["class0/v000.mp4"] * 3, offsets=True)
    val = listed(tmp_path / "b.txt", videos, ["class1/v001.mp4", "class0/v000.mp4"], offsets=True)
    assert "from frame 10: the validation" in first_look.both_lists(train, val)[0]
    val = listed(tmp_path / "b.txt", videos, ["class0/v000.mp4"])
    assert "for example" in first_look.both_lists(train, val)[0]
    val = listed(tmp_path / "b.txt", videos, ["class1/v001.mp4"] * 5 + ["class0/v000.mp4"], offsets=True)
    assert first_look.both_lists(train, val) == []


def test_the_choice_of_files() -> None:
    assert [first_look.chosen(n) for n in (1, 2, 8)] == [[0], [0, 1], list(range(8))]
    for count in (9, 40, 10**6):
        indices = first_look.chosen(count)
        assert indices == sorted(set(indices))
        assert (indices[0], indices[-1], len(indices)) == (0, count - 1, 8)


# ---------------------------------------------------------------------------------------------- the verb `config`

CONFIG = """\
common:
    model: {{type: tsn, backbone: resnet18, num_segments: 3, num_class: 3}}
    batch_size: 2
    lr_scheduler: {{type: COSINE, base_lr: 0.01, max_iter: 100}}
    val_freq: 50
    train_root: {root}
    train_source: {folder}/train.txt
    val_root: {root}
    val_source: {folder}/val.txt
    data: {{reader: video}}
"""


def test_config_checks_the_files(tmp_path: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = tmp_path / "exp"
    exp.mkdir()
    (exp / "config.yaml").write_text(CONFIG.format(root=videos, folder=tmp_path))
    listed(tmp_path / "train.txt", videos, NAMES[:30])
    listed(tmp_path / "val.txt", videos, NAMES[30:])
    assert check_config.main([str(exp)]) == 0
    assert "num_segments: 3" in capsys.readouterr().out

    wrong = [
        "data.class_names=/nope", "model.num_class=2", "val_root=/nowhere", "data.reader=frames",
    ]  # fmt: skip
    cfg = config.load(exp, wrong)
    problems = check_config.problems(cfg)
    for part in ("there is no /nope", "train.txt:3: label 2 is outside 0..1", "there is no folder /nowhere"):
        assert sum(part in text for text in problems) == 1, (part, problems)
    assert any("set data.reader: video" in text for text in check_config.problems(config.load(exp, wrong[3:])))
    with pytest.raises(UserError, match=r"training would stop: 2 problem.*\n.*set data.reader: video"):
        check_config.main([str(exp), "--set", "data.reader=frames"])
    assert "reader:" in capsys.readouterr().out, "the config is printed all the same"
    assert check_config.main([str(exp), "--set", "data.reader=frames", "--keys-only"]) == 0
    assert verb.main([str(exp), "--set", "val_root=/nowhere"]) == 0, "keys alone, without a check"

    (tmp_path / "train.txt").unlink()
    problems = check_config.problems(cfg)
    assert any("there is no list file" in text for text in problems)
    assert any("val.txt:" in text and "label" in text for text in problems), "the other list is still read"


def test_the_demo_without_its_data_says_how_to_make_it(tmp_path: Path) -> None:
    cfg = config.load(ROOT / "exps/demo_exps/tsm_resnet18/motion8")
    if Path(cfg.train_source).exists():
        pytest.skip("the data of the demo are here")
    with pytest.raises(UserError, match="`python main.py demo-data` makes the demo's data"):
        config.check_files(cfg)
