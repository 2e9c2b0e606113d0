"""Run a verb, `python main.py VERB ...`. The training loop is in this file.

Read it from top to bottom: the table of verbs, `train()` (one run of one experiment folder), then `train_step()`.
`utils/engine/` has what they use: `setup.start` builds a run, `learner.py` has the parts of a step, and `state.py`
lists what a checkpoint holds. A verb imports torch only when it runs, so help and config errors appear at once.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils import errors, signals
from utils.errors import UserError
from utils.version import VERSION

if TYPE_CHECKING:
    from datasets.loading.train import Batch
    from utils.engine.learner import Learner

# verb: (module whose main(argv) runs it, one line of help)
VERBS = {
    "train": ("main", "train an experiment or resume it (train.sh: `launch` runs this in every rank)"),
    "eval": ("anal_tools.evaluate", "evaluate a checkpoint and write results/ (eval.sh runs this)"),
    "analyze": ("anal_tools.analyze", "what the model gets wrong: error pairs, worst videos, confusion matrix"),
    "get_reference_results": ("anal_tools.get_reference_results", "results/reference_result.txt: a line per video"),
    "compare": ("anal_tools.compare", "whether one experiment is better: McNemar's test, classes, config differences"),
    "report": ("anal_tools.report.build", "EXP/report/index.html: errors with pictures and clips, matrix, curves"),
    "score": ("anal_tools.score", "rescore saved views: fewer views, a different average, or an ensemble of models"),
    "dense-sweep": ("anal_tools.dense_sweep", "accuracy against the number of views, from one evaluation"),
    "benchmark": ("anal_tools.benchmark", "measure the speed of an experiment on this machine: step, eval or data"),
    "predict": ("anal_tools.predict", "classify videos: top-5, infer.json, subtitles, an annotated video"),
    "convert": ("anal_tools.convert", "convert published weights into a checkpoint of this toolkit"),
    "export": ("anal_tools.export", "export the trained model to ONNX or torch.export, and check it on clips"),
    "config": ("anal_tools.check_config", "print the resolved config and where each value comes from; check its files"),
    "list": ("anal_tools.experiments", "list all experiments: model, data, cost, published accuracy"),
    "new": ("anal_tools.new", "make a new experiment folder from an existing one"),
    "import": ("anal_tools.import_config.verb", "turn a config of MMAction2 or PySlowFast into an experiment"),
    "fetch": ("methods.fetch", "download pretrained weights into pretrained/"),
    "lists": (
        "datasets.lists.verb",
        "write list files from official annotations of a data set; report missing videos",
    ),
    "scan": ("datasets.scan.verb", "examine every file of a list: unreadable files, real frame counts, copies"),
    "dump": ("datasets.dump.verb", "store videos as JPEG folders, frame packs, or clips that are cheap to sample"),
    "preload": ("datasets.memcached.preload", "put the frames of an experiment into memcached servers before training"),
    "demo-data": ("datasets.demo.verb", "make the small motion data set of the demo"),
    "doctor": ("anal_tools.doctor", "check this machine or an experiment for problems that stop or slow a run"),
    "watch": ("anal_tools.watch", "watch a run live in the terminal, also over ssh"),
    "clean": ("anal_tools.clean", "list and delete what an experiment no longer needs: old runs, code, logits"),
    "start": ("anal_tools.start", "from a folder of videos to a trained model and its report"),
    "folds": ("anal_tools.folds", "print the table of a cross-validation; pool all held-out videos into one result"),
}


def main(argv: Sequence[str]) -> int:
    """Run a verb and return its exit code. A `UserError` becomes one message on stderr and exit code 2."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(len(verb) for verb in VERBS)
        print("usage: python main.py VERB ...   (VERB --help shows its options, --version the version)\n")
        print("\n".join(f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()))
        return 0
    if argv[0] == "--version":
        print(f"zoetrope {VERSION}")
        return 0

    def verb() -> int:
        # A rank ends soon after the launcher that started it dies
        signals.follow_launcher()
        errors.check_repository(Path(__file__).parent)
        return call_verb(argv[0], list(argv[1:]))

    return errors.leave_exit_code(errors.run_cli(verb))


