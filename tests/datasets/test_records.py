"""List files: every layout, every refusal, a million records, and sharing between processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.lists.records import Records, read_class_names
from tests.golden import LABEL_MAPS
from utils.errors import UserError

Row = tuple[str, int, int, int]  # path, start, frames, label


def write(folder: Path, text: str | bytes, name: str = "list.txt") -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def load(file: Path, num_class: int | None = 10, root: str = "/data") -> Records:
    return Records.load(file, root, num_class=num_class)


def rows(records: Records) -> list[Row]:
    return [
        (records.path(i), int(records.starts[i]), int(records.frames[i]), int(records.labels[i]))
        for i in range(len(records))
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b.mp4 61 0\nc.mp4 5 1\n", [("a/b.mp4", 0, 61, 0), ("c.mp4", 0, 5, 1)]),
        ("a/b.mp4 0\nc.mp4 1", [("a/b.mp4", 0, -1, 0), ("c.mp4", 0, -1, 1)]),
        ("\ufeffa.mp4 0\r\n\r\n  b.mp4\t1  \r\n", [("a.mp4", 0, -1, 0), ("b.mp4", 0, -1, 1)]),
        (
            "my clip.mp4 61 0\nyour long clip 9.mp4 5 1\n",
            [("my clip.mp4", 0, 61, 0), ("your long clip 9.mp4", 0, 5, 1)],
        ),
        ("my clip.mp4 0\ntake 2 5\n", [("my clip.mp4", 0, -1, 0), ("take 2", 0, -1, 5)]),
        (
            "clip 12 300 5\nmy clip 300 5\nthe clip 9 1\n",
            [("clip 12", 0, 300, 5), ("my clip", 0, 300, 5), ("the clip", 0, 9, 1)],
        ),
        ("dir 2 300 5\nother 0 9 1\n", [("dir", 2, 300, 5), ("other", 0, 9, 1)]),
        ("clip 12\t300\t5\nclip 13\t301\t5\n", [("clip 12", 0, 300, 5), ("clip 13", 0, 301, 5)]),
        ("a.mp4,0\nb, c.mp4,1\n", [("a.mp4", 0, -1, 0), ("b, c.mp4", 0, -1, 1)]),
        ("path,n,label\na.mp4,61,0\nb.mp4, 5, 1\n", [("a.mp4", 0, 61, 0), ("b.mp4", 0, 5, 1)]),
        ("path label\na.mp4 0\n", [("a.mp4", 0, -1, 0)]),
        ('video,Label\n"a ""b"", c.mp4",3\n', [('a "b", c.mp4', 0, -1, 3)]),
        ("d,2,300,5\ne,0,9,1\n", [("d", 2, 300, 5), ("e", 0, 9, 1)]),
        (
            "/data/a.mp4 0\na/../b.mp4 1\nc..d.mp4 2\n",
            [("/data/a.mp4", 0, -1, 0), ("a/../b.mp4", 0, -1, 1), ("c..d.mp4", 0, -1, 2)],
        ),
        ("0001 0 7\n", [("0001", 0, 0, 7)]),
    ],
)
def test_layouts(tmp_path: Path, text: str, expected: list[Row]) -> None:
    assert rows(load(write(tmp_path, text))) == expected


def test_json_annotations(tmp_path: Path) -> None:
    entries = [
        {"filename": "a.mp4", "label": 0},
        {"frame_dir": "b c", "total_frames": 5, "label": [3]},
        {"frame_dir": "d", "offset": 2, "total_frames": 9, "label": 1},
    ]
    expected = [("a.mp4", 0, -1, 0), ("b c", 0, 5, 3), ("d", 2, 9, 1)]
    assert rows(load(write(tmp_path, json.dumps(entries, indent=2), "list.txt"))) == expected
    assert rows(load(write(tmp_path, json.dumps({"metainfo": {}, "data_list": entries}), "list.json"))) == expected


def test_paths_that_are_not_utf8(tmp_path: Path) -> None:
    records = load(write(tmp_path, b"caf\xe9.mp4 0\nn\xc3\xa4.mp4 1\n"))
    assert records.path(0) == "caf\udce9.mp4"
    assert records.path(1) == "nä.mp4"
    assert records.full_path(0) == "/data/caf\udce9.mp4"
    assert Records.from_fd(records.share()).path(0) == "caf\udce9.mp4"


def test_root_may_be_the_file_system(tmp_path: Path) -> None:
    """Lists with absolute paths are used with `train_root: /`."""
    records = load(write(tmp_path, "/mnt/a/b 61 0\nmnt/c 5 1\n"), root="/")
    assert [records.full_path(i) for i in range(2)] == ["/mnt/a/b", "/mnt/c"]


def test_relative_root_is_taken_from_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records = load(write(tmp_path, "a.mp4 0\n"), root="videos")
    monkeypatch.chdir("/")
    assert records.full_path(0) == str(tmp_path / "videos" / "a.mp4")


def test_hash_and_duplicates(tmp_path: Path) -> None:
    text = "a 1 0\nb 1 0\na 1 1\na 1 0\n"
    records = load(write(tmp_path, text))
    assert records.list_hash == hashlib.sha256(text.encode()).hexdigest()
    assert len(records) == 4
    assert records.duplicates == 2
    assert load(write(tmp_path, "a 1 9 0\na 2 9 0\na 1 9 0\n")).duplicates == 1  # other starts are other records


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the list is empty"),
        ("\n \n", "the list is empty"),
        ("path label\n", "the list is empty"),
        ("a 5 0\nb 0\nc 6 1\n", r":2: expected `path num_frames label`, found 'b 0'"),
        ("a 0\nb 1\nc 61 1\n", r":3: expected `path label`, found 'c 61 1'"),
        ("a 5 0\nb 5 3 5\nc 6 1\n", r":2: expected `path num_frames label`, found 'b 5 3 5'"),
        ("a 1 5 0\nb 2 5 1\nc 6 1\n", r":3: expected `path offset num_frames label`, found 'c 6 1'"),
        ("a 5 0\n\nb 5 x\nc 6 1\n", r":3: expected `path num_frames label`, found 'b 5 x'"),
        ("Class/a.avi\nClass/b.avi\n", r":1: expected `path label`, found 'Class/a.avi'"),
        ("a.mp4,0\nb.mp4 1\nc.mp4,2\n", r":2: expected `path label`, found 'b.mp4 1'"),
        (
            "a 5 0\nb 5 10\n",
            r":2: label 10 is outside 0\.\.9; the largest label here is 10, so num_class must be at least 11",
        ),
        ("a 5 1\nb 5 -1\n", r":2: label -1 is outside 0\.\.9; labels start at 0"),
        (
            "h label\na 1\n\nb 10\nc 2\n",
            r":4: label 10 is outside 0\.\.9; the labels of this list run from 1 to 10: subtract 1",
        ),
        ("a -5 0\n", r":1: num_frames is -5; it cannot be negative"),
        ("a 99999999999 0\n", "exceeds 32 bits"),
        ("a 0\n../b 1\n", r":2: '\.\./b' leads out of the root /data"),
        ("a 0\n/etc/passwd 1\n", r":2: '/etc/passwd' leads out of the root /data"),
        ("/data2/a 0\n", "leads out of the root"),
        ("a,0\n,1\n", r":2: the path is empty"),
        ("a\x00b 0\n", "not a text file"),
        (
            '[{"filename": "a", "label": 0}, {"filename": "b"}]',
            r"entry 2: `label` must be one whole number, found None",
        ),
        ('[{"filename": "a", "label": {"scene": [2]}}]', r"entry 1: `label` must be one whole number"),
        ('[{"label": 0}]', r"entry 1: no path"),
        ('[{"filename": "a", "label": 0}, {"filename": "b", "label": 12}]', r"entry 2: label 12 is outside"),
        ('[{"filename": "a", "label": 0},]', r":1: not valid JSON"),
    ],
)
def test_refusals(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(write(tmp_path, text))
    assert str(tmp_path / "list.txt") in str(caught.value)


def test_many_bad_lines_are_named_and_counted(tmp_path: Path) -> None:
    text = "".join(f"video{i}.mp4 {i} 0\n" for i in range(100)) + "bad\n" * 8
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text))
    lines = str(caught.value).split("\n")
    assert len(lines) == 6
    assert [":101:" in lines[0], ":105:" in lines[4]] == [True, True]
    assert "3 more lines do not fit" in lines[5]


def test_missing_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such list file"):
        load(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)


def test_bad_line_far_into_a_large_list(tmp_path: Path) -> None:
    """Blocks of the reader end inside lines; numbers of lines must not be lost."""
    lines = [f"a_rather_long_folder_name_to_fill_blocks/video_{i:06d} {i} 3" for i in range(60_000)]
    file = write(tmp_path, "\n".join(lines))
    records = load(file)
    assert records.path(59_999) == lines[-1].split()[0]
    assert records.frames.tolist() == list(range(60_000))
    lines[48_765] = lines[48_765].removesuffix(" 3")
    with pytest.raises(UserError, match=":48766: expected"):
        load(write(tmp_path, "\n".join(lines)))


names = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n\x00\x0b\x0c\x1c\x1d\x1e\x1f\x85"), min_size=1)


@settings(deadline=None)
@given(entries=st.lists(st.tuples(names, st.integers(0, 2**31 - 1), st.integers(0, 9)), min_size=1, max_size=20))
def test_any_path_survives_a_tab_separated_list(tmp_path_factory: pytest.TempPathFactory, entries: list) -> None:
    entries = [("v" + path + "v", n, label) for path, n, label in entries]
    text = "".join(f"{path}\t{n}\t{label}\n" for path, n, label in entries)
    records = load(write(tmp_path_factory.mktemp("lists"), text))
    assert rows(records) == [(path, 0, n, label) for path, n, label in entries]


def test_real_lists(shared_data: Path) -> None:
    lists = shared_data / "lists"
    weizmann = Records.load(lists / "weizmann4" / "train.txt", shared_data, num_class=4)
    assert len(weizmann) == 40
    assert rows(weizmann)[0] == ("weizmann4/bend/p0_bend.mp4", 0, 61, 0)
    videos = Records.load(lists / "weizmann4" / "train_videos.txt", shared_data, num_class=4)
    assert [videos.path(i) for i in range(40)] == [weizmann.path(i) for i in range(40)]
    assert set(videos.frames.tolist()) == {-1}
    official = lists / "official"
    assert len(Records.load(official / "k400" / "paddlevideo__val_small_frames.list", "/", num_class=400)) == 200
    raivo = Records.load(official / "k400" / "raivokoot__valid_processed.txt", "/", num_class=400)
    assert rows(raivo)[0] == ("0wR5jVB-WPk_000417_000427", 0, 299, 0)
    offset = official / "mmaction2_test_annotations" / "rawframe_test_list_with_offset.txt"
    assert rows(Records.load(offset, "/", num_class=400)) == [("imgs", 2, 5, 127)] * 2
    ucf = next((official / "ucf101_splits").glob("trainlist01*"))
    with pytest.raises(UserError, match="run from 1 to 101: subtract 1"):
        Records.load(ucf, "/", num_class=101)


MEASURE = """
import resource, sys, time
from datasets.lists.records import Records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
records = Records.load(sys.argv[1], "/", num_class=400)
seconds = time.process_time() - start
records.share()
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
assert len(records) == 1_000_000 and records.frames[-1] == 100 and records.path(999_999).endswith("0999999.mp4")
print(grown, seconds)
"""


def test_a_million_records(tmp_path: Path, repo_root: Path) -> None:
    file = tmp_path / "big.txt"
    with file.open("w") as f:
        f.writelines(
            f"train_256/class_{i % 400:03d}/{i:011d}_000012_{i:07d}.mp4 {i % 300 + 1} {i % 400}\n"
            for i in range(1_000_000)
        )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes <= 150
    assert seconds <= 15  # about 2 on an idle core


CHILD = """
import sys
from datasets.lists.records import Records
records = Records.from_fd(int(sys.argv[1]))
try:
    records.labels[0] = 5
