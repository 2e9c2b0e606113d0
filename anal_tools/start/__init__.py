"""`python main.py start FOLDER`: from videos to a trained, evaluated model and its report, in one command.

The steps: run the doctor, find the videos, scan them, split them, choose a recipe and write an experiment. Then run
train.sh, eval.sh and report as a user would. A second start resumes where the first one stopped. The experiment is
written last and never overwritten.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anal_tools import doctor, intervals, new
from anal_tools import folds as pooled
from anal_tools.doctor.finding import Subject
from anal_tools.evaluate.results import Results
from anal_tools.start import recipe, split, videos
from anal_tools.start.videos import Samples, Video
from anal_tools.text import shown
from datasets.lists.records import Records
from datasets.readers import metadata_cache
from datasets.readers.spec import ReaderSpec
from datasets.scan.journal import Journal
from datasets.scan.same import same_content
from datasets.scan.work import examine
from utils import config, files, processes
from utils.config.schema import Data
from utils.errors import UserError, counted, listed
from utils.options import Parser

NOTE = "start.json"  # written when the experiment is complete: options of the command, and views of the evaluation
RESULT = pooled.RESULT
STOPPED = 75  # exit code of a run that a signal stopped and that can resume
_NOT_OF_THE_RUN = ("out", "yes", "folder", "no_train", "no_doctor")  # options that a second start may change
FEW = 30  # held-out videos; each of 30 is worth 3 percentage points
DEADLINE = 120.0  # seconds to examine one file


def main(argv: Sequence[str]) -> int:
    """Run the missing steps. Return 0, or the exit code of a training or an evaluation that did not finish."""
    args = _parser().parse_args(argv)
    exp = Path(os.path.abspath(args.out or _default_out(args.folder)))
    options = {name: value for name, value in vars(args).items() if name not in _NOT_OF_THE_RUN}
    # Through JSON, so that it compares equal to the note in the file
    note = json.loads(json.dumps({"folder": os.path.abspath(args.folder), **options}))

    # Write the experiment, unless an earlier start has written it
    if not _is_begun(exp, note):
        if not args.no_doctor:
            doctor.consult(Subject(), doctor.OF_THE_MACHINE)
        results = prepare(exp, args)
        files.write_text(exp / NOTE, json.dumps(note | results, indent=1) + "\n", errors="surrogateescape")
        if args.no_train:
            print(f"wrote {exp}; train it with {exp / 'train.sh'} local {_ranks()}")
            return 0
        if sys.stdin.isatty() or sys.stdout.isatty():
            print(_duration(exp))
        if not args.yes and sys.stdin.isatty() and not _wants_training():
            print(f"wrote {exp}; run the same command again to train it")
            return 0

    # Train, evaluate, report
    prepared = json.loads((exp / NOTE).read_text("utf-8", errors="surrogateescape"))
    views = prepared["views"]
    result = RESULT if views == "centre" else f"{RESULT}-{views}"
    if not args.no_doctor and not (exp / "results" / f"{result}.json").is_file():
        doctor.consult(Subject(exp), doctor.OF_THE_EXPERIMENT)
    code = _train(exp, views, result)
    return code or _report(exp, result, prepared.get("split", ""))


def _duration(exp: Path) -> str:
    from anal_tools.start import duration

    return duration.estimate(exp)


def _wants_training() -> bool:
    return input("train now? [Y/n] ").strip().lower() not in ("n", "no")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="main.py start",
        description="Train on a folder of videos, evaluate and write the report. Run it again to resume.",
    )
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        help="CLASS/video, or train/CLASS/video and val/CLASS/video; or a csv of path,label[,start,end] next to or "
        "above the videos",
    )

    add("--out", type=Path, metavar="EXP", help="experiment folder (default: exps/NAME_exps/start)")
    add("--recipe", metavar="NAME", help=f"one of {', '.join(recipe.RECIPES)} (default: chosen to fit)")
    add("--weights", metavar="FILE", help="weights to start from")
    add(
        "--group",
        metavar="REGEX",
        help="videos in whose paths REGEX, such as 'person[0-9]+', matches the same text stay on one side of the "
        "split; '': no groups",
    )
    add("--folds", type=int, metavar="N", help="hold out each video once, in N folds (default: hold out a fifth)")
    add("--leave-out", action="append", default=[], metavar="CLASS", help="leave out this class")
    add("--size", type=int, metavar="PIXELS", help="height and width of a clip")
    add("--segments", type=int, metavar="T", help="frames per clip")
    add("--epochs", type=float, metavar="E", help="length of the training")
    add("--seed", type=int, default=0, help="random seed of the split and the training (0)")
    add("--trust", action="store_true", help="trust the given classes, even if file names contradict them")
    add("--no-train", action="store_true", help="write the experiment only")
    add("--no-doctor", action="store_true", help="skip the doctor's checks of the machine and the experiment")
    add("--yes", action="store_true", help="do not ask before training")

    return parser


def _default_out(folder: Path) -> Path:
    name = re.sub(r"\W+", "_", folder.resolve().stem).strip("_") or "my"
    return new.ROOT / "exps" / f"{name}_exps" / "start"


def _is_begun(exp: Path, note: dict[str, object]) -> bool:
    """Return True if an earlier start with the same options has written the experiment.

    Raises:
        UserError: the folder holds another experiment.
    """
    if not (exp / NOTE).is_file():
        file = exp / "config.yaml"
        # No note: a start was interrupted before it finished writing, so its config may be overwritten
        is_ours = not file.exists() or recipe.MARK in file.read_text("utf-8", errors="replace")
        if not is_ours or (exp / "log.txt").exists():
            raise UserError(f"{exp}: holds an experiment that `start` did not write; choose another --out")
        return False

    try:
        before = json.loads((exp / NOTE).read_text("utf-8", errors="surrogateescape"))
    except ValueError as error:
        raise UserError(f"{exp / NOTE}: cannot be read ({error}); choose another --out") from error
    changed = [f"{key} {before.get(key)!r}, now {note[key]!r}" for key in sorted(note) if before.get(key) != note[key]]
    if changed:
        raise UserError(
            f"{exp}: was started with other options: {'; '.join(changed)}; choose another --out, or remove the folder"
        )

    print(f"{exp}: already exists; resuming it")
    return True


def prepare(exp: Path, args: argparse.Namespace) -> dict[str, str]:
    """Write a complete experiment; return the views of its evaluation, and its split in words.

    Raises:
        UserError: these videos cannot be used as a data set; the message gives the reason.
    """
    # Find and examine every video
    samples = videos.look(args.folder, args.leave_out)
    _check_names(samples, trust=args.trust)
    entries, copies = _scan(exp, samples)
    videos_found = counted(len(samples.videos), "video")
    notes = [f"{videos_found} of {len(samples.classes)} classes, from {samples.source}", *samples.notes]
    print("\n".join(map(shown, notes)))

    # Split them
    weights = _weights(args.weights)
    sides = _divide(samples, copies, args)
    _write_lists(exp / "lists", samples, sides)

    # Choose a recipe, and write the experiment
    summary = recipe.DataSummary(
        kind=samples.kind,
        train=sides.train,
        classes=samples.classes,
        frames=np.array([entry["frames"] for entry in entries]),
        short_side=np.array([min(entry["height"], entry["width"]) for entry in entries]),
        long_side=np.array([max(entry["height"], entry["width"]) for entry in entries]),
        gpus=processes.gpu_count(os.environ),
        cores=len(os.sched_getaffinity(0)),
    )
    chosen = recipe.choose(
        summary, name=args.recipe, weights=weights, size=args.size, segments=args.segments, epochs=args.epochs
    )
    _write_experiment(exp, samples, chosen, summary, folds=bool(args.folds), seed=args.seed)

    # Print the choices and their reasons
    print(shown(f"split: {sides}"))
    lacking = [samples.classes[label] for label in sides.lacking]
    if lacking:
        print(f"  {listed('no held-out video of', lacking)}; --folds {split.FOLDS} holds out each video once")
    elif not sides.folds and not sides.is_given and len(samples.videos) - sides.train < FEW:
        print(
            f"  too few for a reliable accuracy; --folds {split.FOLDS} holds out each video once, in {split.FOLDS} runs"
        )
    print("\n".join(f"{key}: {text}" for key, text in chosen.why))
    print(f"experiment: {exp / 'config.yaml'}")
    return {"views": chosen.views, "split": str(sides)}


def _check_names(samples: Samples, *, trust: bool) -> None:
    """Refuse file names that contain a different class than their folder, unless the user trusts the folders."""
    wrong = [] if trust else videos.contradictions(samples)
    if wrong:
        raise UserError(
            f"{listed('file names that contradict their class', map(shown, wrong), most=5)}; move these files, or "
            "keep the classes with --trust"
        )


def _weights(given: str | None) -> str | None:
    """Return the absolute path of --weights; raise UserError if there is no such file."""
    path = os.path.abspath(given) if given else None
    if path and not os.path.exists(path):
        raise UserError(f"--weights {given}: there is no such file")
    return path


@dataclass(frozen=True)
class Sides:
    """The split of the videos into training and held-out ones.

    Attributes:
        labels: (N,) class of each video.
        places: (N,) fold in which each video is held out.
        held_out_fold: the fold that is held out without --folds.
        folds: number of folds; None for a single split.
        is_given: the data set has its own split.
        why: how the groups were found.
        groups: (N,) group of each video; None if there are no groups.
    """

    labels: Sequence[int]
    places: np.ndarray
    held_out_fold: int
    folds: int | None
    is_given: bool
    why: str
    groups: list[str] | None

    @property
    def train(self) -> int:
        """The number of videos to train on."""
        return int((self.places != self.held_out_fold).sum())

    @property
    def lacking(self) -> list[int]:
        """The classes without a held-out video. Empty with folds, since these hold out each video once."""
        held_out = set(np.array(self.labels)[self.places == self.held_out_fold].tolist())
        return [] if self.folds else sorted(set(self.labels) - held_out)

    def __str__(self) -> str:
        numbers = f"{self.train} for training, {len(self.labels) - self.train} held out"
        if self.folds:
            in_turn = [", ".join(self._groups_of(fold)) for fold in range(self.folds)]
            named = self.groups is not None and len(set(self.groups)) <= FEW
            return f"{self.folds} folds; {self.why}{'; held out in turn: ' + ' | '.join(in_turn) if named else ''}"
        return f"{numbers}; {self.why}{listed('; held out', self._groups_of(self.held_out_fold))}"

    def _groups_of(self, fold: int) -> list[str]:
        return sorted({self.groups[row] for row in np.flatnonzero(self.places == fold)}) if self.groups else []


def _divide(samples: Samples, copies: Sequence[Sequence[int]], args: argparse.Namespace) -> Sides:
    """Split the videos according to the options.

    Raises:
        UserError: --folds for a data set with its own split, or no split is possible.
    """
    count = args.folds or split.FOLDS
    if count < 2:
        raise UserError(f"--folds {count}: give 2 or more")
    division = split.divide(samples, copies, group=args.group, count=count, at_most=not args.folds)
    given = any(one.split for one in samples.videos)
    if args.folds and given:
        raise UserError("--folds: this data set has its own split; to use folds, put all videos into class folders")

    numbers = {name: number for number, name in enumerate(samples.classes)}
    labels = [numbers[one.label] for one in samples.videos]
    # A given split holds out fold 0; with folds, `held_out_fold` is not used
    held_out_fold = (
        0
        if given or args.folds
        else split.held_out(division.places, labels, args.seed % (int(division.places.max()) + 1))
    )
    return Sides(
        labels, division.places, held_out_fold, count if args.folds else None, given, division.why, division.groups
    )


def _write_experiment(
    exp: Path, samples: Samples, chosen: recipe.Choices, summary: recipe.DataSummary, *, folds: bool, seed: int
) -> None:
    """Write config.yaml, train.sh and eval.sh."""
    # With folds the config names the lists of the first one
    first = "fold01_" if folds else ""
    paths = {"root": samples.root}
    paths |= {name: str(exp / "lists" / f"{first}{name}.txt") for name in ("train", "val")}
    paths |= {"classes": str(exp / "lists" / "classInd.txt"), "metadata": str(metadata_cache.path_in(exp / "scan"))}
    quoted = {name: json.dumps(path, ensure_ascii=False) for name, path in paths.items()}
    about = new.printable(f"{len(samples.classes)} classes of {samples.root}")
    files.write_text(
        exp / "config.yaml", recipe.config_text(chosen, summary, quoted, folds=folds, seed=seed, about=about)
    )
    config.load(exp)  # raises UserError if `recipe` wrote an invalid config
    new.write_scripts(exp)


def _scan(exp: Path, samples: Samples) -> tuple[list[dict], list[list[int]]]:
    """Examine every file, drop those that cannot be read, and turn seconds into frames.

    Returns:
        The scan's result for the file of each remaining sample, and the rows of samples that are the same video.
    """
    by_path, source_of = _examined(exp, samples)
    _keep_readable(samples, by_path)
    for one in samples.videos:
        one.source = source_of[one.path]

    # If some samples are parts of files, write the others as parts too, from the first frame to the last
    if any(one.frames >= 0 for one in samples.videos):
        for one in samples.videos:
            one.frames = one.frames if one.frames >= 0 else by_path[one.path]["frames"]

    # Two samples are the same video if they use the same frames of the same source
    rows_of: dict[tuple[str, int, int], list[int]] = {}
    for row, one in enumerate(samples.videos):
        rows_of.setdefault((one.source, one.first, one.frames), []).append(row)
    return [by_path[one.path] for one in samples.videos], [rows for rows in rows_of.values() if len(rows) > 1]


def _examined(exp: Path, samples: Samples) -> tuple[dict[str, dict], dict[str, str]]:
    """Examine every file once. A second start reuses the results of the first one.

    Returns:
        path -> result of the scan, and path -> the first of the files that hold the same video.
    """
    paths = list(dict.fromkeys(one.path for one in samples.videos))
    every = exp / "scan" / "files.txt"
    every.parent.mkdir(parents=True, exist_ok=True)
    # A list of all files with label 0: classes are not needed yet
    files.write(every, "".join(f"{path}\t0\n" for path in paths).encode("utf-8", "surrogateescape"))
    records = Records.load(every, samples.root, num_class=None)
    spec = ReaderSpec("frames", missing_share=Data().missing_share)

    workers = len(os.sched_getaffinity(0))
    with Journal(exp / "scan", spec) as journal:
        entries = examine(records, spec, journal, level="ends", workers=workers, deadline=DEADLINE)
        same = same_content([records], [entries], spec, workers=workers, deadline=DEADLINE)
        metadata_cache.write(metadata_cache.path_in(exp / "scan"), journal.metadata())

    source_of = {path: path for path in paths}
    for group in same:
        members = [records.path(i) for _, i in group["members"]]
        source_of |= dict.fromkeys(members, source_of[members[0]])
    return dict(zip(paths, entries, strict=True)), source_of


def _keep_readable(samples: Samples, by_path: Mapping[str, dict]) -> None:
    """Drop the samples that cannot be read, and note how many.

    Raises:
        UserError: no sample is left, or none of a class.
    """
    bad = [f"{path}: {entry['bad']}" for path, entry in by_path.items() if entry["bad"]]
    if bad:
        samples.notes.append(listed(f"{counted(len(bad), 'file')} left out, because unreadable", bad[:5]))
    samples.videos = [
        one for one in samples.videos if not by_path[one.path]["bad"] and _in_frames(one, by_path[one.path], samples)
    ]

    if not samples.videos:
        first = bad[0] if bad else next(iter(by_path))
        raise UserError(f"{samples.root}: none of its {len(by_path)} videos can be read, first: {first}")

    gone = sorted(set(samples.classes) - {one.label for one in samples.videos})
    if gone:
        raise UserError(f"{listed('no readable video of', gone)}; add videos, or --leave-out CLASS")


def _in_frames(one: Video, entry: dict, samples: Samples) -> bool:
    """Convert the seconds of a part to frames. Return False and note it if the file ends too early."""
    if one.start is None and one.end is None:
        return True
    rate = entry["fps"] or ReaderSpec.fps  # frames per second; a folder of frames has no rate of its own
    one.first = round((one.start or 0) * rate)
    last = entry["frames"] if one.end is None else min(entry["frames"], round(one.end * rate))
    one.frames = last - one.first

    if one.frames < 1:
        samples.notes.append(
            f"{one.path}: left out, it ends at {entry['frames'] / rate:.1f} s and the clip starts at {one.start:g} s"
        )
    return one.frames >= 1


def _write_lists(folder: Path, samples: Samples, sides: Sides) -> None:
    """Write classInd.txt, and train.txt and val.txt, or one such pair per fold."""
    folder.mkdir(parents=True, exist_ok=True)
    names = "".join(f"{label} {name}\n" for label, name in enumerate(samples.classes))
    files.write_text(folder / "classInd.txt", names, errors="surrogateescape")
    # Either all lines of a list have the columns `first` and `frames`, or none has
    has_parts = any(one.frames >= 0 for one in samples.videos)
    lines = []
    for one, label in zip(samples.videos, sides.labels, strict=True):
        part = [str(one.first), str(one.frames)] if has_parts else []
        lines.append("\t".join([one.path, *part, str(label)]) + "\n")

    folds = [(f"fold{number + 1:02d}_", number) for number in range(sides.folds or 0)]
    for prefix, number in folds or [("", sides.held_out_fold)]:
        for name, chosen in (("train", sides.places != number), ("val", sides.places == number)):
            text = "".join(line for line, is_in in zip(lines, chosen, strict=True) if is_in)
            files.write_text(folder / f"{prefix}{name}.txt", text, errors="surrogateescape")


def _train(exp: Path, views: str, result: str) -> int:
    """Train and evaluate as `train.sh` and `eval.sh` do, unless both are done."""
    code = _launch("train", exp)
    if code or (exp / "results" / f"{result}.json").is_file():
        return code
    # The folds evaluate the last checkpoint without this option
    checkpoint = [] if config.load(exp).data.folds else ["--checkpoint", "latest"]
    return _launch("eval", exp, *checkpoint, "--views", views, "--name", result)


def _launch(verb: str, exp: Path, *more: str) -> int:
    """Run `python -m launch`. Ctrl-C also reaches the launcher, and this process waits until the run has saved."""
    argv = [sys.executable, "-m", "launch", verb, str(exp), "local", str(_ranks()), *more]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(new.ROOT), os.environ.get("PYTHONPATH")]))}
    sys.stdout.flush()  # before the launcher prints
    process = subprocess.Popen(argv, cwd=new.ROOT, env=env)
    # Survive Ctrl-C, which the whole foreground group receives. SIGTERM reaches only this process, so forward it
    before = {
        number: signal.signal(number, lambda number, frame: _pass_on(process, number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }

    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    # A run with folds has printed it
    if code == STOPPED and not config.load(exp).data.folds:
        print("stopped; the same `start` command resumes")
    return code if code >= 0 else 128 - code  # 128 + signal, as shells report it


def _pass_on(process: subprocess.Popen[bytes], number: int) -> None:
    if number == signal.SIGTERM and process.poll() is None:
        process.terminate()


def _ranks() -> int:
    """Return one rank if there is a GPU, else 0; `train.sh local N` starts more."""
    return min(1, processes.gpu_count(os.environ))


def _report(exp: Path, result: str, split_text: str) -> int:
    from anal_tools.report import build

    index = build.build([f"{exp}:{result}"])
    results = Results.load(exp, result)
    # The table of folds has printed the number and its interval
    if not config.load(exp).data.folds:
        # The interval that the report shows
        low, high = intervals.wilson(int(results.videos.right().sum()), len(results.ids))
        print(
            f"top-1 {results.numbers['top1']:.2f} on {len(results.ids)} held-out videos, 95 % interval {low:.2f} to "
            f"{high:.2f}"
        )
    # Always predicting the largest class scores that class's share
    largest = np.bincount(results.labels).max() / len(results.labels)
    print(f"  for comparison, always predicting the largest class: {100 * largest:.2f}")
    if split_text:
        print(shown(f"  split: {split_text}"))
    print(f"report: {index}")
    if sys.stdout.isatty() and os.environ.get("DISPLAY"):
        webbrowser.open(index.resolve().as_uri())
    return 0