def call_verb(verb: str, argv: list[str]) -> int:
    """Import the module of a verb and run it."""
    if verb not in VERBS:
        raise UserError(
            f"no verb called {verb!r}{errors.did_you_mean(verb, VERBS)}; `python main.py --help` lists them"
        )
    if verb != "train":
        with without_gc():
            module = importlib.import_module(VERBS[verb][0])
        return module.main(argv)

    # `utils.options` loads no torch: a mistyped option is reported before the slow import
    from utils.options import train_parser

    args = train_parser().parse_args(argv)
    with without_gc():
        importlib.import_module("utils.engine.setup")
    return train(args.exp, overrides=args.set, fresh=args.fresh)


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Import without the garbage collector, and exclude the imported objects from all later collections.

    They live as long as the process. Scanning them again and again takes a sixth of the CPU time of a start, and writes
    to pages that forked readers share.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # all objects so far move to a generation that is never collected
        if was_enabled:
            gc.enable()


def train(exp: Path, *, overrides: Sequence[str] = (), fresh: bool = False) -> int:
    """Train one experiment to its last iteration, from its checkpoint if it has one. Every rank calls this.

    Args:
        exp: experiment folder with `config.yaml`; receives checkpoints, `events/`, `log.txt`.
        overrides: `key=value` strings that override config values for this run.
        fresh: first move the files of an earlier run to `old/<time>/`.

    Returns:
        0 after the last iteration, 75 if a request to stop ended the run. In both cases the state is saved.
    """
    from utils.engine import setup

    with setup.start(Path(exp), overrides=overrides, fresh=fresh) as run:
        if run.is_finished:
            run.log.event("run", "nothing_to_do", iteration=run.last, message="train with --fresh to start over")
            return 0

        # An earlier process saved this step but ended before its validation: run that first
        if run.owes_validation and not run.validate():
            return run.stopped()

        for step, micro_batches in run.steps():
            # One optimiser step. Its numbers carry the requests of all ranks, so all stop and save after the same step
            numbers = train_step(run.learner, step, micro_batches, **run.requests(), meanwhile=run.batches.copy_ahead)
            run.after_step(step, numbers)

            # Save before the validation: a process that dies during it loses no step
            if run.is_at_validation or numbers["save"] or numbers["stop"]:
                run.save()

            # A stop does not wait for the validation; the resumed run catches up on it
            if numbers["stop"]:
                return run.stopped()

            if run.is_at_validation and not run.validate():
                return run.stopped()

        return run.finish()


def train_step(
    learner: Learner,
    step: int,
    micro_batches: list[Batch],
    *,
    stop: bool,
    save: bool,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Run one optimiser step on one global batch: augment -> forward -> loss -> backward -> update.

    The host waits for the GPU once per step, but not for the end of the backward pass: the numbers of the step are
    summed over the ranks and copied to the host before that pass is queued. They carry the requests to stop and save. A
    non-finite loss ends all ranks before the optimiser step.

    Args:
        learner: networks, optimiser and statistics.
        step: the iteration, from 0.
        micro_batches: this rank's share of the global batch, each (B, T, H, W, C) uint8 on the device.
        stop, save: what this rank requests; a request from any rank counts for all.
        meanwhile: called while the backward pass runs on a GPU: `TrainLoader.copy_ahead`.

    Returns:
        loss of the global batch, top1 and top5 (per cent) of its clips that could be read (nan: none could), and
        stop, save (the number of ranks that requested it).
    """
    from utils.engine.totals import StepTotals

    totals = StepTotals(learner.world, stop=stop, save=save)
    mix = learner.begin(step)

    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with learner.micro_batch(step, batch, is_last=is_last):
            # From decoded frames to the loss of this micro-batch
            clips, labels = learner.augment(batch, mix)  # (B, T, H, W, C) uint8 -> (B, C, T, H, W)
            answer = learner.forward(clips)  # logits (B, K), perhaps with auxiliary ones
            loss, logits = learner.loss(answer, clips, labels, batch.weights, mix)

            # The loss of the step is the sum of these losses, each times its share of the global batch
            share = learner.share(batch)
            totals.add(batch, loss, logits, labels, mix=mix, share=share, is_last=is_last)
            learner.backward(loss, share)

        learner.bn_stats.after_micro_batch(index)

    # While the GPU runs the backward pass, copy the next batch, then wait for the numbers
    meanwhile()
    numbers = totals.read()

    # Every rank read the same sums, so every rank raises here, before anything is updated
    if numbers["non_finite"]:
        raise learner.non_finite(step, totals.losses)

    learner.update(step)
    return numbers


if __name__ == "__main__":
    errors.leave_process(lambda: main(sys.argv[1:]))
