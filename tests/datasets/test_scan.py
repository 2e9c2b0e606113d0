from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from datasets.lists.records import Records
from datasets.loading.messages import Look
from datasets.scan import verb as scan
from datasets.scan.file import is_variable
from datasets.scan.journal import Journal
from datasets.scan.page import render
from tests.datasets.specs import reader_spec
from tests.datasets.videos import decode_all, frame_image, records_of, write_video
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of every kind of file, with bad ones and copies."""
    root = tmp_path_factory.mktemp("data")
    write_video(root / "a.mp4", "libx264", 12)
    write_video(root / "vfr.mp4", "libx264", 12, stamps=[i * 40 + (i % 3) * 15 for i in range(12)])
    shutil.copy(root / "a.mp4", root / "copy of a.mp4")
    with open(os.devnull, "w") as null:
        remux = ["ffmpeg", "-v", "error", "-i", str(root / "a.mp4"), "-c", "copy", str(root / "remux.mkv")]
        subprocess.run(remux, check=True, stdin=subprocess.DEVNULL, stdout=null)
    (root / "empty.mp4").write_bytes(b"")
    (root / "cut.mp4").write_bytes((root / "a.mp4").read_bytes()[:700])
    for name, numbers in (("frames", range(1, 8)), ("gap", (1, 2, 3, 5, 6))):
        (root / name).mkdir()
        for number in numbers:
            cv2.imwrite(str(root / name / f"img_{number:05d}.jpg"), frame_image(number + len(name)))
    cv2.imwrite(str(root / "one.jpg"), frame_image(9))
    (root / "train.txt").write_text(
        "a.mp4\t99\t0\nempty.mp4\t5\t0\nframes\t7\t1\ngap\t6\t1\none.jpg\t1\t2\ncut.mp4\t3\t2\n"
    )
    (root / "val.txt").write_text(
        "copy of a.mp4\t0\nremux.mkv\t0\nvfr.mp4\t1\n../data/frames\t1\n".replace("../data/", "")
    )
    (root / "classInd.txt").write_text("0 <b>bold</b>\n1 one\n2 two\n3 nothing\n")
    return root


def run(data: Path, out: Path, *extra: str, lists: tuple[str, ...] = ("train.txt", "val.txt")) -> int:
    files = [str(data / name) for name in lists]
    return scan.main([*files, "--root", str(data), "--out", str(out), "--workers", "2", *extra])


@pytest.fixture(scope="module")
def scanned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scan")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert run(data, out, "--decode", "all") == 1  # there are bad files
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    return out


def test_clean_lists_have_real_counts_and_no_bad_file(scanned: Path, data: Path) -> None:
    clean = Records.load(scanned / "train.clean.txt", data, num_class=4)
    rows = [(clean.path(i), int(clean.frames[i]), int(clean.labels[i])) for i in range(len(clean))]
    assert rows == [("a.mp4", 12, 0), ("frames", 7, 1), ("gap", 3, 1), ("one.jpg", 1, 2)]
    val = Records.load(scanned / "val.clean.txt", data, num_class=4)
    assert [val.path(i) for i in range(len(val))] == ["copy of a.mp4", "remux.mkv", "vfr.mp4", "frames"]


def test_what_is_said_of_each_list(scanned: Path) -> None:
    summary = json.loads((scanned / "scan.json").read_text())
    train, val = summary["lists"]
    assert {bad["path"]: bad["what"].split(" (")[0] for bad in train["bad"]} == {
        "empty.mp4": "the file is empty",
        "cut.mp4": "it cannot be opened as a video",
    }
    assert {one["path"] for one in train["wrong_counts"]} == {"a.mp4", "gap"}
    assert any("without a gap" in one["what"] for one in train["notes"])
    assert train["kinds"] == {"folder": 2, "video": 1, "image": 1}
    assert [row["videos"] - row["bad"] for row in train["classes"]] == [1, 2, 1, 0]
    assert val["variable_rate"] == 1
    assert val["codecs"] == {"h264": 3}


def test_the_same_video_is_found_across_lists(scanned: Path) -> None:
    same = json.loads((scanned / "scan.json").read_text())["same"]
    groups = {group["how"]: sorted(one["path"] for one in group["members"]) for group in same}
    assert groups == {
        "file": ["frames", "frames"],
        "bytes": ["a.mp4", "copy of a.mp4"],
        "pictures": ["a.mp4", "copy of a.mp4", "remux.mkv"],
    }
    assert all(group["across"] for group in same)


def test_a_second_scan_looks_only_at_what_changed(scanned: Path, data: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / "scan", tmp_path / "data"
    shutil.copytree(data, copy)
    assert run(copy, out, "--decode", "header") == 1
    lines = (out / "files.jsonl").read_bytes()
    assert run(copy, out, "--decode", "header") == 1
    assert (out / "files.jsonl").read_bytes() == lines
    write_video(copy / "empty.mp4", "libx264", 5)
    (out / "files.jsonl").write_bytes(lines + b'{"half a li')  # killed while it wrote
    assert run(copy, out, "--decode", "header") == 1
    more = (out / "files.jsonl").read_bytes()
    assert more.startswith(lines)
    assert [json.loads(line)["frames"] for line in more[len(lines) :].splitlines()] == [5]
    assert run(copy, out, lists=("val.txt",)) == 0  # a deeper look
    assert len((out / "files.jsonl").read_bytes().splitlines()) == len(more.splitlines()) + 4


def test_an_interrupted_scan_goes_on(motion_videos: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "main.py", "scan", str(motion_videos / "lists/train.txt"), "--root", str(motion_videos)]
    argv += ["--out", str(tmp_path), "--workers", "1", "--decode", "all"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "files.jsonl"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = journal.read_bytes()
    assert subprocess.run(argv, cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert journal.read_bytes().startswith(held[: held.rfind(b"\n") + 1])
    entries = [json.loads(line) for line in journal.read_bytes().splitlines()[1:]]
    paths = [entry["path"] for entry in entries if "clean" not in entry]
    assert len(paths) == len(set(paths)) == 48


def test_a_file_that_hangs_costs_only_itself(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A worker that reads this list stops by SIGSTOP at the first listing of `gap`, in an audit hook set at start-up.
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def hook(event, args):\n"
        "    if event == 'os.listdir' and str(args[0]).endswith('/gap'):\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "sys.addaudithook(hook)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"))
    assert run(data, tmp_path / "scan", "--deadline", "3", lists=("train.txt",)) == 1
    summary = json.loads((tmp_path / "scan" / "scan.json").read_text())
    bad = {one["path"]: one["what"] for one in summary["lists"][0]["bad"]}
    assert bad["gap"] == "took longer than 3 s"
    assert set(bad) == {"gap", "empty.mp4", "cut.mp4"}


def test_foreign_files_and_wrong_arguments_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "val.clean.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"val\.clean\.txt exists and was not written by a scan"):
        run(data, tmp_path / "mine")
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["mine\n"]
    (tmp_path / "files.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="not written by a scan"):
        run(data, tmp_path)
    assert (tmp_path / "files.jsonl").read_text() == "mine\n"
    with pytest.raises(UserError, match="not written by a scan"):
        run(data, tmp_path)  # and the first refusal left no lock behind
    with Journal(tmp_path / "held", reader_spec("frames")), pytest.raises(UserError, match="another scan is writing"):
        run(data, tmp_path / "held")
    with open(tmp_path / "held" / "files.jsonl", "a") as file:
        file.write('{"path": 3}\n')
    with pytest.raises(UserError, match=r"files\.jsonl:2: this line is damaged"):
        run(data, tmp_path / "held")
    with pytest.raises(UserError, match="no folder"):
        scan.main([str(data / "val.txt"), "--root", str(data / "no"), "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match=r"two lists are called train\.clean\.txt"):
        run(data, tmp_path / "x", lists=("train.txt", "train.txt"))


def test_page_escapes_and_loads_nothing(scanned: Path) -> None:
    page = (scanned / "index.html").read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    summary = json.loads((scanned / "scan.json").read_text())
    hostile = "\"><img src=x onerror=alert(1)>'&"
    summary["lists"][0]["list"] = hostile
    summary["lists"][0]["codecs"] = {hostile: 1}
    assert "<img" not in render(summary)


def test_page_in_a_browser(scanned: Path, started_browser: Any) -> None:
    page = started_browser.new_page(viewport={"width": 1280, "height": 900})
    messages, asked = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((scanned / "index.html").as_uri())
    assert page.locator("h2").count() == 3
    assert page.evaluate("getComputedStyle(document.querySelector('ul.numbers')).display") == "flex"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("ZOETROPE_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/scan.png", full_page=True)
    page.close()
    assert (messages, asked) == ([], [(scanned / "index.html").as_uri()])


@pytest.mark.parametrize(
    ("stamps", "variable"),
    [
        ([0, 40, 80, 120], False),
        ([0, 33, 67, 100, 133], False),
        ([120, 0, 40, 80], False),
        ([0, 40, 120, 160], True),
        ([0, 40], None),
        ([0, 0, 40, 80], None),
    ],
)
def test_variable_rate_is_seen_in_the_stamps(stamps: list[int], variable: bool | None) -> None:
    assert is_variable(stamps) is variable


@pytest.mark.system
def test_every_frame_is_decoded_by_all_only(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", "libx264", 40, options={"g": "10", "bf": "0", "sc_threshold": "0"})
    from tests.datasets.specs import build_index

    index = build_index(str(tmp_path / "a.mp4"), "a.mp4")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"mdat") + 4 + int(index.sizes[:15].sum())
    data[at : at + int(index.sizes[15])] = b"\xff" * int(index.sizes[15])
    (tmp_path / "a.mp4").write_bytes(data)
    assert len(decode_all(tmp_path / "a.mp4")) < 40
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    assert run(tmp_path, tmp_path / "ends", "--decode", "ends", lists=("list.txt",)) == 0
    assert run(tmp_path, tmp_path / "all", "--decode", "all", lists=("list.txt",)) == 1


def test_parts_of_a_video_keep_their_ends(data: Path, tmp_path: Path) -> None:
    (data / "parts.txt").write_text("frames 0 3 1\nframes 3 9 1\na.mp4 2 4 0\n")
    assert run(data, tmp_path, "--decode", "header", lists=("parts.txt",)) == 0
    assert (tmp_path / "parts.clean.txt").read_text() == "frames 0 3 1\nframes 3 4 1\na.mp4 2 4 0\n"
    (part,) = json.loads((tmp_path / "scan.json").read_text())["lists"]
    assert [one["what"] for one in part["wrong_counts"]] == ["the list has 9 frames, but there are 4"]


def test_frame_counts_of_the_list_are_given_back(data: Path) -> None:
    from datasets.scan.work import ask

    records = records_of(data, ["a.mp4 99 0"], name="told.txt")
    answers = list(ask(records, reader_spec("frames"), [Look(0, "header")], 1, 60.0))
    assert answers[0][1]["frames"] == 12
    assert np.array_equal(records.frames, [99])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--fps", "0"), "--fps: 0 is not a frame rate"),
        (("--fps", "nan"), "--fps: nan is not a frame rate"),
        (("--template", "img_00001.jpg"), "a file name with one number"),
        (("--template", "{:d"), "a file name with one number"),
        (("--classes", "absent.txt"), r"absent\.txt: No such file"),
        (("--classes", "a.mp4"), "is not a text file"),
        (("--missing-share", "1"), "--missing-share: 1: give a number from 0 to below 1"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(
    wrong: tuple[str, str], message: str, data: Path, tmp_path: Path
) -> None:
    flag, value = wrong
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "out", flag, str(data / value) if flag == "--classes" else value)
    assert not (tmp_path / "out").exists()


def test_clean_lists_of_others_stay(data: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    shutil.copy(data / "one.jpg", other / "one.jpg")
    (other / "ones.txt").write_text("one.jpg 0\n")
    shutil.copy(other / "ones.txt", data / "ones.txt")
    assert run(data, out, "--decode", "header", lists=("ones.txt",)) == 0
    assert run(data, out, "--decode", "header", lists=("ones.txt",)) == 0
    with pytest.raises(UserError, match=r"ones\.clean\.txt belongs to .*data.*/ones\.txt .* another --out"):
        run(other, out, lists=("ones.txt",))
    (out / "val.clean.txt").write_text("mine\n")
    with pytest.raises(UserError, match="was not written by a scan"):
        run(data, out, lists=("val.txt",))
    assert (out / "val.clean.txt").read_text() == "mine\n"
    os.remove(out / "ones.clean.txt")
    assert run(other, out, "--decode", "header", lists=("ones.txt",)) == 0


def test_journal_lines_that_lack_something_are_looked_at_again(data: Path, tmp_path: Path) -> None:
    (data / "ones.txt").write_text("one.jpg 0\n")
    assert run(data, tmp_path, "--decode", "header", lists=("ones.txt",)) == 0
    journal = tmp_path / "files.jsonl"
    head, line, *rest = journal.read_text().splitlines()
    for change in (
        {"level": "deep"},
        {"level": None},
        {"stamp": [1]},
        {"fps": None},
        {"frames": "7"},
        {"kind": "folder"},
    ):
        journal.write_text("\n".join([head, json.dumps(json.loads(line) | change), *rest]) + "\n")
        assert run(data, tmp_path, "--decode", "header", lists=("ones.txt",)) == 0
        last = json.loads(journal.read_text().splitlines()[-1])
        assert {name: last[name] for name in change} == {name: json.loads(line)[name] for name in change}


def test_all_frames_of_a_folder_are_decoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.readers.frames import FramesReader
    from datasets.scan.file import Examiner

    (tmp_path / "v").mkdir()
    ok, image = cv2.imencode(".jpg", frame_image(3))
    assert ok
    for number in range(1, 151):
        (tmp_path / "v" / f"{number:03d}.jpg").write_bytes(image.tobytes())
    asked: list[int] = []
    read = FramesReader._bytes
    monkeypatch.setattr(
        FramesReader, "_bytes", lambda self, i, layout, all_: (asked.append(len(all_)), read(self, i, layout, all_))[1]
    )
    examiner = Examiner(reader_spec("frames"), records_of(tmp_path, ["v 0"]))
    assert examiner.look(0, "all")["bad"] == ""
    assert max(asked) == 64
    assert sum(count for count in asked if count > 3) == 150
    (tmp_path / "v" / "149.jpg").write_bytes(image.tobytes()[:300])
    assert "149.jpg" in examiner.look(0, "all")["bad"]
