"""`python main.py predict EXP|CKPT|FILE.onnx SOURCE...`: what a model sees in videos that have no label.

Videos go through the plans, readers, views and scores of an evaluation. A video that cannot be read is named, the
others are scored, and the exit code is 1. docs/predict.md lists the fields of infer.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anal_tools.evaluate.protocols import Protocol
from anal_tools.predict import out_folder, outputs, sliding
from anal_tools.predict.outputs import Cue, top_classes
from anal_tools.predict.sources import InputVideo, expand, records_of
from anal_tools.text import one_line
from datasets.readers import Reader, ReaderSpec, open_reader
from datasets.readers.ending import on_what_decodes
from utils import metrics
from utils.errors import MediaError, UserError
from utils.options import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from anal_tools.predict.predictor import Predictor
    from datasets.loading.eval import VideoItem
    from utils.dist import World

TOP = 5  # classes that the table and infer.json list
NOT_FINITE = "its scores are not finite numbers; try --set common.precision=fp32"


@dataclasses.dataclass
class Prediction:
    """One source and everything that was found out about it.

    Attributes:
        source: what the user named.
        logits: (V, K) float32.
        score: (K,) mean over the views of the softmax.
        frames, fps: number and rate of the video's frames.
        failure: why it could not be read; the other fields are then empty.
        missing: number of frames at its end that do not decode; `frames` does not count them.
        unwritten: why its subtitles or its video could not be written.
        cues: what the model sees over time (`anal_tools.predict.outputs.Cue`); one cue without windows.
    """

    source: InputVideo
    logits: np.ndarray | None = None
    score: np.ndarray | None = None
    frames: int = 0
    fps: float = 0.0
    failure: str = ""
    missing: int = 0
    unwritten: str = ""
    cues: list[Cue] = dataclasses.field(default_factory=list)


def main(argv: list[str]) -> int:
    """Parse the command line and predict; return the exit code."""
    parser = Parser(prog="main.py predict", description="Classify videos.")
    parser.add_argument("target", type=Path, metavar="EXP|CKPT", help="experiment, checkpoint, or exported .onnx file")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="videos, folders, folders of images, list files")
    parser.add_argument("--checkpoint", default=None, metavar="best|latest|FILE", help="default: best, else latest")
    parser.add_argument("--engine", choices=("torch", "onnx"), default="torch", help="library that runs the network")
    parser.add_argument("--model", type=Path, default=None, metavar="FILE", help="the .onnx file for --engine onnx")
    parser.add_argument("--root", type=Path, default=None, help="folder of the paths in list files")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    parser.add_argument(
        "--window", type=float, default=None, metavar="SECONDS", help="length of the time windows to predict"
    )
    parser.add_argument(
        "--stride", type=float, default=None, metavar="SECONDS", help="distance between windows; default: half a window"
    )
    parser.add_argument("--srt", action="store_true", help="write subtitles (windows of 2 s unless --window is given)")
    parser.add_argument("--video", action="store_true", help="write each video as mp4 with its predictions drawn on it")
    parser.add_argument("--logits", action="store_true", help="keep the logits of every view in infer.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    return predict(parser.parse_args(argv))


def predict(args: argparse.Namespace) -> int:
    """Score all sources, print the table, write the files.

    Returns:
        0, or 1 if a source could not be read or one of its files could not be written.

    Raises:
        UserError: the model or a list is unusable, options contradict each other, or a file would be replaced.
    """
    from utils import dist

    # Check all options and paths before the model is loaded.
    out_folder.check_seconds(window=args.window, stride=args.stride)
    if args.srt and args.window is None:
        # subtitles need windows, and 2 s are long enough to read one
        args.window = 2.0
    out_folder.check_folder(args.out)

    sources = expand(args.sources, args.root)
    names = out_folder.file_names(sources)
    endings = [ending for ending, is_asked in ((".srt", args.srt), (".mp4", args.video)) if is_asked]
    out_folder.check_targets(args.out, names, endings, [*args.sources, *(source.path for source in sources)])

    with contextlib.ExitStack() as stack:
        world = dist.join()
        stack.push(dist.leave)
        predictor = load(args, world)
        print(f"{predictor.about['weights']} ({predictor.about['engine']}), {len(sources)} source(s)", flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        predictions = look(predictor, sources, world)
        for one, name in zip(predictions, names, strict=True):
            if not one.failure:
                finish(one, name, args, predictor, world)
            print(as_text(one, predictor.classes), flush=True)

    infer = args.out / out_folder.INFER
    outputs.write_json(infer, as_json(predictions, predictor, logits=args.logits))
    failed, unwritten = (sum(bool(getattr(one, name)) for one in predictions) for name in ("failure", "unwritten"))
    lost = f", {unwritten} without their files" if unwritten else ""
    print(f"{len(predictions) - failed} predicted, {failed} not readable{lost}; {infer}")
    return 1 if failed or unwritten else 0


def load(args: argparse.Namespace, world: World) -> Predictor:
    """Return the model that the command line names."""
    from anal_tools.predict import predictor

    if args.target.suffix == ".onnx":
        return predictor.from_onnx(args.model or args.target, world)

    if args.engine == "onnx" and args.model is None:
        raise UserError("predict: --engine onnx needs --model FILE.onnx (from `python main.py export EXP --to onnx`)")
    if args.engine == "torch" and args.model is not None:
        raise UserError("predict: --model goes with --engine onnx; name a checkpoint with --checkpoint FILE")

    # for an exported file, the experiment named with it decides how media are read
    trained = predictor.from_experiment(args.target, args.checkpoint, args.set, world)
    return trained if args.model is None else predictor.from_onnx(args.model, world, like=trained)


def look(predictor: Predictor, sources: Sequence[InputVideo], world: World) -> list[Prediction]:
    """Score the sources as an evaluation does, those of each reader together, and return them in the same order."""
    from datasets.loading.eval import EvalLoader
    from utils.engine.evaluate import evaluate

    predictions = [Prediction(source, failure=source.reason) for source in sources]
    for reader in ("video", "frames"):
        mine = [one for one in predictions if one.source.reader == reader]
        if not mine:
            continue

        base = predictor.options
        # Always in a separate process: one that hangs on a file is ended at the deadline.
        options = dataclasses.replace(base, reader=_reader(base.reader, reader), workers=max(1, base.workers))
        options = dataclasses.replace(options, workers=min(options.workers, len(mine)), on_bad="skip")

        # `mine` as a default value, because a closure would see the list of the last reader
        def keep(item: VideoItem, logits: Tensor | None, mine: list[Prediction] = mine) -> None:
            """Keep the scores of one video, or the reason why it has none."""
            one = mine[item.sample]
            if logits is None:
                # the row of the table begins with the path already
                one.failure = str(item.failure).removeprefix(f"{one.source}: ")
                return

            one.logits = logits.float().cpu().numpy()
            if np.isfinite(one.logits).all():
                one.score = metrics.merge_views(one.logits[None])[0]
            else:
                one.failure = NOT_FINITE

        with EvalLoader(records_of(one.source for one in mine), predictor.spec, options, device=world.device) as videos:
            evaluate(
                predictor.net,
                videos,
                world=world,
                num_class=len(predictor.classes),
                normalise=predictor.normalise,
                autocast=predictor.autocast,
                clips_per_forward=predictor.clips,
                keep=keep,
            )
    return predictions


def finish(one: Prediction, name: str, args: argparse.Namespace, predictor: Predictor, world: World) -> None:
    """Add the metadata of a video, its cues over time, and the requested files; a failure becomes a note."""
    spec = _reader(predictor.options.reader, one.source.reader)
    with contextlib.closing(open_reader(spec, records_of([one.source]))) as reader:
        try:
            # once more with fewer frames if the last ones do not decode: all cues and files then agree
            def work(reader: Reader) -> None:
                over_time(one, reader, args, predictor, world)
                write_files(one, reader, name, args)

            _, one.missing = on_what_decodes(reader, 0, work)
        except MediaError as error:
            one.failure = error.reason


def over_time(one: Prediction, reader: Reader, args: argparse.Namespace, predictor: Predictor, world: World) -> None:
    """Add the metadata and the cues of a video.

    Raises:
        MediaError: a frame does not decode.
    """
    assert one.score is not None
    metadata = reader.probe(0)
    one.frames, one.fps = metadata.frames, metadata.fps

    whole = top_classes(one.score, predictor.classes, TOP)
    one.cues = [Cue(0.0, metadata.frames / metadata.fps, whole)]
    if args.window is None:
        return

    # half a window by default; more than 0 even for the shortest one
    parts = sliding.windows(metadata, args.window, args.stride or max(args.window / 2, 1e-3))
    scored = sliding.window_logits(
        reader, 0, parts, spec=predictor.spec, score=lambda views: predictor.logits(views, world.device)
    )

    cues = []
    for part, logits in zip(parts, scored, strict=True):
        if not np.isfinite(logits).all():
            raise MediaError(one.source.path, NOT_FINITE)
        top = top_classes(metrics.merge_views(logits[None])[0], predictor.classes, TOP)
        cues.append(Cue(part.start, part.end, top))
    one.cues = cues


def write_files(one: Prediction, reader: Reader, name: str, args: argparse.Namespace) -> None:
    """Write the requested subtitles and video; if that fails, note why and keep the scores.

    Raises:
        MediaError: a frame does not decode.
    """

    def kept(file: str, write: Callable[[Path], None]) -> None:
        target = args.out / file
        replaces = os.path.lexists(target)  # an earlier run wrote it, so it is noted already
        # noted after it was written: a note about the user's own file would allow replacing it
        write(target)
        if not replaces:
            out_folder.note(args.out, file)

    try:
        if args.srt:
            kept(f"{name}.srt", lambda file: outputs.write_srt(file, one.cues))
        if args.video:
            kept(f"{name}.mp4", lambda file: outputs.write_video(file, reader, 0, one.cues))
    except (UserError, OSError) as error:
        one.unwritten = str(error)


def _reader(spec: ReaderSpec, kind: str) -> ReaderSpec:
    """Return the reader of a source, with the configured names of frame files if the config reads frames."""
    return spec if spec.kind == kind else ReaderSpec(kind, fps=spec.fps, missing_share=spec.missing_share)


def as_text(one: Prediction, classes: list[str]) -> str:
    """Return one block of the table: the video, then rank, score and name of its best classes."""
    name = one_line(str(one.source))
    if one.failure or one.score is None:
        return f"{name}\n   not readable: {one_line(one.failure)}"

    less = f"; its last {one.missing} do not decode" if one.missing else ""
    rows = [
        f"  {rank:>2}  {entry['score']:.4f}  {entry['name']}"
        for rank, entry in enumerate(top_classes(one.score, classes, TOP), start=1)
    ]

    if one.unwritten:
        rows.append(f"   not written: {one_line(one.unwritten)}")
    return "\n".join([f"{name}  ({one.frames} frames, {one.frames / max(one.fps, 1e-9):.2f} s{less})", *rows])


def as_json(predictions: Sequence[Prediction], predictor: Predictor, *, logits: bool) -> dict[str, object]:
    """Return the content of infer.json, as docs/predict.md describes it."""
    videos = []
    for one in predictions:
        if one.failure or one.score is None:
            continue
        top = top_classes(one.score, predictor.classes, TOP)
        entry: dict[str, object] = {
            "source": one.source.path,
            "frames": one.frames,
            "fps": round(one.fps, 4),
            "top": top,
        }

        if len(one.cues) > 1:
            entry["windows"] = [cue.to_dict() for cue in one.cues]
        if logits and one.logits is not None:
            entry["logits"] = [[round(float(value), 6) for value in view] for view in one.logits]

        videos.append(entry)

    # a video without its files is in both lists
    reasons = [(one.source.path, one.failure or one.unwritten) for one in predictions]
    failed = [{"source": path, "reason": reason} for path, reason in reasons if reason]
    about = {"format": 1, "model": predictor.about, "protocol": Protocol(predictor.spec).to_dict()}
    return about | {"classes": predictor.classes, "videos": videos, "failed": failed}
