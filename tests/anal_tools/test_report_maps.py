"""Maps in the report: the network that was evaluated, looking at the frames that it saw, in a real page."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

import main
from anal_tools.evaluate.results import Results
from anal_tools.report import maps, media
from datasets.readers import open_reader
from tests import experiment, weights
from tests.chromium import visit


def blocks_of(index: Path) -> dict[str, Any]:
    """The JSON blocks of a page."""
    scripts = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', index.read_text(), re.DOTALL)
    return {name: json.loads(text) for name, text in scripts}


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """A TSN with random weights, evaluated; it has most of the 23 videos wrong."""
    folder = weights.make(tmp_path_factory.mktemp("looked") / "tests" / "tsn", motion_videos)
    assert main.main(["eval", str(folder)]) == 0
    return folder


def report(*words: object) -> int:
    return main.main(["report", *map(str, words)])


@pytest.mark.system
def test_the_network_looks_at_what_it_was_scored_on(exp: Path) -> None:
    results = Results.load(exp)
    source = media.source_of(exp, results)
    with contextlib.closing(open_reader(source.reader, source.records)) as reader:
        seen = media.seen_of(source, reader, 4)
        crops = media.crops_of(reader, 4, seen, seen.frames)
        looker = maps.looker_of(results, crops, None)
        class_maps, answer = looker.look(crops, [0, 5])
    logits = torch.from_numpy(np.array(results.logits[4, seen.view])).double()
    assert np.abs(logits.softmax(0).numpy() - answer).max() < 1e-5
    assert looker.method == "Grad-CAM of backbone.layer2"  # 4 x 4 cells of 32 pixels
    assert set(class_maps) == {0, 5}
    for values in class_maps.values():
        assert values.shape == crops.shape[:3]
        assert values.min() >= 0
        assert values.max() == pytest.approx(1)
    assert not np.allclose(class_maps[0], class_maps[5])


@pytest.mark.system
def test_the_page_has_maps_of_the_mistakes(exp: Path, started_browser: Any, capsys) -> None:
    assert report(exp, "--cam", "--clips", 2) == 0
    index = exp / "report/index.html"
    data = blocks_of(index)["report-data"]
    results = Results.load(exp)
    predicted = results.scores.argmax(axis=1)
    wrong = {row for row in range(23) if predicted[row] != results.labels[row]}
    with_maps = {int(row) for row, one in data["media"].items() if "maps" in one}
    assert with_maps == wrong
    for row in wrong:
        one = data["media"][str(row)]
        maps_of_one = one["maps"]["0"]
        assert [number for number, _ in maps_of_one["shown"]] == [predicted[row], results.labels[row]]
        assert (maps_of_one["width"], maps_of_one["height"], maps_of_one["frames"]) == (
            one["width"],
            one["height"],
            one["frames"],
        )
        for _, sheet in maps_of_one["shown"]:
            picture = simplejpeg.decode_jpeg((index.parent / sheet).read_bytes())
            assert picture.shape == (maps_of_one["height"], maps_of_one["width"], 3)
            assert int(picture[..., 0].astype(int).max()) - int(picture[..., 2].min()) > 60  # some red

    first = next(path for path in (exp / "report/media").glob("*.jpg"))
    stamp = first.stat().st_mtime_ns
    assert report(exp, "--cam", "--clips", 2) == 0
    assert first.stat().st_mtime_ns == stamp, "what is there is not drawn again"

    with visit(started_browser, index.as_uri() + "#errors") as visited:
        card = visited.page.locator(".card").first
        assert "Grad-CAM of backbone.layer2" in visited.page.locator("section .note").all_inner_texts()[1]
        row = card.get_attribute("data-row")
        truth = card.locator(".truth").inner_text()
        names = results.class_names
        assert truth == f"true: {names[results.labels[int(row)]]}, predicted: {names[predicted[int(row)]]}"
        buttons = card.locator(".maps button")
        asked = [names[number] for number, _ in data["media"][row]["maps"]["0"]["shown"]]
        assert buttons.all_inner_texts() == ["frames", *(f"for {name}" for name in asked)]
        buttons.nth(1).click()
        shown = card.locator("img.sheet")
        assert shown.get_attribute("src") == data["media"][row]["maps"]["0"]["shown"][0][1]
        visited.page.wait_for_function("(i) => i.complete && i.naturalWidth > 0", arg=shown.element_handle())
        assert buttons.nth(1).get_attribute("aria-pressed") == "true"
        buttons.nth(0).click()
        assert shown.get_attribute("src") == data["media"][row]["sheet"]
        assert visited.errors == []
        assert visited.outside(index.parent) == []


@pytest.mark.system
def test_several_experiments_and_a_transformer(
    exp: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second experiment has maps of its own mistakes; a transformer has one map for all classes."""
    small = "width: 24, depth: 2, heads: 2, patch: 8"
    text = experiment.CONFIG.replace("bn_group_size: {group}, bn_sync_stats: {sync_stats}", small)
    monkeypatch.setattr(experiment, "CONFIG", text)
    vit = weights.make(tmp_path / "tests/vit", motion_videos, method="videomae", backbone="vit3d")
    assert main.main(["eval", str(vit)]) == 0
    assert report(exp, vit, "--cam", "--clips", 0, "--out", tmp_path / "both") == 0
    data = blocks_of(tmp_path / "both/index.html")["report-data"]
    assert data["maps"][1].startswith("attention rollout")
    results = Results.load(vit)
    wrong = [row for row in range(23) if results.scores[row].argmax() != results.labels[row]]
    for row in wrong:
        ((number, sheet),) = data["media"][str(row)]["maps"]["1"]["shown"]
        assert number == maps.ALL
        assert (tmp_path / "both" / sheet).is_file()
    assert report(vit, "--cam-layer", "backbone.blocks", "--out", tmp_path / "one") == 0
    assert "its maps have no layer" in blocks_of(tmp_path / "one/index.html")["report-data"]["maps"][0]


