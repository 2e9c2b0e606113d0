"""`python main.py eval EXP`: score a list with a checkpoint and keep everything in `results/`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils.faults import UserError
from utils.watchdog import Watchdog

NEEDS_VALIDATE = True


def main(argv: list[str], *, validate: Callable[..., dict[str, float] | None]) -> int:
    """Parse the command line and evaluate; `validate` is main.validate."""
    parser = argparse.ArgumentParser(prog="main.py eval", description="Evaluate a checkpoint, write results/<name>.")
    parser.add_argument("exp", type=Path, help="experiment folder, holds config.yaml")
    parser.add_argument("--checkpoint", default=None, metavar="best|latest|FILE", help="default: best, else latest")
    parser.add_argument("--list", type=Path, default=None, help="score this list instead of val_source")
    parser.add_argument("--root", type=Path, default=None, help="where that list's paths start (default: val_root)")
    parser.add_argument("--name", default=None, help="name of the results (default: the checkpoint's kind)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    args = parser.parse_args(argv)
    overrides = list(args.set)
    overrides += [f"common.val_source={args.list.resolve()}"] if args.list else []
    overrides += [f"common.val_root={args.root.resolve()}"] if args.root else []
    return evaluate(args.exp, args.checkpoint, args.name, overrides, validate)


def evaluate(
    exp: Path,
    checkpoint_name: str | None,
    name: str | None,
    overrides: list[str],
    validate: Callable[..., dict[str, float] | None],
) -> int:
    """Score every video of the validation list exactly once and write `results/<name>`.

    Returns:
        0, or 75 when a signal stopped it.
    """
    from anal_tools import results
    from datasets import loader
    from datasets.records import Records
    from utils import checkpoint, config, dist, run_dir, signals
    from utils.run import STOPPED, autocast

    cfg = config.load(exp, overrides)
    config.check_files(cfg)
    weights = choose_weights(exp, checkpoint_name)
    name = name or {checkpoint.BEST: "best", checkpoint.LATEST: "latest"}.get(weights.name, weights.stem)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        world = dist.join()
        stack.callback(dist.leave)
        records = Records.load(Path(cfg.val_source), cfg.val_root, num_class=cfg.model.num_class)
        state = checkpoint.load(weights)
        net = build_for_evaluation(cfg, state, weights, world)
        folder = exp / "results" / name
        lock = stack.enter_context(contextlib.closing(run_dir.RunDir(exp, f"eval-{name}")))
        world.on_main(lock.lock)
        weights_hash = checkpoint.file_hash(weights) if world.is_main else ""
        earlier = Earlier(world, folder, len(records), identity(cfg, records, weights_hash))
        videos = loader.build(cfg, "val", world, records=records, skip=earlier.done)
        stack.callback(videos.close)
        stop = stack.enter_context(signals.StopFlag())
        writer = results.PartWriter(folder, world.rank, start=earlier.starts)
        metrics = validate(
            net,
            videos,
            world=world,
            num_class=cfg.model.num_class,
            normalise=normaliser(cfg),
            autocast=lambda: autocast(cfg.precision, world.device),
            clips_per_forward=cfg.batch_size,
            keep=stack.enter_context(watched(exp, cfg, world, name, videos)).passing(writer.keep),
            stop=stop,
            earlier=earlier.logits(records.labels),
        )
        writer.flush()
        if metrics is None:
            return STOPPED
        world.barrier()
        summary = about(cfg, videos.spec, records, weights, state.get("step"))
        summary |= {"weights_hash": weights_hash, "metrics": metrics, "ranks": world.size}
        summary["seconds"] = round(time.monotonic() - started, 3)
        ids = [records.path(i) for i in range(len(records))]
        world.on_main(lambda: report(folder, ids, records.labels, summary))
    return 0


def watched(exp: Path, cfg: Any, world: Any, name: str, videos: Any) -> Watchdog:
    """The watchdog of an evaluation: every video is progress."""
    limit = 60 * cfg.watchdog_minutes
    watch = Watchdog(exp, seconds=limit, rank=world.rank, ranks=world.size, kind=f"eval-{name}")
    watch.phase("evaluation", None, videos.being_read)
    return watch


def normaliser(cfg: Any) -> Callable[[Any], Any]:
    """What turns uint8 clips (N, T, H, W, C) into the network's input, with the config's colours."""
    from utils import transforms
    from utils.run import dtype_of

    colour = {"mean": cfg.augmentation.mean, "std": cfg.augmentation.std}
    return functools.partial(transforms.normalise, **colour, dtype=dtype_of(cfg.precision))


def about(cfg: Any, spec: Any, records: Any, weights: Path, step: int | None) -> dict[str, Any]:
    """What was evaluated, on what and how."""
    from datasets.class_names import read_class_names
    from utils import config

    return {
        "protocol": protocol(spec),
        "list": str(cfg.val_source),
        "list_hash": records.list_hash,
        "weights": str(weights),
        "step": step,
        "class_names": read_class_names(config.class_names_file(cfg), cfg.model.num_class),
    }


def identity(cfg: Any, records: Any, weights_hash: str) -> dict[str, Any]:
    """What makes an evaluation the same as one that was stopped or killed: weights, list, views, precision, colours."""
    from datasets.plan import eval_spec

    what = {"weights": weights_hash, "list": records.list_hash, "precision": cfg.precision}
    return what | {"views": eval_spec(cfg).to_json(), "colour": [cfg.augmentation.mean, cfg.augmentation.std]}


class Earlier:
    """What an evaluation that was stopped or killed has left. Every rank makes one: rank 0 looks and tells the others.

    Attributes:
        starts: how often this evaluation was started before.
        done: samples that need not be scored again.
    """

    def __init__(self, world: Any, folder: Path, videos: int, key: dict[str, Any]) -> None:
        import torch

        from anal_tools import results

        self.world, self.parts = world, []
        message = torch.zeros(videos + 1, dtype=torch.int64)
        if world.is_main:
            message[0], self.parts = results.earlier_parts(folder, key, videos)
            for part in self.parts:
                message[1 + torch.from_numpy(part["samples"])] = 1
        message = world.broadcast_(message.to(world.device)).cpu()
        self.starts, self.done = int(message[0]), set(message[1:].nonzero().flatten().tolist())
        if world.is_main and self.done:
            print(f"going on: {len(self.done)} of {videos} videos were scored before", flush=True)

    def logits(self, labels: Any) -> Iterator[tuple[int, Any]]:
        """(label, logits (V, K) or None) of each video that is done; on rank 0 only, so that each counts once."""
        import torch

        for part in self.parts:
            good = iter(part["logits"])
            for sample, why in zip(part["samples"], part["failed"], strict=True):
                scores = None if why else torch.from_numpy(next(good)).to(self.world.device)
                yield int(labels[sample]), scores


def protocol(spec: Any) -> dict[str, Any]:
    """The views of an evaluation as plain values, and in words."""
    frames = spec.sampling.frames_per_clip
    text = (
        f"{spec.num_clips} clip(s) x {spec.crops} crop(s) = {spec.views} view(s) of {frames} frames, "
        f"{spec.crop_size} pixels from short side {spec.scale}, mean of softmax"
    )
    return {"text": text, "views": spec.views, "average": "prob", **json.loads(spec.to_json())}


def choose_weights(exp: Path, wanted: str | None) -> Path:
    """The checkpoint file meant by `best`, `latest`, a path, or nothing (best, else latest).

    Raises:
        UserError: there is no such file.
    """
    from utils import checkpoint

    names = {"best": [checkpoint.BEST], "latest": [checkpoint.LATEST], None: [checkpoint.BEST, checkpoint.LATEST]}
    paths = [exp / file for file in names[wanted]] if wanted in names else [Path(str(wanted))]
    for path in paths:
        if path.is_file():
            return path
    raise UserError(f"{paths[0]}: no such checkpoint; train first, or name one with --checkpoint best|latest|FILE")


def build_for_evaluation(cfg: Any, state: dict[str, Any], weights: Path, world: Any) -> Any:
    """The model of the config with a checkpoint's weights, in eval mode on the device."""
    import methods
    from utils import checkpoint
    from utils.run import model_arguments, place

    net = methods.build(**model_arguments(cfg, pretrained=False))
    checkpoint.load_model(net, state["model"], weights)
    return place(net, world.device, cfg.precision).eval()


def report(folder: Path, ids: list[str], labels: Any, summary: dict[str, Any]) -> None:
    """Merge the parts, write the summary and print what a person wants to know."""
    from anal_tools import results

    failed = results.merge(folder, ids, labels, summary)
    numbers = summary["metrics"]
    print(f"{summary['weights']} on {summary['list']}: {summary['protocol']['text']}")
    print(
        f" * Prec@1 {numbers['top1']:.3f}\tPrec@5 {numbers['top5']:.3f}\tLoss {numbers['loss']:.4f}\t"
        f"total_num = {numbers['num_videos']:.0f}"
    )
    print(f"   mean class accuracy {numbers['mean_class_accuracy']:.3f}, {len(failed)} videos could not be read")
    for path, reason in list(failed.items())[:10]:
        print(f"   not readable (counts as wrong): {reason if path in reason else f'{path}: {reason}'}")
    print(f"results: {folder}  (next: python main.py analyze {folder.parent.parent})")
