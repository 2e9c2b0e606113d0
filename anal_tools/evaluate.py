"""`python main.py eval EXP`: score a list with a checkpoint and keep everything in `results/`."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.faults import UserError

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
    from datasets.class_names import read_class_names
    from datasets.records import Records
    from utils import checkpoint, config, dist, run_dir, signals, transforms
    from utils.run import STOPPED, autocast, dtype_of

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
        videos = loader.build(cfg, "val", world, records=records)
        stack.callback(videos.close)
        stop = stack.enter_context(signals.StopFlag())
        folder = exp / "results" / name
        lock = run_dir.RunDir(exp, f"eval-{name}")
        world.on_main(lock.lock)
        stack.callback(lock.close)
        world.on_main(lambda: results.clear_parts(folder))
        writer = results.PartWriter(folder, world.rank)
        colour = {"mean": cfg.augmentation.mean, "std": cfg.augmentation.std}
        metrics = validate(
            net,
            videos,
            world=world,
            num_class=cfg.model.num_class,
            normalise=lambda clips: transforms.normalise(clips, **colour, dtype=dtype_of(cfg.precision)),
            autocast=lambda: autocast(cfg.precision, world.device),
            clips_per_forward=cfg.batch_size,
            keep=writer.keep,
            stop=stop,
        )
        if metrics is None:
            return STOPPED
        writer.flush()
        world.barrier()
        summary = {
            "protocol": protocol(videos.spec),
            "list": str(cfg.val_source),
            "list_hash": records.list_hash,
            "weights": str(weights),
            "weights_hash": checkpoint.file_hash(weights) if world.is_main else "",
            "step": state.get("step"),
            "metrics": metrics,
            "class_names": read_class_names(config.class_names_file(cfg), cfg.model.num_class),
            "seconds": round(time.monotonic() - started, 3),
            "ranks": world.size,
        }
        ids = [records.path(i) for i in range(len(records))]
        world.on_main(lambda: report(folder, ids, records.labels, summary))
    return 0


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