@pytest.mark.system
def test_other_weights_have_no_maps(exp: Path, tmp_path: Path, capsys) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(exp, moved)
    state = torch.load(moved / "ckpt_best.pth.tar", weights_only=True)
    summary = json.loads((moved / "results/best.json").read_text())
    summary["weights"] = str(moved / "ckpt_best.pth.tar")
    assert summary["weights_hash"]
    state["step"] = 8
    torch.save(state, moved / "ckpt_best.pth.tar")
    results = Results.load(moved)
    results.summary["weights"] = summary["weights"]
    with pytest.raises(maps.UserError, match="other weights than those that were evaluated"):
        maps.make(moved, results, [0], tmp_path / "media")


@pytest.mark.system
def test_no_media_leaves_no_frame_behind(exp: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert report(exp, "--cam", "--out", out, "--clips", 1) == 0
    assert list((out / "media").iterdir())
    (out / "media/mine.txt").write_text("not of the report")
    assert report(exp, "--no-media", "--out", out) == 0
    assert [path.name for path in (out / "media").iterdir()] == ["mine.txt"]
    data = blocks_of(out / "index.html")["report-data"]
    assert data["media"] == {}
    assert "this folder contains no video frames" in data["pictures"]
    assert report(exp, "--no-media", "--cam", "--out", out) == 2
    assert "--cam draws on pictures" in capsys.readouterr().err


def test_the_heat_is_grey_where_there_is_none_and_red_where_it_is_largest() -> None:
    frames = np.full((1, 2, 2, 3), (200, 100, 0), np.uint8)
    heated = maps.heated(frames, np.array([[[0.0, 0.5], [0.9, 1.0]]]))[0]
    grey = round(0.299 * 200 + 0.587 * 100)
    assert heated[0, 0].tolist() == [grey] * 3
    red, green, blue = heated[1, 1].astype(int)
    assert red > 200 > green == blue
