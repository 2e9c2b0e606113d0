"""The report: size and speed, real runs, hostile names; in a real headless Chromium."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests import chromium
from tests.benchmarks.experiments import dump_weizmann, weizmann_experiment
from tests.benchmarks.rows import SHARED, command, copy_experiment, evaluate, run_rows, train, workspace
from tests.chromium import Visit, visit

CLASSES, VIDEOS = 400, 20_000
BUILD_SECONDS, PAINT_SECONDS = 60.0, 2.0
SECTIONS = ("summary", "matrix", "errors", "classes", "videos", "labels", "compare")


def synthetic(folder: Path) -> list[Path]:
    """Two experiments with 20,000 results of 400 classes each; every video is a link to one of 48 small real ones."""
    from anal_tools.evaluate.protocols import Protocol
    from datasets.plan.metadata import VideoMetadata
    from datasets.plan.sampling import Sampling
    from datasets.plan.views import EvalSpec, resolve_eval
    from tests.evaluated import write_results
    from tests.experiment import make

    command("main.py", "demo-data", "--out", folder / "motion", "--train", "48", "--val", "8")
    films = sorted((folder / "motion/videos").glob("*.mp4"))
    generator = np.random.default_rng(4)
    labels = generator.integers(0, CLASSES, VIDEOS)
    ids = [f"class_{label:03d}/a video of some length {row:05d}.mp4" for row, label in enumerate(labels)]
    for row, name in enumerate(ids):
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(films[row % len(films)], path)
    val = folder / "data/val.txt"
    val.write_text("".join(f"{name} 16 {label}\n" for name, label in zip(ids, labels, strict=True)))
    spec = EvalSpec(Sampling("tsn", 8), scale=64, crop_size=56)
    plan = resolve_eval(VideoMetadata(16, 64, 64, 16.0), spec, 0)
    experiments = []
    for name, skill in (("first", 5.5), ("second", 5.8)):
        logits = generator.normal(0, 1.6, (VIDEOS, 1, CLASSES)).astype(np.float32)
        logits[np.arange(VIDEOS), 0, labels] += skill
        logits[np.arange(VIDEOS), 0, (labels // 4 * 4 + generator.integers(0, 4, VIDEOS)) % CLASSES] += 3.0  # families
        exp = make(folder / "synthetic" / name, folder / "motion")
        write_results(
            exp, labels=labels.tolist(), logits=logits, names=[f"class {k:03d} of an action" for k in range(CLASSES)],
            ids=ids, frames=np.tile(plan.frames[plan.clip_rows], (VIDEOS, 1, 1)).astype(np.int32),
            protocol=Protocol(spec).to_dict(), list=str(val), list_hash=_sha256(val), root=str(folder / "data"),
            cost={"gmacs_per_view": 33.0, "gmacs_per_video": 33.0, "parameters": 24_000_000},
        )  # fmt: skip
        (exp / "events").mkdir()
        lines = [
            json.dumps({"step": k, "loss_train": 6 / k**0.3, "top1_train": 70.0, "lr": 0.1}) for k in range(1, 3000)
        ]
        (exp / "events/scalars.jsonl").write_text("\n".join(lines) + "\n")
        experiments.append(exp)
    return experiments


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def report() -> dict:
    """400 classes x 20,000 videos x 2 experiments: time to build, first paint, every interaction, errors, requests."""
    if reason := chromium.why_not():
        return {"measured": f"not measured: {reason}", "holds": False}
    experiments = synthetic(workspace())
    started, used = time.monotonic(), _cpu_of_children()
    command("main.py", "report", *experiments)
    built, used = time.monotonic() - started, _cpu_of_children() - used
    index = experiments[0] / "report/index.html"
    with chromium.browser() as browser:
        paints = []
        for _ in range(5):
            with visit(browser, index.as_uri()) as visited:
                paints.append(visited.first_paint())
        with visit(browser, index.as_uri()) as visited:
            times = interactions(visited)
            errors, outside = visited.errors, visited.outside(index.parent)
    measured = {
        "build_s": round(built, 1),
        "build_cpu_s": round(used, 1),
        "first_paint_s": {"median": round(sorted(paints)[2], 3), "worst": round(max(paints), 3)},
        "page_MB": round(index.stat().st_size / 1e6, 2),
        "media": len(list((index.parent / "media").iterdir())),
        "interactions": len(times),
        "slowest_s": dict(sorted(((name, round(t, 2)) for name, t in times.items()), key=lambda x: -x[1])[:5]),
        "console_errors": errors[:5],
        "outside_requests": outside[:5],
    }
    holds = built <= BUILD_SECONDS and max(paints) <= PAINT_SECONDS and not errors and not outside
    return {"measured": measured, "holds": holds}


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Stopwatch:
    """Seconds that each named interaction took; one that has not the wanted effect raises."""

    def __init__(self, visit: Visit) -> None:
        self.page, self.times = visit.page, {}

    def __call__(self, name: str, act: Callable[[], Any], effect: str, arg: Any = None) -> None:
        """Do `act` and wait until the JavaScript function `effect` is true."""
        started = time.monotonic()
        act()
        self.page.wait_for_function(effect, arg=arg)
        self.times[name] = time.monotonic() - started


def interactions(visited: Visit) -> dict[str, float]:
    """Use every control of a report with two experiments; returns how long each took."""
    page, do = visited.page, Stopwatch(visited)
    rows_are = "(n) => document.querySelectorAll('#page tbody tr').length === n"
    for name in (*SECTIONS[1:], "summary"):
        do(
            f"page {name}",
            lambda name=name: page.click(f'nav a[href="#{name}"]'),
            f"() => document.documentElement.dataset.section === '{name}'",
        )
    do(
        "summary link",
        lambda: page.locator("ul.plain a").first.click(),
        "() => document.querySelectorAll('.card').length > 0",
    )
    do("back", page.go_back, "() => document.documentElement.dataset.section === 'summary'")
    _matrix(visited, do)
    page.click('nav a[href="#errors"]')
    do(
        "more videos",
        lambda: page.locator("button.more").first.click(),
        "() => document.querySelectorAll('.card').length >= 24",
    )
    do(
        "open a pair",
        lambda: page.locator("details.pair summary").first.click(),
        "() => document.querySelector('details.pair .card')",
    )
    do(
        "sheet is loaded",
        lambda: page.locator("img.sheet").first.scroll_into_view_if_needed(),
        "() => document.querySelector('img.sheet').naturalWidth > 0",
    )
    do(
        "play",
        lambda: page.locator("button.play").first.click(),
        "() => document.querySelector('video').currentTime > 0.1",
    )
    do(
        "seek",
        lambda: page.locator("img.sheet").first.click(position={"x": 3, "y": 3}),
        "() => document.querySelector('video').paused",
    )
    page.click('nav a[href="#classes"]')
    for head in ("class", "recall", "precision", "average precision", "videos", "most often mistaken for"):
        do(
            f"sort by {head}",
            lambda head=head: page.get_by_role("button", name=head, exact=True).click(),
            "() => document.querySelector('th[aria-sort]')",
        )
    do("find a class", lambda: page.get_by_label("Find").fill("39"), rows_are, 14)
    page.click('nav a[href="#videos"]')
    note = "(n) => document.querySelector('#page .note').textContent.startsWith(n)"
    do(
        "find a video",
        lambda: (page.get_by_label("Find").fill("00017.mp4"), page.get_by_label("Find").press("Enter")),
        note,
        "1 video,",
    )
    do(
        "clear",
        lambda: (page.get_by_label("Find").fill(""), page.get_by_label("Find").press("Enter")),
        note,
        "20,000 videos",
    )
    do(
        "only wrong",
        lambda: page.get_by_label("Outcome").select_option("wrong"),
        "() => !document.querySelector('.card.is-right')",
    )
    do(
        "true class",
        lambda: page.get_by_label("True class").select_option("7"),
        "() => location.hash.includes('truth=7')",
    )
    do(
        "predicted",
        lambda: page.get_by_label("Predicted").select_option("6"),
        "() => location.hash.includes('guess=6')",
    )
    do(
        "between",
        lambda: page.get_by_label("Between").select_option("1-0"),
        "() => location.hash.includes('rival=1-0')",
    )
    page.click('nav a[href="#compare"]')
    do(
        "sort changes",
        lambda: page.get_by_role("button", name="recall, B − A", exact=True).click(),
        "() => document.querySelector('th[aria-sort]')",
    )
    do(
        "more classes",
        lambda: page.locator("button.more:visible").first.click(),
        "() => document.querySelectorAll('#page tbody tr').length > 100",
    )
    do(
        "other experiment",
        lambda: page.get_by_label("Predictions of").select_option("1"),
        "() => document.querySelector('#page section')",
    )
    page.click('nav a[href="#labels"]')
    do(
        "more suspects",
        lambda: page.locator("button.more:visible").first.click(),
        "() => document.querySelectorAll('#page tbody tr').length > 50",
    )
    return do.times


def _matrix(visited: Visit, do: Stopwatch) -> None:
    """Mouse and keyboard on the matrix."""
    page = visited.page
    page.click('nav a[href="#matrix"]')
    info = "(text) => document.querySelector('.info').textContent.includes(text)"
    side = "() => document.querySelectorAll('.side .card').length > 0"
    canvas = page.locator("canvas.matrix")
    do("focus", canvas.focus, "() => document.activeElement.tagName === 'CANVAS'")
    do("key n", lambda: page.keyboard.press("n"), info, " mistaken for ")
    do("key Enter", lambda: page.keyboard.press("Enter"), side)
    for key in ("ArrowDown", "ArrowUp", "ArrowLeft", "ArrowRight", "+", "-", "0", "N"):
        do(f"key {key}", lambda key=key: page.keyboard.press(key), info, ":")
    for order in ("alike", "hardest", "videos", "name", "list"):
        do(f"order {order}", lambda order=order: page.get_by_label("Order").select_option(order), info, ":")
    do("colour", lambda: page.get_by_label("Colour").select_option("count"), info, ":")
    for label in ("zoom in", "zoom out", "show the whole matrix", "go to the next most frequent error"):
        do(label, lambda label=label: page.get_by_label(label).click(), info, ":")
    canvas.focus()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6
    page.mouse.move(x, y)
    before = page.locator(".info").inner_text()
    do("wheel", lambda: [page.mouse.wheel(0, -100) for _ in range(12)], "() => scrollY >= 0")

    def drag() -> None:
        page.mouse.down()
        page.mouse.move(x - 90, y - 60, steps=6)
        page.mouse.up()
        page.mouse.move(x, y)

    do("drag", drag, "(text) => document.querySelector('.info').textContent !== text", before)
    do("click", lambda: page.mouse.click(x, y), "() => document.querySelector('.side h3')")


def report_real() -> dict:
    """The demo and weizmann4, trained for a while: clips play, and the sheets show the plan's frames."""
    if reason := chromium.why_not():
        return {"measured": f"not measured: {reason}", "holds": False}
    work = workspace()
    command("main.py", "demo-data", "--out", work / "motion8")
    demo = copy_experiment("demo_exps/tsm_resnet18/motion8", work / "tsm_resnet18/motion8")
    data = [f"common.{split}_root={work}/motion8" for split in ("train", "val")]
    data += [f"common.{split}_source={work}/motion8/lists/{split}.txt" for split in ("train", "val")]
    data += [f"common.data.class_names={work}/motion8/lists/classInd.txt", "common.lr_scheduler.max_iter=60"]
    measured: dict[str, Any] = {"demo": _real(demo, data)}
    if SHARED.is_dir():
        people = weizmann_experiment(work / "tsm_resnet18/weizmann4", SHARED, SHARED, "video")
        measured["weizmann4"] = _real(people, ["common.lr_scheduler.max_iter=30"])
        frames = dump_weizmann(SHARED, work / "frames")
        folders = weizmann_experiment(work / "tsm_resnet18/weizmann4_frames", SHARED, frames, "frames")
        measured["weizmann4 as JPEG folders"] = _real(folders, ["common.lr_scheduler.max_iter=30"])
    else:
        measured["weizmann4"] = {"holds": False, "why": "../shared/data is not on this machine"}
    return {"measured": measured, "holds": all(one["holds"] for one in measured.values())}


