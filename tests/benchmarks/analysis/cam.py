"""Class-activation maps: against finite differences, against the paths of the demo's shapes, and in a page with folds.

$ZOETROPE_ACCEPT_DIR keeps the trained networks: a second run of a row takes them from there.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests import chromium
from tests.benchmarks.analysis.report import media_of
from tests.benchmarks.methods.by_tests import passed
from tests.benchmarks.rows import command, copy_experiment, evaluate, run_rows, train, workspace
from tests.chromium import visit

SHARE = 0.8  # of the clips
LAYER = "backbone.layer3"


def cam_finite_difference() -> dict:
    """Toy networks on frames and on clips, both layers, all classes, in float64; four methods in some cells."""
    outcome = passed("tests/methods/test_cam.py", "-k", "definition")
    return {"measured": outcome, "holds": not outcome.startswith("failed")}


def motion8(work: Path) -> list[str]:
    """Write the demo data; returns what an experiment must override to use it."""
    command("main.py", "demo-data", "--out", work / "motion8")
    lists = work / "motion8/lists"
    data = [f"common.{split}_root={work}/motion8" for split in ("train", "val")]
    return [*data, f"common.train_source={lists}/train.txt", f"common.val_source={lists}/val.txt",
            f"common.data.class_names={lists}/classInd.txt"]  # fmt: skip


def trained(work: Path) -> Path:
    """A TSM that was trained on motion8 with its own recipe, and evaluated."""
    data, exp = motion8(work), work / "tsm_resnet18/motion8"
    if not (exp / "results/best.json").is_file():
        copy_experiment("demo_exps/tsm_resnet18/motion8", exp)
        train(exp, 2, *data)
        evaluate(exp, 2, *(word for override in data for word in ("--set", override)))
    return exp


def cam_motion8() -> dict:
    """Where the map of the true class is largest, against the shape's path; beside it a place drawn at random.

    `path`: within 2 radii and half a cell of the path, whenever the shape is there. `in its frame`: of where the shape
    is in the very frame of the maximum. `on the shape`: within 1 radius of that, with nothing added.
    """
    from anal_tools.evaluate.results import Results

    exp = trained(workspace())
    results = Results.load(exp)
    rows = places(exp, results, int(os.environ.get("ZOETROPE_ACCEPT_CLIPS", len(results.ids))))
    shares = {
        who: {key: round(float(np.mean([row[who][key] for row in rows])), 3) for key in keys}
        for who, keys in rows[0].items()
    }
    largest = max(row["logits"]["difference"] for row in rows)
    measured = {
        "top1": results.numbers["top1"], "clips": len(rows), "maximum": shares["maximum"], "random": shares["random"],
        "heat": shares["heat"], "largest_difference_of_a_probability_to_the_evaluation": float(f"{largest:.1e}"),
    }  # fmt: skip
    return {"measured": measured, "holds": shares["maximum"]["path"] >= SHARE and largest < 1e-3}


def places(exp: Path, results: Any, count: int) -> list[dict[str, dict[str, float]]]:
    """Measure the maps of `count` validation clips, evenly picked."""
    import json

    from anal_tools.report import maps, media
    from datasets.demo import verb
    from datasets.readers import open_reader

    source = media.source_of(exp, results)
    settings = json.loads((Path(source.records.root) / "settings.json").read_text())
    motions = verb.all_labels(settings)[0]
    places_of_videos, looker = [], None
    with contextlib.closing(open_reader(source.reader, source.records)) as reader:
        for row in np.linspace(0, len(results.ids) - 1, count).round().astype(int).tolist():
            seen = media.seen_of(source, reader, row)
            crops = media.crops_of(reader, row, seen, seen.frames)
            looker = looker or maps.looker_of(results, crops, LAYER)
            label, clip = int(results.labels[row]), int(Path(results.ids[row]).stem)
            assert motions[clip] == label
            heat, answer = looker.look(crops, [label])
            path = path_of(settings["seed"], clip, label)
            cell = crops.shape[1] / looker_cells(looker, crops)
            logits = np.exp(np.asarray(results.logits[row, seen.view], np.float64))
            places_of_videos.append(
                measured_of(heat[label], seen, path, cell / 2, np.random.default_rng(row))
                | {"logits": {"difference": float(np.abs(logits / logits.sum() - answer).max())}}
            )
    return places_of_videos


def path_of(seed: int, clip: int, label: int) -> np.ndarray:
    """Where the shape of a clip is and how big: x, y, radius, (3, T) in pixels and in playing order."""
    from datasets.demo import motion8 as demo

    motion = demo.MOTIONS[label]
    path = demo.draw_path(demo.generator(seed, clip), motion)
    table = np.stack([path.x, path.y, path.radius])
    return table[:, ::-1] if motion in demo.BACKWARDS else table


def looker_cells(looker: Any, crops: np.ndarray) -> int:
    """Cells of the layer's map along a side."""
    import torch

    from methods import cam

    clip = looker.normalise(torch.from_numpy(np.ascontiguousarray(crops))[None])
    return cam.grad_cam(looker.net, clip, [0], looker.layer).values.shape[-1]