except ValueError:
    print(len(records), records.full_path(1), records.labels.tolist(), records.list_hash, records.duplicates)
assert "torch" not in sys.modules
"""


def test_another_process_maps_what_was_shared(tmp_path: Path, repo_root: Path) -> None:
    records = load(write(tmp_path, "a.mp4 3 1\nb c.mp4 4 2\na.mp4 3 1\n"))
    private = rows(records)
    fd = records.share()
    assert records.share() == fd
    assert rows(records) == private
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(fd)],
        cwd=repo_root,
        pass_fds=[fd],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"3 /data/b c.mp4 [1, 2, 1] {records.list_hash} 1"


def test_from_fd_refuses_other_files(tmp_path: Path) -> None:
    with write(tmp_path, b"something else").open("rb") as f, pytest.raises(ValueError, match="holds no records"):
        Records.from_fd(f.fileno())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 bend\n1 jack it up\n", ["bend", "jack it up"]),
        ("1 ApplyEyeMakeup\n2 Archery\n", ["ApplyEyeMakeup", "Archery"]),
        ("2 b\n1 a\n", ["a", "b"]),
        ("Holding something\nTurning [something] 2 times\n", ["Holding something", "Turning [something] 2 times"]),
        ("id,name\n0,abseiling\n1,air drumming\n", ["abseiling", "air drumming"]),
        ("0: aerobic_push_up\r\n1: other\r\n", ["aerobic_push_up", "other"]),
        ("3 pointers\nlay-up\n", ["3 pointers", "lay-up"]),
    ],
)
def test_class_names(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert read_class_names(write(tmp_path, text), 2) == expected


def test_class_names_from_json(tmp_path: Path) -> None:
    assert read_class_names(write(tmp_path, '["a", "b"]', "names.json"), 2) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0 a\n1 b\n2 c\n", "3 class names, but num_class is 2"),
        ("", "0 class names"),
        ("0 a\n2 b\n", r"2 \(b\) found where 1 is expected"),
        ("0 a\n0 b\n", r"0 \(b\) found where 1 is expected"),
        ("5 a\n6 b\n", r"5 \(a\) found where 0 or 1 is expected"),
    ],
)
def test_class_name_refusals(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_class_names(write(tmp_path, text), 2)
    with pytest.raises(UserError, match="no such file"):
        read_class_names(tmp_path / "none.txt", 2)


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("mmaction2__kinetics__label_map_k400", 400, "abseiling", "zumba"),
        ("mmaction2__kinetics__label_map_k600", 600, "abseiling", "zumba"),
        ("mmaction2__kinetics__label_map_k700", 700, "abseiling", "zumba"),
        ("mmaction2__kinetics710__label_map_k710", 710, "abseiling", None),
        ("mmaction2__sthv1__label_map", 174, "Holding something", None),
        ("mmaction2__sthv2__label_map", 174, "Approaching something with your camera", None),
        ("mmaction2__ucf101__label_map", 101, "ApplyEyeMakeup", "YoYo"),
        ("mmaction2__hmdb51__label_map", 51, "brush_hair", "wave"),
        ("mmaction2__diving48__label_map", 48, "Back+15som+05Twis+FREE", None),
        ("mmaction2__activitynet__label_map", 200, "Applying sunscreen", None),
        ("mmaction2__mit__label_map", 339, "clapping", None),
        ("mmaction2__mmit__label_map", 313, "crafting", None),
        ("mmaction2__jester__label_map", 27, "Swiping Left", None),
        ("mmaction2__multisports__label_map", 66, "aerobic_push_up", None),
        ("mmaction2__gym__label_map", 99, None, None),
        ("mmaction2__skeleton__label_map_ntu60", 60, "drink water", None),
    ],
)
def test_official_label_maps(name: str, count: int, first: str | None, last: str | None) -> None:
    got = read_class_names(LABEL_MAPS / f"{name}.txt", count)
    assert first in (None, got[0])
    assert last in (None, got[-1])


def test_ava_has_gaps() -> None:
    with pytest.raises(UserError, match="gaps"):
        read_class_names(LABEL_MAPS / "mmaction2__ava__label_map.txt", 60)


def test_class_ind_of_ucf101_and_weizmann(shared_data: Path) -> None:
    lists = shared_data / "lists"
    assert read_class_names(lists / "weizmann4" / "classInd.txt", 4)[:2] == ["bend", "jack"]
    ucf = next((lists / "official" / "ucf101_splits").glob("*lassInd*"))
    assert read_class_names(ucf, 101)[0] == "ApplyEyeMakeup"


# ------------------------------------------------------------------------------------------- several labels per video


def load_multi_label(file: Path, layout: str, num_class: int | None = 10) -> Records:
    return Records.load(file, "/data", num_class=num_class, layout=layout)


@pytest.mark.parametrize(
    ("layout", "text", "expected"),
    [
        ("path_frames_labels", "a/b 61 0 3 9\nc 5 1\n", [("a/b", 61, [0, 3, 9]), ("c", 5, [1])]),
        ("path_labels", "a.mp4 0 3\n\nc.mp4 1\r\n", [("a.mp4", -1, [0, 3]), ("c.mp4", -1, [1])]),
        ("path_labels", "my clip.mp4\t2\t1\nother\t7\n", [("my clip.mp4", -1, [2, 1]), ("other", -1, [7])]),
        ("path_frames_labels", 'path,n,labels\n"a, b",5,0,3\nc,9,1,\n', [("a, b", 5, [0, 3]), ("c", 9, [1])]),
        ("path_frames_labels", "path num_frames label\nmy d 9 4 4\n", [("my d", 9, [4, 4])]),
        ("path_frames_labels", "take 2\t9\t4\t5\n", [("take 2", 9, [4, 5])]),
    ],
)
def test_several_labels(tmp_path: Path, layout: str, text: str, expected: list) -> None:
    records = load_multi_label(write(tmp_path, text), layout)
    rows = [(records.path(i), int(records.frames[i]), records.labels_of(i).tolist()) for i in range(len(records))]
    assert rows == expected
    assert records.multi_label
    assert records.labels.tolist() == [labels[0] for _, _, labels in expected]
    targets = records.targets
    assert targets is not None
    assert targets.shape == (len(expected), 10)
    for i, (_, _, labels) in enumerate(expected):
        assert np.flatnonzero(targets[i]).tolist() == sorted(set(labels))
        assert records.multi_hot(i).tolist() == targets[i].astype(float).tolist()


@pytest.mark.parametrize("name", ["a\nb.mp4", "a\0b.mp4", "\ud800.mp4"])
def test_json_names_that_no_list_can_hold_are_refused(name: str, tmp_path: Path) -> None:
    entries = [{"path": os.fsdecode(b"\xff.mp4"), "label": 0}, {"path": name, "label": 0}]
    with pytest.raises(UserError, match=r"list\.json: entry 2: "):
        load(write(tmp_path, json.dumps(entries), "list.json"))
    raw = json.dumps(entries[:1], ensure_ascii=False).encode("utf-8", "surrogateescape")
    for text in (raw, json.dumps(entries[:1])):
        assert rows(load(write(tmp_path, text, "list.json")))[0][0] == entries[0]["path"]


def test_several_labels_of_a_json_list(tmp_path: Path) -> None:
    entries = [{"frame_dir": "a", "total_frames": 5, "label": [3, 1]}, {"frame_dir": "b", "label": 2}]
    file = write(tmp_path, json.dumps(entries), "list.json")
    for layout in ("auto", "path_labels"):
        records = load_multi_label(file, layout)
        assert [records.labels_of(i).tolist() for i in range(2)] == [[3, 1], [2]]
    single = write(tmp_path, json.dumps(entries[1:]), "single.json")
    assert load(single).targets is None
    assert load_multi_label(single, "path_labels").multi_label


def test_several_labels_are_shared_with_workers(tmp_path: Path) -> None:
    records = load_multi_label(write(tmp_path, "a 61 0 3 9\nc 5 1\n"), "path_frames_labels")
    mapped = Records.from_fd(records.share())
    assert mapped.multi_label
    assert mapped.labels_of(0).tolist() == [0, 3, 9]
    assert mapped.multi_hot(1).tolist() == records.multi_hot(1).tolist()


def test_members_of_each_class(tmp_path: Path) -> None:
    single = load(write(tmp_path, "a 5 2\nb 5 0\nc 5 2\n"))
    assert [part.tolist() for part in single.members()] == [[1], [0, 2]]
    multi_label = load_multi_label(write(tmp_path, "a 5 2 0\nb 5 0\nc 5 2 2\n"), "path_frames_labels")
    assert [part.tolist() for part in multi_label.members()] == [[0, 1], [0, 2]]


@pytest.mark.parametrize(
    ("layout", "text", "expected"),
    [
        ("path_frames_labels", "a 5 1\nb 5\nc 5 2\n", "list.txt:2: expected `path num_frames label [label ...]`"),
        ("path_labels", "a b one\n", "list.txt:1: expected `path label [label ...]`, found 'a b one'"),
        ("path_labels", "a 1\n" + "b\n" * 7, "2 more lines do not fit"),
        ("path_labels", "a 1\nb 2 10\n", "list.txt:2: label 10 is outside 0..9"),
        ("path_labels", "\n\n", "the list is empty"),
        ("path_frames_labels", "a -5 1\n", "list.txt:1: num_frames is -5"),
        ("path_labels", "../a 1\n", "leads out of the root"),
        ("path_labels", "a 99999999999\n", "exceeds 32 bits"),
    ],
)
def test_what_is_wrong_with_a_list_of_several_labels(tmp_path: Path, layout: str, text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_multi_label(write(tmp_path, text), layout)
    assert expected in str(caught.value)