def _real(exp: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, evaluate, report, and look at the result in the browser."""
    train(exp, 1, *overrides)
    sets = [word for override in overrides for word in ("--set", override)]
    summary = evaluate(exp, 1, *sets)
    command("main.py", "report", exp)
    index = exp / "report/index.html"
    shown = media_of(index)
    distances = [sheet_distance(exp, int(row), one, index.parent) for row, one in shown.items()]
    with chromium.browser() as browser, visit(browser, f"{index.as_uri()}#videos") as visited:
        played = [length for length in plays(visited, 6)]
        errors, outside = visited.errors, visited.outside(index.parent)
    nearest, other = (round(max(d[0] for d in distances), 2), round(min(d[1] for d in distances), 2))
    planned = all(one["frames"] == frames_of(exp, int(row), len(one["frames"])) for row, one in shown.items())
    holds = planned and nearest < 8 and len(played) == 6 and not errors and not outside
    return {
        "top1": summary["metrics"]["top1"],
        "videos_shown": len(shown),
        "frames_are_the_plans": planned,
        "mean_absolute_difference_of_pixels": {
            "to_the_frames_it_names": nearest,
            "to_another_frame_of_the_video": other,
        },
        "clips_played_s": [round(length, 2) for length in played],
        "console_errors": errors[:5],
        "outside_requests": outside[:5],
        "holds": holds,
    }


def media_of(index: Path) -> dict[str, dict[str, Any]]:
    """What the page knows of its pictures."""
    text = re.search(r'id="report-data">(.*?)</script>', index.read_text(), re.DOTALL)
    assert text
    return json.loads(text.group(1))["media"]


def frames_of(exp: Path, row: int, count: int) -> list[int]:
    """The frames that a fresh plan of the video takes, evenly picked."""
    from anal_tools.evaluate import scoring
    from anal_tools.evaluate.results import Results
    from anal_tools.report import media
    from datasets.plan.views import resolve_eval
    from datasets.readers import open_reader

    results = Results.load(exp)
    source = media.source_of(exp, results)
    with contextlib.closing(open_reader(source.reader, source.records)) as reader:
        plan = resolve_eval(reader.probe(row), scoring.kept_protocol(results).spec, row)
    frames = plan.frames[plan.clip_rows[0]]
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)].tolist()


def sheet_distance(exp: Path, row: int, one: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Mean absolute difference of the sheet's tiles to the frames that it names, and to those half a clip away."""
    import cv2
    import simplejpeg

    from anal_tools.evaluate.results import Results
    from anal_tools.report import media
    from datasets.plan.views import resolve_eval
    from datasets.readers import open_reader

    source = media.source_of(exp, Results.load(exp))
    with contextlib.closing(open_reader(source.reader, source.records)) as reader:
        plan = resolve_eval(reader.probe(row), source.spec, row)
        whole = np.empty((len(one["frames"]), *plan.size, 3), np.uint8)
        reader.read(row, np.array(one["frames"]), None, plan.size, whole)
    x1, y1, x2, y2 = plan.boxes[0]
    sheet = simplejpeg.decode_jpeg((folder / one["sheet"]).read_bytes()).astype(np.float32)
    tile, gap = media.TILE_HEIGHT, media.SHEET_GAP
    count, named, other = len(one["frames"]), [], []
    for place in range(count):
        y, x = place // one["columns"] * (tile + gap), place % one["columns"] * (tile + gap)
        seen = cv2.resize(sheet[y : y + tile, x : x + tile], (int(x2 - x1), int(y2 - y1)), interpolation=cv2.INTER_AREA)
        for to, k in ((named, place), (other, (place + count // 2) % count)):
            to.append(float(np.abs(seen - whole[k, y1:y2, x1:x2]).mean()))
    return float(np.mean(named)), float(np.mean(other))


def plays(visited: Visit, count: int) -> Iterator[float]:
    """Play the first clips of a page for a moment each; gives their lengths in seconds."""
    page = visited.page
    for place in range(count):
        button = page.locator("button.play").nth(place)
        button.scroll_into_view_if_needed()
        button.click()
        video = page.locator("video").nth(place).element_handle()
        page.wait_for_function("(video) => video.currentTime > 0.15 && !video.error", arg=video)
        yield page.evaluate("(video) => { video.pause(); return video.duration; }", video)


def hostile() -> dict:
    """Hostile class names, paths, experiment names and config values: what runs, what is asked for, what is written."""
    if reason := chromium.why_not():
        return {"measured": f"not measured: {reason}", "holds": False}
    from tests.evaluated import guessed, write_results

    script = "window.pwned=1"
    names = [
        f"<img src=x onerror={script}>", f"</script><script>{script}</script>", f"<!--<script>{script}",
        "two\nlines\r\x00", "../../../../etc/passwd", "x" * 255, "\udcff\udc80 not UTF-8", f"javascript:{script}",
        f"'\"><svg onload={script}>",
    ]  # fmt: skip
    work = workspace()
    outer = work / "hostile"
    exp = outer / names[0].replace("/", "") / "a\nb \udcff"
    before = {path for path in work.rglob("*")}
    count = len(names)
    write_results(
        exp, labels=list(range(count)) * 2, logits=guessed([0] * count + list(range(count)), count), names=names,
        ids=[*names, *(f"{name}/x.mp4" for name in names)], list=names[4], weights=names[1],
        config={names[0]: names[1]},
    )  # fmt: skip
    (exp / "config.yaml").write_text("common: {}\n")
    reported = {path for path in work.rglob("*")} - before
    command("main.py", "analyze", exp)
    command("main.py", "report", exp)
    written = {path for path in work.rglob("*")} - before - reported
    index = exp / "report/index.html"
    astray = [str(path) for path in written if not path.is_relative_to(exp)]
    dialogs: list[str] = []
    with chromium.browser() as browser, visit(browser, index.as_uri()) as visited:
        visited.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        for name in SECTIONS[:-1]:
            visited.page.click(f'nav a[href="#{name}"]')
            for details in visited.page.locator("details").all():
                details.locator("summary").click()
        visited.page.wait_for_timeout(300)
        ran = visited.page.evaluate("window.pwned !== undefined")
        foreign = visited.page.evaluate(
            "document.querySelectorAll('[onerror], [onload], main script, main img').length"
        )
        errors, outside = visited.errors, visited.outside(index.parent)
    measured = {
        "names": count, "scripts_that_ran": int(ran) + len(dialogs), "foreign_elements": foreign,
        "files_outside_the_experiment": astray, "console_errors": errors[:5], "outside_requests": outside[:5],
    }  # fmt: skip
    holds = not (ran or dialogs or foreign or astray or errors or outside)
    return {"measured": measured, "holds": holds}


ROWS = {
    "report": (
        "report on 400 classes x 20,000 synthetic results (two experiments of them, with pictures)",
        "built <= 60 s, first paint <= 2 s, every interaction, 0 console errors, 0 outside requests",
        report,
    ),
    "report_real": (
        "report on real runs (weizmann4, the demo)",
        "clips play, thumbnails show the plan's frames",
        report_real,
    ),
    "hostile": ("hostile names", "no script runs, no path leaves the folder", hostile),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