def measured_of(
    heat: np.ndarray, seen: Any, path: np.ndarray, half_cell: float, rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """Compare the maximum of a map (T, h, w), and a random place of the same frame, with the path (3, frames)."""
    x, y, radius = path
    frame, row, column = (int(place) for place in np.unravel_index(int(heat.argmax()), heat.shape))
    drawn = rng.random(2) * heat.shape[1:]
    shares = {}
    for name, (down, across) in (("maximum", (row + 0.5, column + 0.5)), ("random", drawn)):
        away = np.hypot(x - across - seen.box[0], y - down - seen.box[1])
        now = int(seen.frames[frame])
        shares[name] = {
            "path": float((away <= 2 * radius + half_cell).any()),
            "in its frame": float(away[now] <= 2 * radius[now] + half_cell),
            "on the shape": float(away[now] <= radius[now]),
        }
    down, across = np.mgrid[: heat.shape[1], : heat.shape[2]] + 0.5
    discs = np.array([
        np.hypot(across + seen.box[0] - x[now], down + seen.box[1] - y[now]) <= radius[now] for now in seen.frames
    ])  # fmt: skip
    on_shape = float((heat * discs).sum() / max(float(heat.sum()), 1e-12))
    shares["heat"] = {"on the shapes": on_shape, "area of the shapes": float(discs.mean())}
    return shares


def report_chromium() -> dict:
    """A TSM in three folds beside one without; every page and every kind of map, light, dark and narrow."""
    if reason := chromium.why_not():
        return {"measured": f"not measured: {reason}", "holds": False}
    work = workspace()
    data = motion8(work)
    val = work / "motion8/lists/val.txt"
    data = [one for one in data if "source" not in one] + [f"common.{split}_source={val}" for split in ("train", "val")]
    exps = []
    for name, steps in (("tsm_resnet18", 90), ("tsn_resnet18", 30)):
        exp = work / f"folds/{name}"
        if not (exp / "results/latest.json").is_file():
            copy_experiment(f"demo_exps/{name}/motion8", exp)
            folded(exp, [*data, f"common.lr_scheduler.max_iter={steps}"])
            train(exp, 2)
        exps.append(exp)
    command("main.py", "report", *exps, "--cam", "--out", work / "report")
    index = work / "report/index.html"
    measured: dict[str, Any] = {"folds": [], "maps": 0}
    complaints, outside, pictures = [], [], []
    with chromium.browser() as browser:
        for dark, width in ((False, 1280), (True, 1280), (False, 390)):
            with visit(browser, index.as_uri(), dark=dark, width=width, height=1000) as visited:
                pages = looked_at(visited, work / f"pictures_{'dark' if dark else 'light'}_{width}")
                measured["maps"] += pages.pop("maps")
                measured["folds"].append(pages.pop("folds"))
                complaints += visited.errors
                outside += visited.outside(index.parent)
                pictures += pages["pictures"]
    command("main.py", "report", *exps, "--no-media", "--out", work / "report")
    left = sorted(path.name for path in (work / "report/media").iterdir())
    shown = media_of(index)
    measured |= {
        "console_errors": complaints[:5], "outside_requests": outside[:5], "pictures": len(pictures),
        "media_left_by_no_media": left, "folder_of_the_pictures": str(work),
    }  # fmt: skip
    holds = not (complaints or outside or left or shown) and measured["maps"] > 0 and measured["folds"] == [2, 2, 2]
    return {"measured": measured, "holds": holds}


def folded(exp: Path, overrides: list[str]) -> None:
    """Write overrides into the config of an experiment, with three folds."""
    import yaml

    file = exp / "config.yaml"
    whole = yaml.safe_load(file.read_text())
    for override in [*overrides, "common.data.folds=3", "common.lr_scheduler.warmup_steps=10", "common.val_freq=90"]:
        key, _, value = override.partition("=")
        *sections, name = key.split(".")
        place = whole
        for section in sections:
            place = place[section]
        place[name] = yaml.safe_load(value)
    file.write_text(yaml.safe_dump(whole))


def looked_at(visited: Any, folder: Path) -> dict[str, Any]:
    """Open every page, switch to maps of both experiments, and take a picture of each."""
    page = visited.page
    folder.mkdir(parents=True, exist_ok=True)
    pictures, maps, folds = [], 0, 0
    for name in ("summary", "matrix", "errors", "classes", "videos", "labels", "compare"):
        page.click(f'nav a[href="#{name}"]')
        page.wait_for_selector(f'html[data-section="{name}"]', state="attached")
        folds += page.locator("table.folds").count()
        for experiment in ("0", "1") if name == "errors" else ("0",):
            page.select_option("#chooser select", experiment)
            for place in range(min(12, page.locator(".card .maps").count() if name == "errors" else 0)):
                buttons = page.locator(".card .maps").nth(place).locator("button")
                for number in range(1, buttons.count()):
                    buttons.nth(number).click()
                    sheet = page.locator(".card:has(.maps) img.sheet").nth(place).element_handle()
                    page.wait_for_function("(image) => image.complete && image.naturalWidth > 0", arg=sheet)
                    maps += 1
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(300)
            pictures.append(folder / f"{name}_{experiment}.png")
            page.screenshot(path=str(pictures[-1]))
    return {"maps": maps, "folds": folds, "pictures": pictures}


ROWS = {
    "cam_finite_difference": (
        "Grad-CAM on toy networks in float64",
        "equals the change of the logit when the map rises by 1e-6, divided by it, to 1e-6",
        cam_finite_difference,
    ),
    "cam_motion8": (
        "Grad-CAM of layer3 on motion8, upsampled",
        f"the maximum lies within 2 radii + half a cell of the shape's path in >= {SHARE} of clips",
        cam_motion8,
    ),
    "report_chromium": (
        "report with folds and maps in headless Chromium",
        "0 console errors, 0 requests that leave the folder, every page and map shown; --no-media leaves no frame",
        report_chromium,
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
