"""`python main.py eval EXP`: score a list with a checkpoint and keep everything in `results/`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from anal_tools.evaluate import identity, protocols, result_parts
from anal_tools.evaluate.network import build_for_evaluation, choose_weights, prepare, read_steady, scorer
from utils import errors, log
from utils.errors import UserError, refuse_odd_file
from utils.metrics import metrics_of
from utils.options import Parser
from utils.watchdog import Watchdog

if TYPE_CHECKING:
    from torch import Tensor

    from anal_tools.evaluate.network import CheckpointContent
    from anal_tools.evaluate.results import Summary
    from datasets.lists.records import Records
    from datasets.loading.eval import EvalLoader
    from utils.config import Config
    from utils.dist import World

_ENDINGS = (".pth.tar", ".pth", ".pyth", ".pt", ".pdparams", ".pkl", ".safetensors", ".ckpt", ".tar")  # of weights
_NAME_BYTES = 200  # of a result: locks and reports add a prefix and a suffix; a file name has at most 255 bytes

__all__ = ["build_for_evaluation", "choose_weights", "evaluate", "main"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the verb eval; the launcher uses it to check the options before it starts a job."""
    parser = Parser(prog="main.py eval", description="Evaluate a checkpoint and write results/<name>.")
    parser.add_argument("exp", type=Path, help="experiment folder with a config.yaml")
    parser.add_argument("--checkpoint", default=None, metavar="best|latest|FILE", help="default: best, else latest")
    parser.add_argument("--list", type=Path, default=None, help="score this list instead of val_source")
    parser.add_argument("--root", type=Path, default=None, help="folder of that list's paths (default: val_root)")
    parser.add_argument("--name", default=None, help="name of the results (default: the checkpoint's kind, the views)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    add_options(parser)
    parser.add_argument("--keep", choices=("float32", "float16"), default="float32", help="number format of kept views")
    return parser


def main(argv: list[str]) -> int:
    """Parse the command line and evaluate; return the exit code."""
    args = parser().parse_args(argv)
    overrides = list(args.set)
    overrides += [f"common.val_source={args.list.resolve()}"] if args.list else []
    overrides += [f"common.val_root={args.root.resolve()}"] if args.root else []

    return evaluate(args.exp, args, overrides)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the views of an evaluation and for how they are computed."""
    how = parser.add_argument_group("which views of a video (default: those of training's validation)")
    how.add_argument(
        "--protocol", choices=sorted(protocols.PRESETS), help="the published evaluation protocol of a tool"
    )
    how.add_argument("--views", metavar="V", help="centre, 3crop, 10crop, or CLIPSxCROPS such as 10x3")
    how.add_argument("--scale", type=int, help="short side of the frames, pixels (default: test_resize)")
    how.add_argument("--crop-size", type=int, help="side of the crops, pixels (default: input_size)")
    how.add_argument("--average", choices=protocols.AVERAGES, help="mean of softmax, mean of logits, sum of softmax")
    how.add_argument("--per-position", action="store_true", help="PySlowFast's test: a softmax at each window")

    work = parser.add_argument_group("how it is computed")
    work.add_argument("--chunk", type=positive, metavar="N", help="views per forward pass (default: measured)")
    work.add_argument(
        "--plain", action="store_true", dest="as_is", help="use the network as trained, not its fastest form"
    )


def positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def evaluate(exp: Path, args: argparse.Namespace, overrides: list[str]) -> int:
    """Score every video of the validation list exactly once and write `results/<name>`.

    It resumes from the part files of the same evaluation (`result_parts.earlier_parts`), if one was stopped.

    Args:
        exp: experiment folder.
        args: the options of `main`.
        overrides: `key=value` texts that replace config values.

    Returns:
        0, or 75 when a signal stopped it.
    """
    import methods
    from datasets.loading import eval as eval_loader
    from datasets.loading import loader
    from methods import interop
    from utils import config, dist, run_dir, signals
    from utils.engine.network import model_arguments
    from utils.engine.run import STOPPED

    # Refuse what can be refused before anything expensive starts.
    cfg = config.load(exp, overrides)
    config.check_files(cfg, ("val",))
    protocol = chosen_protocol(cfg, args)
    weights = choose_weights(exp, args.checkpoint)
    name = checked_name(result_name(weights, args) if args.name is None else args.name)
    refuse_odd_file(exp / "results" / f"{name}.json")

    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        world = dist.join()
        stack.push(dist.leave)

        records = loader.records_of(cfg, "val")
        # The weights: hashed, and the same on all ranks although a training run may replace the file.
        build_plain = functools.partial(methods.build, **model_arguments(cfg, pretrained=False))
        read = functools.partial(interop.load_checkpoint, build=build_plain)  # reads files of other projects too
        state, weights_hash = read_steady(weights, read, world)
        world.on_main(
            lambda: print("".join(f"{line}\n" for line in remarks(cfg, protocol, records, state, weights)), end="")
        )

        build = functools.partial(build_for_evaluation, cfg, state, weights, world)
        net, cost = prepare(cfg, protocol, build, as_is=args.as_is)

        # One process at a time may write this result.
        folder = exp / "results" / name
        lock = stack.enter_context(contextlib.closing(run_dir.RunDir(exp, f"eval-{name}")))
        world.on_main(lock.lock)

        # The parts that a stopped evaluation left, if everything that decides a score is the same.
        how = {"as_is": args.as_is, "number_format": args.keep, "device": world.device.type}
        find_key = functools.partial(identity.identity, cfg, records, protocol, net, weights_hash=weights_hash, **how)
        earlier = ResumedParts(world, folder, len(records), find_key)

        # Score the rest; part files keep the scores of every few seconds.
        videos = loader.val(cfg, world, records=records, spec=protocol.spec, skip=earlier.done)
        stack.callback(videos.close)
        stop = stack.enter_context(signals.StopFlag(signals.stop_announcement()))

        writer = result_parts.PartWriter(folder, world.rank, start=earlier.starts, dtype=args.keep, owner=earlier.owner)
        results = scorer(net, cfg, world, protocol, args.chunk)(
            videos,
            keep=stack.enter_context(watched(exp, cfg, world, name, videos)).passing(writer.keep),
            stop=stop,
            earlier=earlier.logits(),
        )

        writer.flush()

        # The end: stopped, nothing readable, or a complete result.
        for text in videos.notes():
            print(text, flush=True)
        if results is None:
            if stop.trouble:
                errors.report_error(UserError(f"stopped by {stop.trouble}; run the same command to resume"))
            return STOPPED

        (metrics,) = results  # one head
        if eval_loader.read_nothing(metrics):
            world.barrier()  # every rank has written its last part, so `discard` leaves none behind
            world.on_main(lambda: result_parts.discard(folder))
            raise eval_loader.none_readable(videos)

        world.barrier()
        summary = about(cfg, protocol, records, weights, state)
        summary["weights_hash"], summary["metrics"] = weights_hash, metrics
        summary["cost"], summary["ranks"] = cost, world.size
        summary["seconds"] = round(time.monotonic() - started, 3)

        # Rank 0 merges the parts of all ranks.
        world.on_main(lambda: report(folder, records, summary, earlier.owner))
        if world.is_main and cfg.published.top1 is not None and "top1" in metrics:
            print(beside_published(cfg, protocol, metrics), flush=True)
    return 0


def chosen_protocol(cfg: Config, args: argparse.Namespace) -> protocols.Protocol:
    """Return the protocol that the command line selects."""
    names = ("protocol", "views", "scale", "crop_size", "average", "per_position")
    return protocols.choose(cfg, **{name: getattr(args, name) for name in names})


def result_name(weights: Path, args: argparse.Namespace) -> str:
    """Return a name from the kind of checkpoint and the options that replace the config's views."""
    from utils import checkpoint, checkpoint_names

    # `best` and `latest` keep their names; another file gives its name without the ending.
    ending = next((ending for ending in _ENDINGS if weights.name.lower().endswith(ending)), "")
    stem = weights.name[: len(weights.name) - len(ending)] or weights.name
    base = checkpoint_names.split_name(weights.name)[0]
    kind = {checkpoint.BEST: "best", checkpoint.LATEST: "latest"}.get(base, stem)

    sizes = [f"{key}{value}" for key, value in (("s", args.scale), ("c", args.crop_size)) if value]
    other = [args.protocol, args.views, *sizes, args.average, "positions" if args.per_position else None]
    return "-".join([kind, *filter(None, other)])


def checked_name(name: str) -> str:
    """Return the name of a result, if `results/` can have a folder and a JSON file of that name.

    Raises:
        UserError: the name is not possible.
    """
    length = len(os.fsencode(name))
    if name in ("", ".", "..") or "/" in name or "\0" in name or name.endswith((".json", ".tmp")):
        says = "must not hold / or end in .json or .tmp"
    elif length > _NAME_BYTES:
        says = f"must not have more than {_NAME_BYTES} bytes, and has {length}"
    else:
        return name
    raise UserError(f"--name {name!r}: the name of a result {says}; choose another with --name")


def watched(exp: Path, cfg: Config, world: World, name: str, videos: EvalLoader) -> Watchdog:
    """Return the watchdog of an evaluation, for which every video is progress."""
    limit = 60 * cfg.watchdog_minutes
    watch = Watchdog(exp, seconds=limit, rank=world.rank, ranks=world.size, kind=f"eval-{name}")
    watch.phase("evaluation", None, videos.being_read)
    return watch


def about(
    cfg: Config, protocol: protocols.Protocol, records: Records, weights: Path, state: CheckpointContent
) -> Summary:
    """Return the summary of what was evaluated, on which list and with which views; metrics are still empty."""
    from datasets.lists.class_names import read_class_names
    from utils import checkpoint, config

    return {
        "protocol": protocol.to_dict(),
        "metrics": {},
        "list": str(cfg.val_source),
        "list_hash": records.list_hash,
        "root": records.root,
        "weights": str(weights),
        "weights_are": checkpoint.evaluated_weights(state)[1],
        "step": cast("int | None", state.get("step")),
        "class_names": read_class_names(config.class_names_file(cfg), cfg.model.num_class),
        "config": config.to_dict(cfg),
    }


def beside_published(cfg: Config, protocol: protocols.Protocol, metrics: Mapping[str, float]) -> str:
    """Return a line with our number next to the published one, each with its views."""
    published, spec = cfg.published, protocol.spec
    theirs = published.protocol or "views not stated"
    numbers = re.findall(r"\d+", theirs)  # such as "10 x 3 views": clips, crops
    same = [str(spec.num_clips), str(spec.crops_per_clip)] == numbers[:2]

    return (
        f"   top-1 {metrics['top1']:.2f} with {spec.num_clips} clip(s) x {spec.crops_per_clip} crop(s) of "
        f"{spec.crop_size}; published: {published.top1:g} with {theirs} ({published.source or 'no source'})"
        + ("" if same else "; different views give a different accuracy: see eval --protocol")
    )


def remarks(
    cfg: Config, protocol: protocols.Protocol, records: Records, state: CheckpointContent, weights: Path
) -> list[str]:
    """Return lines about metadata that may distort the numbers of an evaluation.

    Raises:
        UserError: the weights were trained with the classes in a different order.
    """
    from datasets.lists.class_names import read_class_names
    from methods.interop import provenance
    from utils import config

    # The same classes in a different order would give a wrong accuracy that looks right.
    lines, classes = [], state.get("classes")
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        ours = read_class_names(config.class_names_file(cfg), cfg.model.num_class)
        lines.append(provenance.check_labels(classes, ours, weights))

    # What does not stop an evaluation; "" if there is no remark.
    initial = provenance.earlier_of(state)
    lines.append(provenance.seen_line(initial, f"{cfg.val_source} {cfg.val_root}") if initial else "")
    lines.append(provenance.list_line(state.get("lists"), records.list_hash, f"the weights {weights}"))
    lines.append(provenance.size_line(protocol.spec.crop_size, cfg.augmentation.input_size, "training clips have"))
    return [line for line in lines if line]


class ResumedParts:
    """Hold the scores that a stopped evaluation left. Every rank makes one; rank 0 reads for all.

    Args:
        world: the ranks.
        folder: `results/<name>`.
        videos: length of the list.
        find_key: returns the identity; called on rank 0 alone, since paths that it reads may differ on other hosts.

    Attributes:
        starts: how often this evaluation was started before.
        done: samples that need not be scored again.
        owner: sha256 of the identity, the mark of its part files, the same on all ranks.
    """

    def __init__(self, world: World, folder: Path, videos: int, find_key: Callable[[], dict[str, object]]) -> None:
        import torch

        self.world, self.parts = world, []

        # One tensor carries all: [starts, 32 bytes of the owner, a flag per video].
        owner, rows = slice(1, 33), slice(33, None)
        message = torch.zeros(33 + videos, dtype=torch.int64)

        def say(text: str) -> None:
            print(text, flush=True)

        def look() -> None:
            key = find_key()
            message[0], self.parts = result_parts.earlier_parts(folder, key, videos, say)
            message[owner] = torch.tensor(list(result_parts.owner_of(key)))
            for part in self.parts:
                message[rows][torch.from_numpy(part["samples"])] = 1

        world.on_main(look)
        message = world.broadcast_(message.to(world.device)).cpu()
        self.starts, self.owner = int(message[0]), bytes(message[owner].tolist())
        self.done = set(message[rows].nonzero().flatten().tolist())
        if world.is_main and self.done:
            print(f"resuming: {len(self.done)} of {videos} videos were scored before", flush=True)

    def logits(self) -> Iterator[tuple[int, Tensor | None]]:
        """Yield (sample, logits (V, K) or None) of each scored video; on rank 0 only, so that each counts once."""
        import torch

        for part in self.parts:
            # a part holds logits only for the videos that could be read
            good = iter(part["logits"])
            for sample, why in zip(part["samples"], part["failed"], strict=True):
                scores = None if why else torch.from_numpy(next(good)).float().to(self.world.device)
                yield int(sample), scores


def report(folder: Path, records: Records, summary: Summary, owner: bytes) -> None:
    """Merge the parts of the evaluation `owner`, write the summary and print its numbers."""
    ids = [records.path(i) for i in range(len(records))]
    targets = records.targets
    summary = result_parts.merge(folder, ids, records.labels, summary, targets=targets, owner=owner)

    numbers, counts, failed = summary["metrics"], summary.get("counts", {}), summary.get("failures", {})
    print(f"{summary.get('weights')} on {summary.get('list')}: {summary['protocol']['text']}")
    print(f"   {summary.get('weights_are')}")

    print(log.format_validation(numbers))
    more = [one for one in metrics_of(multi_label=targets is not None) if "line" not in one.places]
    print("   " + ", ".join(f"{one.title} {numbers[one.name]:.3f}" for one in more))
    gmacs = summary.get("cost", {}).get("gmacs_per_video", 0)
    print(
        f"   {counts['failed']} videos could not be read (empty), {counts['repaired']} were repaired (corrupt), "
        f"{counts['duplicates']} are in the list twice; {gmacs:.1f} GMAC per video"
    )

    for path, reason in list(failed.items())[:10]:
        print(f"   not readable (counts as wrong): {reason if path in reason else f'{path}: {reason}'}")
    print(f"results: {folder}  (next: python main.py report {folder.parent.parent})")
