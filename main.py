"""The front door: `python main.py VERB ...`, and the training loop itself.

In reading order: the table of verbs, `train()` (one run of one experiment folder), `train_step()`, `validate()`, and
below them `Run` with the set-up and the checkpoint. Nothing heavy is imported before a verb needs it, so that help and
config errors come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import faults, signals
from utils.faults import UserError

if TYPE_CHECKING:
    import torch

    from datasets.loading.eval import EvalLoader
    from datasets.loading.train import Batch, TrainLoader
    from utils.dist import World
    from utils.run import Run

# verb: (module whose main(argv) does it, one line of help)
VERBS = {
    "train": ("main", "train an experiment folder, or continue it (what train.sh runs)"),
    "eval": ("anal_tools.evaluate", "evaluate a checkpoint, write results/ (what eval.sh runs)"),
    "analyze": ("anal_tools.analyze", "what the model gets wrong: error pairs, worst videos, confusion matrix"),
    "get_reference_results": ("anal_tools.get_reference_results", "results/reference_result.txt: a line per video"),
    "compare": ("anal_tools.compare", "is one experiment better: test of the videos, classes, config differences"),
    "report": ("anal_tools.report.build", "EXP/report/index.html: errors with pictures and clips, matrix, curves"),
    "score": ("anal_tools.score", "score kept views again: fewer views, another average, several models together"),
    "dense-sweep": ("anal_tools.dense_sweep", "accuracy against the number of views, from one evaluation"),
    "benchmark": ("anal_tools.benchmark", "how fast this experiment is here: step, eval or data"),
    "predict": ("anal_tools.predict", "what is seen in videos: top-5, infer.json, subtitles, an annotated video"),
    "convert": ("anal_tools.convert", "weights that others have published as a checkpoint of ours"),
    "export": ("anal_tools.export", "the trained model as ONNX or torch.export file, checked on clips"),
    "config": ("anal_tools.check_config", "print the resolved config and where each value is from; check its files"),
    "list": ("anal_tools.experiments", "all experiments: model, data, cost, and the accuracy others published"),
    "new": ("launch.new", "make a new experiment folder from an existing one"),
    "fetch": ("methods.fetch", "download pretrained weights into pretrained/"),
    "lists": ("datasets.lists.verb", "official annotation files of a data set as list files; what is missing"),
    "scan": ("datasets.scan.verb", "look at every file of a list: what can be read, real frame counts, copies"),
    "dump": ("datasets.dump.verb", "videos as JPEG folders, shards, or clips that are cheap to sample"),
    "preload": ("datasets.memcached.preload", "put the frames of an experiment into memcached servers before training"),
    "demo-data": ("datasets.demo.verb", "make the small motion data set of the demo"),
}


def main(argv: Sequence[str]) -> int:
    """Call the verb; a `UserError` becomes one text on stderr and exit code 2."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(len(verb) for verb in VERBS)
        print("usage: python main.py VERB ...   (VERB --help shows its options)\n")
        print("\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()))
        return 0

    def verb() -> int:
        signals.follow_launcher()
        faults.check_repository(Path(__file__).parent)
        return call_verb(argv[0], list(argv[1:]))

    return faults.leave_exit_code(faults.call(verb))


def call_verb(verb: str, argv: list[str]) -> int:
    """Import the module of a verb and run it. One that evaluates is handed `validate`: nobody imports main."""
    if verb not in VERBS:
        raise UserError(
            f"no verb called {verb!r}{faults.did_you_mean(verb, VERBS)}; `python main.py --help` lists them"
        )
    if verb == "train":
        parser = argparse.ArgumentParser(prog="main.py train", description=VERBS["train"][1])
        parser.add_argument("exp", type=Path, help="experiment folder, holds config.yaml")
        parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for this run")
        parser.add_argument("--fresh", action="store_true", help="move an earlier run to old/ and start anew")
        args = parser.parse_args(argv)
        return train(args.exp, overrides=args.set, fresh=args.fresh)
    module = importlib.import_module(VERBS[verb][0])
    if getattr(module, "NEEDS_VALIDATE", False):
        return module.main(argv, validate=validate)
    return module.main(argv)


def train(exp: Path, *, overrides: Sequence[str] = (), fresh: bool = False) -> int:
    """Train one experiment to its last iteration, from wherever its folder says it stands. Every rank calls this.

    Args:
        exp: experiment folder with `config.yaml`; receives checkpoints, `events/`, `log.txt`.
        overrides: `key=value` texts that replace config values for this run.
        fresh: move the files of an earlier run to `old/<time>/` first.

    Returns:
        0 when the last iteration is done, 75 when a signal stopped the run after its state was saved.
    """
    with start(Path(exp), overrides=overrides, fresh=fresh) as run:
        from utils import checkpoint, lr_schedule, optim
        from utils.log import Meter

        cfg, log, last = run.cfg, run.log, run.last
        if run.validated_step == last:
            log.line(f"nothing to do: this run finished at iteration {last}; train with --fresh to start it anew")
            return 0
        loader = train_loader(run)
        stop = run.stack.enter_context(signals.StopFlag(signals.stop_announcement()))
        meters = {name: Meter(cfg.print_freq, run.window.get(name, ())) for name in ("loss", "prec1", "prec5")}
        meters |= {name: Meter(cfg.print_freq) for name in ("time", "data")}
        score = functools.partial(validate_run, run)
        saved_at, waited, clock = time.monotonic(), 0.0, time.monotonic()

        # Owed: the process that saved this step was killed before its validation ended.
        if run.owes_validation() and run.validate(score, stop):
            return run.stopped(stop)
        for step, micro_batches in run.watch.steps(loader, run.names):
            lr = lr_schedule.lr_at(step, **run.schedule())
            optim.set_lr(run.optimizer, lr)
            stop.ask(loader.trouble)
            save_is_due = run.world.is_main and time.monotonic() - saved_at > 60 * cfg.save_minutes
            numbers = train_step(
                run, step, micro_batches, stop=stop.received, save=save_is_due, meanwhile=loader.copy_ahead
            )
            run.step = step + 1

            now = time.monotonic()
            meters["time"].add(now - clock)
            meters["data"].add(loader.seconds_waiting - waited)
            waited = loader.seconds_waiting
            for name in ("loss", "prec1", "prec5"):
                if not math.isnan(numbers[name]):  # the accuracy of a step of which no clip could be read
                    meters[name].add(numbers[name])
            clock = now
            run.window = {name: meter.state() for name, meter in meters.items()}
            run.bad.note(loader.ledger.take_events(), run.step)
            run.end_epoch()
            if run.step % cfg.print_freq == 0:
                run.folder.look()
                log.training(run.step, last, meters, lr=lr, clips=run.shards.global_batch)
                run.pace.report(data=meters["data"].average, step=meters["time"].average)
                loader.traffic.write(log, run.step)
                for text in loader.notes():
                    log.event(text)
            validates = run.is_at_validation()
            if validates or numbers["save"] or numbers["stop"]:
                run.save(checkpoint.LATEST)
                saved_at = time.monotonic()
            if numbers["stop"] or (validates and run.validate(score, stop)):
                return run.stopped(stop)
            if validates:
                loader.traffic.write_total(log, run.world)
                clock = time.monotonic()
        run.end_epoch(final=True)
        for text in loader.notes():
            log.event(text)
        run.save(checkpoint.LATEST)  # once more, now that the last validation is part of the state
        best = f"best {run.criterion} {run.best_prec1:.3f}"
        log.line(f"finished: {last} iterations, {best}, {run.folder.path(checkpoint.LATEST)}")
    return 0


def train_step(
    run: Run,
    step: int,
    micro_batches: list[Batch],
    *,
    stop: bool,
    save: bool,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """One optimiser step on one global batch: augment -> forward -> loss -> backward -> step.

    The seven numbers of the step are summed over the ranks and copied to the host before the backward pass, which is
    queued meanwhile: on a GPU the host waits once, for the start of the backward pass and not for its end. The numbers
    carry the agreement to stop or to save, and a non-finite loss ends all ranks before the optimiser step.

    Args:
        micro_batches: this rank's share of the global batch, each (B, T, H, W, C) uint8 on the device.
        stop, save: what this rank asks for; any rank's wish counts for all.
        meanwhile: called when the backward pass is queued and before the host waits: `TrainLoader.copy_ahead`.

    Returns:
        loss of the global batch, prec1 and prec5 (per cent) of its clips that could be read (nan: none could), and
        stop, save (0 or more ranks asking).
    """
    import torch

    from datasets.plan import order
    from utils import draws, metrics, mixup, optim, transforms
    from utils.run import autocast

    cfg, world, shards = run.cfg, run.world, run.shards
    lam = draws.beta(cfg.seed, step, cfg.augmentation.mix_up) if cfg.augmentation.mix_up else 1.0
    totals = torch.zeros(len(NUMBERS), dtype=torch.float64, device=world.device)
    losses, pending = {}, None
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    for index, batch in enumerate(micro_batches):
        batch = run.relabelled(batch)
        is_last = index == len(micro_batches) - 1
        no_sync = contextlib.nullcontext() if is_last or world.size == 1 else run.model.no_sync()
        with no_sync, draws.using(cfg.seed, step, batch.shards, shards.batch_size):
            clips = transforms.augment(batch.clips, **run.augmentation(batch))  # (B, T, H, W, C) -> (B, C, T, H, W)
            if lam != 1.0:
                clips = mixup.mix(clips, lam)
            with autocast(cfg.precision, world.device):
                answer = run.pace.forward(run.model, clips)  # (B, K), or an object with logits and aux of that shape
            value, logits = run.loss(answer, clips, batch, lam)
            losses[batch.shards] = value.detach()
            share = len(batch.shards) / shards.total  # of the global batch; DDP averages over ranks, we mean the sum
            with torch.no_grad():
                right = metrics.mixed_accuracy(logits, batch.labels, lam, ks=(1, 5), weights=batch.weights)  # per cent
                counted = batch.weights.double().sum()  # clips that could be read
                totals[:4] += torch.stack([share * value.double(), *(counted * right.double()), counted])
            if is_last:
                totals[4] = ~torch.isfinite(totals[0])
                totals[5].fill_(stop)  # a number becomes an argument of the kernel, a tensor would be copied
                totals[6].fill_(save)
                pending = world.sum_async(totals)
            run.scaler.scale(value * (share * world.size)).backward()
        run.statistics.after_micro_batch(index)
    assert pending is not None, "a rank has at least one micro-batch"

    meanwhile()
    numbers: dict[str, float] = dict(zip(NUMBERS, pending.read().tolist(), strict=True))
    counted = numbers.pop("counted") or math.nan
    numbers |= {name: numbers[name] / counted for name in ("prec1", "prec5")}
    if numbers["non_finite"]:
        sample_at = order.of(cfg.data.order, cfg.seed, run.train_records)
        raise run.non_finite(step, {shards: value.item() for shards, value in losses.items()}, sample_at)
    run.watch.phase("optimiser step", step)
    optim.apply(run.optimizer, run.scaler, max_norm=cfg.clip_grad)
    run.after_step(step)
    return numbers


NUMBERS = ("loss", "prec1", "prec5", "counted", "non_finite", "stop", "save")


def validate(
    net: torch.nn.Module,
    loader: EvalLoader,
    *,
    world: World,
    num_class: int,
    normalise: Callable[[torch.Tensor], torch.Tensor],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    clips_per_forward: int | None = 32,
    average: str = "prob",
    keep: Callable[[Any, torch.Tensor | None], None] | None = None,
    stop: signals.StopFlag | None = None,
    earlier: Iterable[tuple[int, torch.Tensor | None]] = (),
) -> dict[str, float] | None:
    """Score every video of `loader` exactly once over all ranks. The one place that scores.

    One that cannot be read counts as wrong. All ranks do the same number of rounds, so that they can agree to stop in
    each. When memory runs out, fewer views go through the network at once and the evaluation goes on.

    Args:
        net: clips (N, C, T, H, W) -> logits (N, K); it is put into evaluation mode.
        normalise: uint8 (N, T, H, W, C) -> float (N, C, T, H, W).
        clips_per_forward: views that go through the network at once; None to find it by measuring.
        average: how the views of a video are joined, one of `metrics.AVERAGES`.
        keep: called with (item, logits (V, K) float32, None for a failed video).
        earlier: (sample, logits (V, K)) of videos that were scored before and count too; each on one rank only.

    Returns:
        What `metrics.Tally.metrics` says, for a list with several labels per video `ranking.Gathered.metrics`; None
        when stopped by a signal.
    """
    import torch

    from datasets.loading.eval import rounds
    from utils import chunks, ranking

    def forward(clips: torch.Tensor) -> torch.Tensor:
        with autocast():
            return net(normalise(clips)).float()

    net.eval()
    tally = ranking.tally_of(loader.records, num_class, device=world.device, average=average)
    for sample, logits in earlier:
        tally.add(sample, logits)
    views = loader.spec.views
    runner = chunks.Chunks(forward, world.device, size=clips_per_forward, net=net)
    full = max(1, runner.group // views) * views  # of a round; the last one may have fewer
    with torch.inference_mode(), chunks.full_precision():
        for items in rounds(loader, runner.group):  # empty on a rank that has run out of videos
            cuts = [(cut, views) for _, cut in items if cut is not None]
            scores = iter(runner.run(*chunks.joined(cuts), full).split(views) if cuts else ())
            for item, cut in items:
                own = next(scores) if cut is not None else None  # (V, K)
                tally.add(item.sample, own)
                if keep is not None:
                    keep(item, own)
            if stop is not None:
                stop.ask(loader.trouble)
                if world.any(stop.received):
                    return None
        world.sum_(tally.counts)
    return tally.metrics()


@contextlib.contextmanager
def start(exp: Path, *, overrides: Sequence[str], fresh: bool) -> Iterator[Run]:
    """Set a run up: config -> ranks -> folder and lock -> lists -> model -> checkpoint; undone on leaving."""
    import methods
    from datasets.lists import first_look
    from datasets.lists.class_names import read_class_names
    from datasets.loading import loader
    from datasets.readers.resize import KERNEL
    from utils import checkpoint, config, dist, log, parts, run_dir
    from utils.run import Run
    from utils.shards import ShardPlan

    cfg = config.load(exp, overrides)
    config.check_files(cfg)
    with contextlib.ExitStack() as stack:
        world = dist.join()
        stack.push(dist.leave)
        faults.fail_point("start.joined")
        folder = run_dir.RunDir(exp)
        world.on_main(folder.lock)
        stack.callback(folder.close)
        found = None if fresh else checkpoint.find_on_all_ranks(exp, world)
        state = found.state if found else None

        lists = [loader.records_of(cfg, split) for split in ("train", "val")]
        class_names = read_class_names(config.class_names_file(cfg), cfg.model.num_class)
        shards = ShardPlan(
            total=state["shards"] if state else cfg.shards or world.size,
            batch_size=cfg.batch_size,
            world=world.size,
            rank=world.rank,
            group_size=cfg.model.kwargs["bn_group_size"],
        )
        cfg = config.resolve_lengths(cfg, len(lists[0]), shards.global_batch)
        step = state["step"] if state else 0
        said = first_look.look(cfg, *lists, compare=world.is_main)
        if found:
            hashes = {"train": lists[0].list_hash, "val": lists[1].list_hash}
            differences = config.differences(found.state["config"], config.to_dict(cfg))
            said += [*found.messages, *checkpoint.check_resume(found.state, differences, hashes, KERNEL)]
        made = parts.build(cfg, world, shards, found, methods.build, said.append)
        # Nothing in lists, config or weights can be wrong any more: only now an old run is moved away.
        world.on_main(lambda: checkpoint.take_over(folder, found, fresh=fresh))
        run_log = stack.enter_context(log.RunLog(exp, world.is_main, step))
        revision = run_dir.revision() if world.is_main else ""  # one rank asks: hundreds may share the file system
        run_log.start(exp, cfg, overrides, shards, revision=revision)
        for line in said:
            run_log.line(line)
        made |= {"revision": revision, "kernel": KERNEL, "stack": stack, "step": step}
        run = Run(cfg, world, shards, folder, run_log, lists[0], lists[1], class_names, **made)
        run.begin(state)
        faults.fail_point("start.built")
        # A lost rank shows as an error of DDP's or gloo's own: `contact` says what it means.
        with run_log.last_words(), dist.contact(world):
            yield run


def train_loader(run: Run) -> TrainLoader:
    """Start the reader processes; they give the batches from `run.step` on."""
    from datasets.loading import loader

    training = loader.build(
        run.cfg, "train", run.world, run.shards, start=run.step, records=run.train_records, replay=run.bad.given_up()
    )
    run.stack.callback(training.close)
    run.stack.callback(lambda: run.bad.note(training.ledger.take_events(), run.step))  # those that stopped the run too
    run.watch_over(training)
    return training


def validate_run(run: Run, stop: signals.StopFlag) -> dict[str, float] | None:
    """`validate` with the config's own views on the validation list, as training does every `val_freq`."""
    from datasets.loading import eval as eval_loader
    from datasets.loading import loader
    from utils import bad_samples, transforms
    from utils.run import autocast, dtype_of

    wanted = run.cfg.augmentation
    batches = functools.partial(loader.build, run.cfg, "train", run.world, run.shards, records=run.train_records)
    with contextlib.ExitStack() as stack:
        late = run.bad.given_up(bad_samples.PRECISE_BN, run.step)
        net = stack.enter_context(run.evaluated(functools.partial(batches, replay=late), stop))
        if net is None:
            return None
        videos = stack.enter_context(loader.build(run.cfg, "val", run.world, records=run.val_records))
        stack.enter_context(run.watch.during("validation", None, videos.being_read))
        result = validate(
            net,
            videos,
            world=run.world,
            num_class=run.cfg.model.num_class,
            normalise=functools.partial(
                transforms.normalise, mean=wanted.mean, std=wanted.std, dtype=dtype_of(run.cfg.precision)
            ),
            autocast=lambda: autocast(run.cfg.precision, run.world.device),
            clips_per_forward=run.cfg.batch_size,
            keep=run.watch.passing(),
            stop=stop,
        )
        if result is not None and not run.has_validated:  # a wrong root or reader, not some bad files
            if eval_loader.read_nothing(result):
                raise eval_loader.none_readable(videos)
            run.has_validated = True
        run.bad.note(videos.ledger.take_events(), run.step, bad_samples.VALIDATION)
        for text in videos.notes():
            run.log.once(f"validation: {text}")
        videos.traffic.write(run.log)
        return result


if __name__ == "__main__":
    faults.leave_process(lambda: main(sys.argv[1:]))
