"""Make pictures of videos for the report: the frames that the model saw, and a small clip.

The experiment's own reader gives both, from the frames that the evaluation recorded. So they are what was scored, for
video files and for folders of frames. File names consist of numbers and hashes, and never hold names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from utils import files
from utils.errors import MediaError, UserError

if TYPE_CHECKING:
    from anal_tools.evaluate.results import Results
    from datasets.lists.records import Records
    from datasets.plan.metadata import VideoMetadata
    from datasets.plan.views import EvalSpec
    from datasets.readers import Reader, ReaderSpec

TILE_HEIGHT = 128  # pixels of a frame on the sheet; shown smaller, sharp on dense screens
SHEET_FRAMES, SHEET_COLUMNS, SHEET_GAP = 8, 4, 4  # frames of one view; frames in a row; pixels between them
CLIP_SIDE = 160  # short side of a clip in pixels
CLIP_RATE = 15.0  # frames/s at most
CLIP_SECONDS = 20.0  # at most, around the frames that were seen
# VP8 in WebM: every browser plays it, even those built without licensed codecs.
CODEC, SUFFIX = "libvpx", "webm"
# Part of the file names: a different layout makes new files
_LAYOUT = [TILE_HEIGHT, SHEET_COLUMNS, SHEET_GAP, CLIP_SIDE, CLIP_RATE, CLIP_SECONDS]
# One thread: several videos are encoded at a time, and libvpx's threads spin while they wait for each other.
_OPTIONS = {"deadline": "realtime", "cpu-used": "12", "crf": "20", "b": "200k", "threads": "1"}


class _Layout(TypedDict):
    columns: int
    width: int
    height: int


class _Sheet(_Layout):
    sheet: str
    frames: list[int]
    of: int


class Maps(_Layout):
    """Class-activation maps of a video: a sheet for each requested class.

    `shown` has (class, sheet); -1 means all classes.
    """

    shown: list[tuple[int, str]]
    frames: list[int]


class Pictures(_Sheet, total=False):
    """The data that the page needs about the pictures of one video.

    `clip`, `times` and `part` exist if it has a clip. `maps` exists if maps were made; its keys are the numbers
    of the experiments as text.
    """

    clip: str
    times: list[float]
    part: str
    maps: dict[str, Maps]


@dataclass(frozen=True)
class Seen:
    """The one view of a video that the report shows.

    Attributes:
        metadata: of the video.
        view: number of the view.
        frames: (T,) ordinals that the network saw.
        box: x1, y1, x2, y2 on the scaled frame.
        flip: the crop was mirrored.
        size: (h, w) of the scaled frame.
    """

    metadata: VideoMetadata
    view: int
    frames: np.ndarray
    box: tuple[int, ...]
    flip: bool
    size: tuple[int, int]

    @property
    def picked(self) -> np.ndarray:
        """Positions in `frames` of those that a sheet shows, evenly spaced."""
        return np.linspace(0, len(self.frames) - 1, min(len(self.frames), SHEET_FRAMES)).round().astype(np.int64)


@dataclass(frozen=True)
class EvaluatedVideos:
    """The videos of an evaluation, and how they were read.

    Attributes:
        results: the evaluation.
        records: its list.
        reader: how its videos are read.
        spec: its views.
    """

    results: Results
    records: Records
    reader: ReaderSpec
    spec: EvalSpec


def source_of(exp: Path, results: Results) -> EvaluatedVideos:
    """Find the videos of an evaluation.

    Raises:
        UserError: the list, its folder or the config is missing, or the list has changed.
    """
    from anal_tools.evaluate import scoring
    from datasets.lists.records import Records
    from datasets.loading.loader import loader_options
    from utils import config

    # Results of older versions hold no config
    cfg = scoring.config_of(results) if "data" in results.summary.get("config", {}) else config.load(exp)
    summary = results.summary
    source, root = Path(summary.get("list") or cfg.val_source), summary.get("root") or cfg.val_root

    if not source.is_file():
        raise UserError(f"{source}: the evaluated list is missing")
    if not Path(root).is_dir():
        raise UserError(f"{root}: the folder of the videos is missing")
    # Load the list as it was evaluated: the config may have changed, but the number of scores per video has not.
    records = Records.load(source, root, num_class=results.num_class, layout=cfg.data.list_layout)
    if records.list_hash != summary.get("list_hash"):
        raise UserError(f"{source}: the list has changed since the evaluation")
    return EvaluatedVideos(results, records, loader_options(cfg).reader, scoring.kept_protocol(results).spec)


def make(
    source: EvaluatedVideos,
    rows: Sequence[int],
    folder: Path,
    *,
    clips: int,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[int, Pictures], list[str]]:
    """Make sheets of frames for `rows`, and clips for the first `clips` of them; existing files are kept.

    Args:
        source: the videos.
        rows: rows of the results.
        folder: folder of the files.
        clips: how many of the rows get a clip.
        say: called with lines about progress.

    Returns:
        row -> the data about its pictures that the page needs, and a line for each video that could not be read.
    """
    from datasets.readers import open_reader

    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(row, number < clips) for number, row in enumerate(rows)]
    by_row: dict[int, Pictures] = {}
    failed = []

    def one(job: tuple[int, bool]) -> tuple[int, Pictures | str]:
        reader = open_reader(source.reader, source.records)  # one for each thread: readers have state
        try:
            return job[0], _pictures(source, reader, job[0], folder, with_clip=job[1])
        except MediaError as error:
            return job[0], str(error)
        finally:
            reader.close()

    # Threads are enough: decoders, encoders and the resizer release the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for number, (row, pictures) in enumerate(pool.map(one, tasks), start=1):
            if isinstance(pictures, str):
                failed.append(pictures)
            else:
                by_row[row] = pictures
            if number % 50 == 0:
                say(f"pictures of {number} of {len(tasks)} videos")
    return by_row, failed


def forget_others(folder: Path, by_row: dict[int, Pictures]) -> None:
    """Delete pictures of earlier reports; leave all other files alone."""
    if not folder.is_dir():
        return
    kept = {Path(path).name for one in by_row.values() for path in (one["sheet"], one.get("clip", ""))}
    kept |= {
        Path(path).name for one in by_row.values() for maps in one.get("maps", {}).values() for _, path in maps["shown"]
    }

    # The names of `stem_of`; .tmp is left by a report that was killed
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{20}\.(jpg|webm)(\.tmp)?", path.name) and path.name not in kept:
            path.unlink()


def _pictures(source: EvaluatedVideos, reader: Reader, row: int, folder: Path, *, with_clip: bool) -> Pictures:
    """Make sheet and clip of one video; see `make`."""
    seen = seen_of(source, reader, row)
    picked = seen.frames[seen.picked]
    stem = stem_of(source, row, [picked.tolist(), seen.box, seen.size, seen.flip])

    sheet = folder / f"{stem}.jpg"
    if not sheet.exists():
        write_sheet(crops_of(reader, row, seen, picked), sheet)
    pictures: Pictures = {
        "sheet": f"media/{sheet.name}",
        "frames": picked.tolist(),
        "of": len(seen.frames),
        **layout_of(seen),
    }

    if with_clip:
        metadata = seen.metadata
        part = clip_part(metadata.frames, metadata.fps, seen.frames)
        clip = folder / f"{stem}.{SUFFIX}"
        rate = metadata.fps / part.step
        if not clip.exists():
            _write_clip(reader, row, part, (metadata.height, metadata.width), rate, clip)
        pictures["clip"] = f"media/{clip.name}"
        last = (len(part) - 0.5) / rate
        # The middle of a frame's time: a seek to its very beginning may show the frame before.
        times = [(max(0, int(frame) - part.start) // part.step + 0.5) / rate for frame in picked]
        pictures["times"] = [round(min(time, last), 4) for time in times]
        # The clip is a part of the video: show which
        if len(part) * part.step < metadata.frames:
            pictures["part"] = f"{part.start / metadata.fps:.0f}–{part.stop / metadata.fps:.0f} s"
    return pictures


def seen_of(source: EvaluatedVideos, reader: Reader, row: int) -> Seen:
    """Return the shown view of a video, with the frames that the evaluation recorded.

    Raises:
        MediaError: the video has changed.
    """
    from datasets.plan.views import resolve_eval

    metadata = reader.probe(row)
    plan = resolve_eval(metadata, source.spec, row)
    view = shown_view(source.spec.num_clips, plan.boxes, plan.flips, plan.size)
    frames = np.asarray(source.results.frames[row, view], np.int64)  # (T,)
    if (frames < 0).any() or int(frames.max()) >= metadata.frames:
        raise MediaError(
            source.records.path(row), "does not have the frames that the evaluation saw; it has changed since"
        )

    box = tuple(int(value) for value in plan.boxes[view])
    return Seen(metadata, view, frames, box, bool(plan.flips[view]), plan.size)


def crops_of(reader: Reader, row: int, seen: Seen, frames: np.ndarray) -> np.ndarray:
    """Read frames as the network saw them: (F, h, w, 3) uint8."""
    whole = np.empty((len(frames), *seen.size, 3), np.uint8)
    # A frame that occurs several times is read once
    distinct, places = np.unique(frames, return_inverse=True)
    reader.read(row, distinct, None, seen.size, whole[: len(distinct)])
    x1, y1, x2, y2 = seen.box
    crops = whole[places, y1:y2, x1:x2]
    return crops[:, :, ::-1] if seen.flip else crops  # along the width


def layout_of(seen: Seen) -> _Layout:
    """Return columns, width and height of a sheet in pixels."""
    count = len(seen.picked)
    x1, y1, x2, y2 = seen.box
    columns, (height, width) = min(count, SHEET_COLUMNS), _tile(y2 - y1, x2 - x1)
    return {
        "columns": columns,
        "width": columns * (width + SHEET_GAP) - SHEET_GAP,
        "height": -(-count // columns) * (height + SHEET_GAP) - SHEET_GAP,  # ceil(count / columns) rows
    }


def shown_view(num_clips: int, boxes: np.ndarray, flips: np.ndarray, size: tuple[int, int]) -> int:
    """Return the number of the shown view: of the middle clip, the crop nearest to the centre, not mirrored."""
    per_clip = len(boxes) // num_clips
    first = (num_clips // 2) * per_clip
    crops, mirrored = boxes[first : first + per_clip], flips[first : first + per_clip]
    # Twice the distance between the centres, |dx| + |dy|
    away = np.abs(crops[:, :2] + crops[:, 2:] - np.array([size[1], size[0]])).sum(axis=1)
    # The last key of lexsort counts first: unmirrored before near
    return first + int(np.lexsort((away, mirrored))[0])


def clip_part(frames: int, fps: float, seen: np.ndarray) -> range:
    """Return the frames of the clip: all of a short video, else CLIP_SECONDS around those seen; at most CLIP_RATE."""
    # The tolerance keeps 30.0000001 frames/s from a step of 3
    step = max(1, math.ceil(fps / CLIP_RATE - 1e-6)) if fps > 0 else 1
    length = frames if fps <= 0 else min(frames, max(step, round(CLIP_SECONDS * fps)))
    middle = (int(seen.min()) + int(seen.max())) // 2
    start = min(max(0, middle - length // 2), frames - length)
    return range(start, start + length, step)


def stem_of(source: EvaluatedVideos, row: int, how: list[object]) -> str:
    """Return a file name for one video's pictures; other videos, lists or views get a different name."""
    path = source.records.full_path(row)
    stamp = os.stat(path)
    text = json.dumps(
        [path, stamp.st_mtime_ns, stamp.st_size, _LAYOUT, source.records.starts[row].item(), how, _OPTIONS]
    )
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def _tile(height: int, width: int) -> tuple[int, int]:
    """Return (height, width) of a crop on the sheet, in pixels."""
    return TILE_HEIGHT, max(1, round(TILE_HEIGHT * width / height))


