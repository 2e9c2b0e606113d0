"""`python main.py predict EXP|CKPT|FILE.onnx SOURCE...`: what a model sees in videos that have no label.

Videos go through the plans, readers, views and scores of an evaluation. What cannot be read is named, the rest is done,
and the exit code is then 1. docs/predict.md has the fields of infer.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.faults import MediaError, UserError

if TYPE_CHECKING:
    from anal_tools.predict_model import Predictor
    from anal_tools.predict_sources import Source
    from utils.dist import World

NEEDS_VALIDATE = True
TOP = 5


@dataclasses.dataclass
class Found:
    """One video that was looked at.

    Attributes:
        source: what the user named.
        logits: (V, K) float32.
        score: (K,) mean over the views of the softmax.
        frames, fps: of the video.
        failure: why it could not be read; the other fields are then empty.
        cues: what is seen over time (`anal_tools.predict_files.Cue`), one cue without windows.
    """

    source: Source
    logits: np.ndarray | None = None
    score: np.ndarray | None = None
    frames: int = 0
    fps: float = 0.0
    failure: str = ""
    cues: list[Any] = dataclasses.field(default_factory=list)


def main(argv: list[str], *, validate: Callable[..., Any]) -> int:
    """Parse the command line and predict; `validate` is main.validate."""
    parser = argparse.ArgumentParser(prog="main.py predict", description="Say what is seen in videos.")
    parser.add_argument("target", type=Path, metavar="EXP|CKPT", help="experiment, checkpoint, or exported .onnx file")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="videos, folders, folders of images, list files")
    parser.add_argument("--checkpoint", default=None, metavar="best|latest|FILE", help="default: best, else latest")
    parser.add_argument("--engine", choices=("torch", "onnx"), default="torch", help="what runs the network")
    parser.add_argument("--model", type=Path, default=None, metavar="FILE", help="the .onnx file for --engine onnx")
    parser.add_argument("--root", type=Path, default=None, help="where the paths of list files start")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    parser.add_argument("--window", type=float, default=None, metavar="SECONDS", help="predict over time in such parts")
    parser.add_argument("--stride", type=float, default=None, metavar="SECONDS", help="their distance; default: half")
    parser.add_argument("--srt", action="store_true", help="write subtitles (windows of 2 s unless --window is given)")
    parser.add_argument("--video", action="store_true", help="write each video with its predictions drawn in, as mp4")
    parser.add_argument("--logits", action="store_true", help="keep the logits of every view in infer.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    return predict(parser.parse_args(argv), validate)


def predict(args: argparse.Namespace, validate: Callable[..., Any]) -> int:
    """Score all sources, print the table, write the files.

    Returns:
        0, or 1 when a source could not be read.

    Raises:
        UserError: a model or a list that cannot be used, or contradictory options.
    """
    from anal_tools import predict_files
    from anal_tools.predict_sources import expand
    from utils import dist

    if (args.stride is not None and args.stride <= 0) or (args.window is not None and args.window <= 0):
        raise UserError("predict: --window and --stride are seconds greater than 0")
    if args.srt and args.window is None:
        args.window = 2.0
    sources = expand(args.sources, args.root)
    with contextlib.ExitStack() as stack:
        world = dist.join()
        stack.callback(dist.leave)
        predictor = load(args, world)
        print(f"{predictor.about['weights']} ({predictor.about['engine']}), {len(sources)} source(s)", flush=True)
        found = look(predictor, sources, world, validate)
        args.out.mkdir(parents=True, exist_ok=True)
        names = file_names(sources)
        for one, name in zip(found, names, strict=True):
            if not one.failure:
                finish(one, name, args, predictor, world)
            print(as_text(one, predictor.classes), flush=True)
    predict_files.write_json(args.out / "infer.json", as_json(found, predictor, logits=args.logits))
    failed = [one for one in found if one.failure]
    print(f"{len(found) - len(failed)} predicted, {len(failed)} not readable; {args.out / 'infer.json'}")
    return 1 if failed else 0


def load(args: argparse.Namespace, world: World) -> Predictor:
    """The model that the command line names."""
    from anal_tools import predict_model

    if args.target.suffix == ".onnx":
        return predict_model.from_onnx(args.model or args.target, world)
    if args.engine == "onnx" and args.model is None:
        raise UserError("predict: --engine onnx needs --model FILE.onnx (of `python main.py export EXP --to onnx`)")
    if args.engine == "torch" and args.model is not None:
        raise UserError("predict: --model goes with --engine onnx; a checkpoint is named by --checkpoint FILE")
    own = predict_model.from_experiment(args.target, args.checkpoint, args.set, world)
    return own if args.model is None else predict_model.from_onnx(args.model, world, like=own)


def look(predictor: Predictor, sources: Sequence[Source], world: World, validate: Callable[..., Any]) -> list[Found]:
    """Score the sources as an evaluation does, those of each reader together; in the order of `sources`."""
    from anal_tools.predict_sources import records_of
    from datasets.eval_loader import EvalLoader
    from utils import metrics

    found = [Found(source, failure=source.reason) for source in sources]
    for reader in ("video", "frames"):
        mine = [one for one in found if one.source.reader == reader]
        if not mine:
            continue
        base = predictor.reading
        # Always in a process of its own: one that hangs on a file is given up at the deadline.
        reading = dataclasses.replace(base, reader=_reader(base.reader, reader), workers=max(1, base.workers))
        reading = dataclasses.replace(reading, workers=min(reading.workers, len(mine)), on_bad="skip")

        def keep(item: Any, logits: Any, mine: list[Found] = mine) -> None:
            one = mine[item.sample]
            if logits is None:
                one.failure = str(item.failure).removeprefix(f"{one.source}: ")
            else:
                one.logits = logits.float().cpu().numpy()
                one.score = metrics.merge_views(one.logits[None])[0]

        with EvalLoader(records_of(one.source for one in mine), predictor.spec, reading, device=world.device) as videos:
            validate(
                predictor.net,
                videos,
                world=world,
                num_class=len(predictor.classes),
                normalise=predictor.normalise,
                autocast=predictor.autocast,
                clips_per_forward=predictor.clips,
                keep=keep,
            )
    return found


def finish(one: Found, name: str, args: argparse.Namespace, predictor: Predictor, world: World) -> None:
    """The facts of a video, what is seen over time, and the files that were asked for; a failure is noted."""
    from anal_tools import predict_files, predict_windows
    from anal_tools.predict_sources import records_of
    from datasets.readers import open_reader
    from utils import metrics

    assert one.score is not None
    spec = _reader(predictor.reading.reader, one.source.reader)
    with contextlib.closing(open_reader(spec, records_of([one.source]))) as reader:
        try:
            facts = reader.probe(0)
            one.frames, one.fps = facts.frames, facts.fps
            whole = predict_files.top_classes(one.score, predictor.classes, TOP)
            one.cues = [predict_files.Cue(0.0, facts.frames / facts.fps, whole)]
            if args.window is not None:
                parts = predict_windows.windows(facts, args.window, args.stride or args.window / 2)
                scored = predict_windows.window_logits(
                    reader, 0, parts, spec=predictor.spec, score=lambda views: predictor.logits(views, world.device)
                )
                one.cues = [
                    predict_files.Cue(
                        part.start,
                        part.end,
                        predict_files.top_classes(metrics.merge_views(logits[None])[0], predictor.classes, TOP),
                    )
                    for part, logits in zip(parts, scored, strict=True)
                ]
            if args.srt:
                predict_files.write_srt(args.out / f"{name}.srt", one.cues)
            if args.video:
                target = args.out / f"{name}.mp4"
                if target.exists() and target.samefile(one.source.path):
                    raise UserError(f"{target} is the source itself; give another --out")
                predict_files.write_video(target, reader, 0, one.cues)
        except MediaError as error:
            one.failure = error.reason


def _reader(spec: Any, kind: str) -> Any:
    """The reader of a source: names of frame files as configured, if the config is about frames."""
    from datasets.readers import ReaderSpec

    return spec if spec.kind == kind else ReaderSpec(kind, fps=spec.fps)


def file_names(sources: Sequence[Source]) -> list[str]:
    """A name for the files of each source: its own without ending, numbered where two are alike."""
    seen: dict[str, int] = {}
    names = []
    for source in sources:
        stem = Path(source.path).resolve().stem.encode("utf-8", "replace").decode()
        seen[stem] = seen.get(stem, 0) + 1
        names.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return names


def as_text(one: Found, classes: list[str]) -> str:
    """One block of the table: the video, then rank, score and name of its best classes."""
    from anal_tools.get_reference_results import one_line
    from anal_tools.predict_files import top_classes

    name = one_line(str(one.source))
    if one.failure or one.score is None:
        return f"{name}\n   not readable: {one_line(one.failure)}"
    rows = [
        f"  {rank:>2}  {entry['score']:.4f}  {entry['name']}"
        for rank, entry in enumerate(top_classes(one.score, classes, TOP), start=1)
    ]
    return "\n".join([f"{name}  ({one.frames} frames, {one.frames / max(one.fps, 1e-9):.2f} s)", *rows])


def as_json(found: Sequence[Found], predictor: Predictor, *, logits: bool) -> dict[str, Any]:
    """The content of infer.json; docs/predict.md describes it."""
    from anal_tools.predict_files import top_classes
    from anal_tools.protocols import Protocol

    videos = []
    for one in found:
        if one.failure or one.score is None:
            continue
        top = top_classes(one.score, predictor.classes, TOP)
        entry = {"source": one.source.path, "frames": one.frames, "fps": round(one.fps, 4), "top": top}
        if len(one.cues) > 1:
            entry["windows"] = [cue.to_dict() for cue in one.cues]
        if logits and one.logits is not None:
            entry["logits"] = [[round(float(value), 6) for value in view] for view in one.logits]
        videos.append(entry)
    failed = [{"source": one.source.path, "reason": one.failure} for one in found if one.failure]
    about = {"format": 1, "model": predictor.about, "protocol": Protocol(predictor.spec).to_dict()}
    return about | {"classes": predictor.classes, "videos": videos, "failed": failed}
