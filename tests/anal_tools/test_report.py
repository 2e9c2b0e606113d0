"""The data and the pictures of the report; what a browser makes of them is in test_report_page.py."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg

import main
from anal_tools import compare
from anal_tools.evaluate import protocols
from anal_tools.evaluate.protocols import Protocol
from anal_tools.evaluate.results import Results
from anal_tools.report import build, content, media, page
from datasets.plan.sampling import PRESETS, Sampling
from datasets.plan.views import EvalSpec
from tests.evaluated import guessed, motion_results, write_results
from tests.experiment import make as make_experiment
from utils.errors import UserError


def blocks_of(index: Path) -> dict[str, Any]:
    """The JSON blocks of a page."""
    scripts = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', index.read_text(), re.DOTALL)
    return {name: json.loads(text) for name, text in scripts}


def words(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2")


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """Real videos with chosen predictions: video i of 23 is called class i % 8, the fourth could not be read."""
    folder = make_experiment(tmp_path_factory.mktemp("reported") / "exp", motion_videos)
    guesses: list[int | None] = [row % 8 for row in range(23)]
    guesses[3] = None
    motion_results(folder, motion_videos, guesses)
    return folder


@pytest.fixture(scope="module")
def index(exp: Path) -> Path:
    return build.build([str(exp)], pictures=10, clips=3)


def test_what_the_page_holds_is_what_was_evaluated(exp: Path, index: Path) -> None:
    results, blocks = Results.load(exp), blocks_of(index)
    data, arrays = blocks["report-data"], blocks["experiment-0"]
    assert words(data["labels"]).tolist() == results.labels.tolist()
    assert blocks["names-0"] == results.ids
    guess = words(arrays["guess"]).reshape(-1, data["top"])
    score = words(arrays["score"]).reshape(-1, data["top"]) / 65535
    assert guess[3].tolist() == [content.UNREAD] * 5
    for row in (0, 1, 2, 22):
        order = np.argsort(-results.scores[row])
        assert guess[row].tolist() == order[:5].tolist()
        assert score[row] == pytest.approx(results.scores[row, order[:5]], abs=1e-5)
        assert words(arrays["own"])[row] / 65535 == pytest.approx(results.scores[row, results.labels[row]], abs=1e-5)
        assert order[words(arrays["rank"])[row]] == results.labels[row]
    overview = dict(data["experiments"][0]["overview"])
    right = int((results.scores[~results.failed].argmax(axis=1) == results.labels[~results.failed]).sum())
    assert overview["top-1"].startswith(f"{100 * right / 23:.2f} %")
    assert overview["videos"] == "23, 1 of them could not be read and count as wrong"
    assert data["comparison"] is None
    assert 'href="#compare"' not in index.read_text()


def test_sheets_show_the_frames_that_the_model_saw(exp: Path, index: Path, motion_videos: Path) -> None:
    from datasets.lists.records import Records
    from datasets.readers import open_reader
    from tests.datasets.specs import reader_spec

    results, shown = Results.load(exp), blocks_of(index)["report-data"]["media"]
    assert len(shown) == 10
    assert sum("clip" in one for one in shown.values()) == 3
    records = Records.load(motion_videos / "lists/val.txt", motion_videos, num_class=8)
    reader = open_reader(reader_spec("video"), records)
    for row, one in shown.items():
        assert one["frames"] == results.frames[int(row), 0].tolist()
        sheet = simplejpeg.decode_jpeg((index.parent / one["sheet"]).read_bytes()).astype(float)
        assert sheet.shape == (one["height"], one["width"], 3) == (2 * 128 + 4, 4 * 128 + 12, 3)
        whole = np.empty((8, 64, 64, 3), np.uint8)
        reader.read(int(row), np.array(one["frames"]), None, (64, 64), whole)
        for place in range(8):
            y, x = place // 4 * 132, place % 4 * 132
            seen = cv2.resize(sheet[y : y + 128, x : x + 128], (56, 56), interpolation=cv2.INTER_AREA)
            distance, other = (np.abs(seen - whole[k, 4:60, 4:60]).mean() for k in (place, (place + 4) % 8))
            assert distance < 8  # JPEG
            assert distance < other / 1.5
    reader.close()


def test_clips_play_the_whole_video_and_know_when_each_frame_comes(exp: Path, index: Path) -> None:
    import av

    shown = blocks_of(index)["report-data"]["media"]
    one = next(one for one in shown.values() if "clip" in one)
    with av.open(str(index.parent / one["clip"])) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "vp8"
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    assert len(frames) == 8  # 16 frames at 16/s are thinned to at most 15/s
    times = [time for time, _ in frames]
    for frame, at in zip(one["frames"], one["times"], strict=True):
        shown_at = max(i for i, time in enumerate(times) if time <= at)
        assert shown_at == frame // 2
    assert "part" not in one


def test_the_part_of_a_long_video() -> None:
    assert media.clip_part(300, 30.0, np.array([0, 299])) == range(0, 300, 2)
    assert media.clip_part(3000, 25.0, np.array([1000, 1063])) == range(781, 1281, 2)
    assert media.clip_part(3000, 25.0, np.array([2980, 2999])) == range(2500, 3000, 2)
    assert media.clip_part(5, 0.0, np.array([0, 4])) == range(5)
    assert media.clip_part(1, 30.0, np.array([0])) == range(0, 1, 2)


def test_the_view_that_is_shown() -> None:
    boxes = np.array([[0, 0, 56, 56], [20, 0, 76, 56], [40, 0, 96, 56]] * 3)
    assert media.shown_view(3, boxes, np.zeros(9, bool), (56, 96)) == 4
    ten = np.array([[0, 0, 5, 5]] * 2 + [[3, 3, 8, 8]] * 2)
    assert media.shown_view(1, ten, np.array([False, True, False, True]), (10, 11)) == 2


def test_a_second_report_keeps_what_is_there_and_forgets_the_rest(exp: Path, index: Path) -> None:
    folder = index.parent / "media"
    (folder / "of the user.jpg").write_text("x")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    build.build([str(exp)], pictures=4, clips=1)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(after) == 4 + 1 + 1
    assert after.items() <= before.items()
    build.build([str(exp)], pictures=10, clips=3)
    (folder / "of the user.jpg").unlink()


def test_without_the_videos_there_is_a_report_without_pictures(tmp_path: Path, capsys) -> None:
    write_results(tmp_path, labels=[0, 1], logits=guessed([0, 0], 2), names=["a", "b"])
    (tmp_path / "config.yaml").write_text("common: {}\n")
    index = build.build([str(tmp_path)])
    data = blocks_of(index)["report-data"]
    assert data["media"] == {}
    assert data["pictures"].startswith("No pictures: ")
    assert "no pictures: " in capsys.readouterr().out


def test_the_list_has_changed(exp: Path, tmp_path: Path, motion_videos: Path) -> None:
    results = Results.load(exp)
    changed = tmp_path / "val.txt"
    changed.write_text((motion_videos / "lists/val.txt").read_text() + "videos/00000.mp4 16 0\n")
    results.summary["list"] = str(changed)
    with pytest.raises(UserError, match="the list has changed since the evaluation"):
        media.source_of(exp, results)


def test_the_config_has_fewer_classes_since(exp: Path, tmp_path: Path) -> None:
    results = Results.load(exp)
    results.summary.pop("config", None)  # as kept by versions that did not keep it
    changed = tmp_path / "changed"
    changed.mkdir()
    text = (exp / "config.yaml").read_text()
    assert text.count("num_class: 8") == 1
    (changed / "config.yaml").write_text(text.replace("num_class: 8", "num_class: 3"))
    assert len(media.source_of(changed, results).records) == 23


def test_several_experiments(tmp_path: Path) -> None:
    ids = [f"v{row}" for row in range(12)]
    labels = [row % 3 for row in range(12)]
    write_results(tmp_path / "x/a", labels=labels, logits=guessed([0] * 12, 3), names=list("abc"), ids=ids)
    write_results(
        tmp_path / "x/b", labels=labels[2:] + [0], logits=guessed([*labels[2:], 0], 3), names=list("abc"),
        ids=[*ids[2:], "other"],
    )  # fmt: skip
    index = build.build([str(tmp_path / "x/a"), str(tmp_path / "x/b")], out=tmp_path / "both")
    assert index == tmp_path / "both/index.html"
    blocks = blocks_of(index)
    second = words(blocks["experiment-1"]["guess"]).reshape(12, 3)
    assert second[:2].tolist() == [[content.ABSENT] * 3] * 2
    assert second[2:, 0].tolist() == labels[2:]
    comparison = blocks["report-data"]["comparison"]
    assert comparison["pairs"][0]["videos"] == 10
    assert comparison["pairs"][0]["p"] == compare.mcnemar(0, comparison["pairs"][0]["only_b"])
    with pytest.raises(UserError, match="at most 8"):
        build.build([str(tmp_path / "x/a")] * 9)


def test_allowed_pairs_reach_the_page(tmp_path: Path, capsys) -> None:
    write_results(tmp_path / "e", labels=[0, 1, 2], logits=guessed([1, 1, 0], 3), names=list("abc"))
    (tmp_path / "pairs.txt").write_text("a -> b\n")
    assert main.main(["report", str(tmp_path / "e"), "--good-pairs", str(tmp_path / "pairs.txt")]) == 0
    assert "index.html" in capsys.readouterr().out
    data = blocks_of(tmp_path / "e/report/index.html")["report-data"]
    assert data["allowed"] == [[0, 1]]
    assert dict(data["experiments"][0]["overview"])["top-1 with allowed pairs"] == "66.67 %"


def test_what_the_command_line_refuses(tmp_path: Path, capsys) -> None:
    write_results(tmp_path / "e", labels=[0, 1], logits=guessed([1, 1], 2), names=["a", "b"])
    (tmp_path / "file").write_text("")
    for words_, message in (
        (["--out", str(tmp_path / "file")], "file: the report cannot be written here"),
        (["--clips", "-1"], "numbers of videos"),
        (["--good-pairs", str(tmp_path / "none")], "cannot be read"),
    ):
        assert main.main(["report", str(tmp_path / "e"), *words_]) == 2
        assert message in capsys.readouterr().err
    assert main.main(["report", str(tmp_path / "nothing")]) == 2


def test_classes_that_are_confused_stand_together() -> None:
    matrix = np.eye(40, dtype=int) * 50
    generator = np.random.default_rng(0)
    place = generator.permutation(40)
    for pair in range(0, 40, 2):
        matrix[place[pair], place[pair + 1]] = 20
    order = content.alike(matrix)
    assert sorted(order.tolist()) == list(range(40))
    where = np.argsort(order)
    assert all(abs(int(where[place[pair]]) - int(where[place[pair + 1]])) == 1 for pair in range(0, 40, 2))
    assert content.alike(np.array([[3]])).tolist() == [0]


def test_parts_of_kept_views(tmp_path: Path) -> None:
    from anal_tools.evaluate.protocols import Protocol
    from datasets.plan.sampling import Sampling
    from datasets.plan.views import EvalSpec

    spec = EvalSpec(Sampling("mmaction2_1x", 1, 8, 8), 10, "three", 256, 256)
    logits = np.random.default_rng(0).normal(size=(50, 30, 6))
    write_results(
        tmp_path, labels=[row % 6 for row in range(50)], logits=logits, names=list("abcdef"),
        protocol=Protocol(spec).to_dict(), cost={"gmacs_per_view": 2.0},
    )  # fmt: skip
    points = content.points(Results.load(tmp_path))
    assert [point["views"] for point in points] == [1, 2, 3, 3, 5, 6, 9, 10, 15, 30]
    assert points[-1]["gmacs"] == 60.0
    assert points[-1]["text"] == "10 x 3"


def test_the_policy_admits_the_page_s_own_script_only() -> None:
    text = page.render(
        title="<b>",
        protocol='"&',
        headline=[("<i>", "x")],
        footer="<",
        sections=["summary"],
        blocks={"a": "</script><!--"},
    )
    content = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    element = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert content
    assert element
    policy, script = html.unescape(content.group(1)), element.group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert text.count("</script>") == 2
    assert "<!--" not in text
    assert "<title>&lt;b&gt;</title>" in text
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|https?://(?!www\.w3\.org/2000/svg)",
        script,
    )


def test_the_scripts_are_short_modules() -> None:
    files = list((page.HERE / "js").glob("*.js"))
    assert {path.stem for path in files} == set(page.SCRIPTS)
    for path in [*files, page.HERE / "style.css", page.HERE / "page.html"]:
        lines = path.read_text().splitlines()
        assert len(lines) < 400
        assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("preset", PRESETS)
def test_the_advice_works_for_every_sampling(tmp_path: Path, preset: str) -> None:
    for segments, length, interval in ((8, 1, 1), (1, 8, 2)):  # each preset is for one of these, or for both
        with contextlib.suppress(UserError):
            spec = EvalSpec(Sampling(preset, segments, length, interval), scale=64, crop_size=56)
            break
    else:
        pytest.fail("a preset without clips")
    exp = write_results(
        tmp_path / "e", labels=[0, 1], logits=guessed([1, 1], 2), names=["a", "b"], protocol=Protocol(spec).to_dict()
    )
    match = re.search(r"eval EXP --views (\d+x\d+)", content.advice(Results.load(exp)))
    assert match
    cfg: Any = SimpleNamespace(
        data=SimpleNamespace(sampling=preset, clip_len=length, frame_interval=interval),
        model=SimpleNamespace(num_segments=segments),
        augmentation=SimpleNamespace(test_resize=64, input_size=56),
        val_dense=False,
    )
    assert protocols.choose(cfg, views=match[1]).spec.views > 1  # as `eval` does with these words