def write_sheet(crops: np.ndarray, path: Path) -> None:
    """Write frames (F, h, w, 3) side by side, SHEET_COLUMNS in a row, as a JPEG."""
    import cv2
    import simplejpeg

    (height, width), columns = _tile(*crops.shape[1:3]), min(len(crops), SHEET_COLUMNS)
    rows = -(-len(crops) // columns)
    down, across = height + SHEET_GAP, width + SHEET_GAP
    sheet = np.full((rows * down - SHEET_GAP, columns * across - SHEET_GAP, 3), 128, np.uint8)

    # Cells without a frame stay grey
    for place, crop in enumerate(crops):
        y, x = place // columns * down, place % columns * across
        small = cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=cv2.INTER_AREA)
        sheet[y : y + height, x : x + width] = small

    files.write(path, simplejpeg.encode_jpeg(sheet, quality=85, colorsubsampling="420"))


def _write_clip(reader: Reader, row: int, part: range, size: tuple[int, int], rate: float, path: Path) -> None:
    """Encode frames as a small WebM, CLIP_SIDE at the short side, never enlarged, with even sides."""
    import io
    from fractions import Fraction

    import av

    factor = min(1.0, CLIP_SIDE / min(size))
    height, width = (max(2, 2 * round(side * factor / 2)) for side in size)  # 4:2:0 needs even sides
    pixels = np.empty((len(part), height, width, 3), np.uint8)
    reader.read(row, np.array(part), None, (height, width), pixels)

    file = io.BytesIO()
    with av.open(file, "w", format=SUFFIX) as container:
        try:
            stream = container.add_stream(CODEC, rate=Fraction(rate).limit_denominator(1001), options=_OPTIONS)
        except ValueError as error:
            raise UserError("report: PyAV was built without VP8; install the wheel, or use --clips 0") from error
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))

    files.write(path, file.getvalue())
