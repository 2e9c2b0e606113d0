"""docs/results.md from experiment folders: accuracy on three data sets of real people, by folds.

    python -m tests.benchmarks.analysis.results train DIR [--set KEY=VALUE]   train all experiments, one after the other
    python -m tests.benchmarks.analysis.results seeds DIR EXP [--count 10]    train one of them with several seeds
    python -m tests.benchmarks.analysis.results collect EXP [--name latest]   after EXP/train.sh: keep its predictions
    python -m tests.benchmarks.analysis.results page                          write docs/results.md from the kept files

`train` copies the experiments of `exps/` into DIR, trains and evaluates each by its folds and collects the results. Run
it again to resume. `seeds` does so for one experiment and each of its seeds (tests/data/spreads). `collect` reads the
pooled result of the folds and the training curves and writes tests/data/results/DATA/METHOD.json. `page` computes every
number from these files. EXP may be a copy of an experiment in `exps/`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anal_tools.compare import mcnemar
from anal_tools.evaluate.results import Results
from anal_tools.experiments import data_set
from anal_tools.folds import FOLDER, evaluated
from tests.benchmarks.analysis.answers import DATA_SETS, KEPT, SPREADS, Answers, Spread, interval
from tests.benchmarks.rows import ROOT, environment
from utils import config
from utils.errors import UserError

PAGE, README = ROOT / "docs/results.md", ROOT / "README.md"
MARKS = ("<!-- python -m tests.benchmarks.analysis.results page -->", "<!-- end of results -->")
BASE = "ridge"
CURVE_POINTS = 40  # of a fold, at most
WIDE, WIDE_DATA = ["3crop"], ("weizmann10", "ut_interaction2")  # frames wider than 1.2 times their height
ORDER = ("tsm_mobilenetv2", "tsn_mobilenetv2", "probe_mobilenetv2")


def main(argv: Sequence[str] | None = None) -> int:
    """Keep the predictions of experiments, or write the page."""
    parser = argparse.ArgumentParser(description="accuracy on real people: keep predictions, write the page")
    verbs = parser.add_subparsers(dest="verb", required=True)
    keep = verbs.add_parser("collect", help="keep the predictions of an experiment with folds")
    keep.add_argument("exp", type=Path, nargs="+")
    keep.add_argument("--name", default="latest", help="name of the results (default: %(default)s)")
    run = verbs.add_parser("train", help="train all experiments by their folds, and keep their predictions")
    run.add_argument("work", type=Path, metavar="DIR")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--only", default="", help="train only experiments whose path contains this text")
    many = verbs.add_parser("seeds", help="train one experiment with several seeds, and keep all predictions")
    many.add_argument("work", type=Path, metavar="DIR")
    many.add_argument("exp", help="below exps/")
    many.add_argument("--count", type=int, default=10, help="seeds 0 to N - 1 (default: %(default)s)")
    many.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    verbs.add_parser("page", help=f"write {PAGE.name}")
    args = parser.parse_args(argv)
    if args.verb == "train":
        return train(args.work, args.set, args.only)
    if args.verb == "seeds":
        return seeds(args.work, args.exp, args.count, args.set)
    if args.verb == "collect":
        for exp in args.exp:
            answers = collect(exp, args.name)
            answers.write()
            print(f"{answers.data} {answers.name}: {answers.right.mean():.3f} of {len(answers.videos)} held-out videos")
    else:
        answers = kept()
        PAGE.write_text(page(answers), encoding="utf-8")
        README.write_text(with_numbers(README.read_text(encoding="utf-8"), answers), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)} and the numbers in {README.name}")
    return 0


def kept() -> dict[str, list[Answers]]:
    """Return all predictions by data set, the best method first."""
    by_data = {name: [Answers.read(file) for file in sorted((KEPT / name).glob("*.json"))] for name in DATA_SETS}
    return {name: sorted(of_data, key=lambda one: -one.right.mean()) for name, of_data in by_data.items()}


# --------------------------------------------------------------------------------------------------------------- train


def train(work: Path, sets: Sequence[str], only: str) -> int:
    """Train, evaluate and collect each experiment of the data sets; return the exit code of the first failure."""
    for name in planned():
        if only in name:
            answers = _trained(work, name, sets)
            if isinstance(answers, int):
                return answers
            answers.write()
    return 0


def _trained(work: Path, name: str, sets: Sequence[str]) -> Answers | int:
    """Train and evaluate a copy of an experiment; return its answers, or the exit code of a failure."""
    words = [word for text in sets for word in ("--set", text)]
    exp = work.resolve() / name
    if not exp.exists():
        shutil.copytree(ROOT / "exps" / name, exp)
    crops = WIDE if data_set(config.load(exp)) in WIDE_DATA else []
    for verb, extra in (("train", words), *([("eval", ["--views", *crops])] if crops else [])):
        argv = [sys.executable, "-m", "launch", verb, str(exp), "local", "0", *extra]
        code = subprocess.run(argv, cwd=ROOT, env=environment(), check=False).returncode
        if code:
            return code
    answers = collect(exp, "-".join(["latest", *crops]))
    print(
        f"{answers.data} {answers.name}: {answers.right.mean():.3f} of {len(answers.videos)} held-out videos",
        flush=True,
    )
    return answers


def seeds(work: Path, name: str, count: int, sets: Sequence[str]) -> int:
    """Train one experiment with seeds 0 to count - 1; keep the predictions of all; return the first failure's code."""
    if count < 2:
        raise UserError(f"--count {count}: a spread needs at least 2 seeds")
    rows: dict[int, list[int]] = {}
    for seed in range(count):
        answers = _trained(work / f"seed{seed}", name, [*sets, f"common.seed={seed}"])
        if isinstance(answers, int):
            return answers
        rows[seed] = [answer for *_, answer in sorted(answers.videos)]
        # Written once, so that a stopped repetition leaves the kept file as it was
        if len(rows) == count:
            Spread(answers.data, answers.name, answers.about, rows).write()
    return 0


def planned() -> list[str]:
    """Return the experiments of the three data sets, the cheapest first: those with ImageNet features."""
    names = [
        str(file.parent.relative_to(ROOT / "exps"))
        for _, folder, _ in DATA_SETS.values()
        for file in sorted((ROOT / "exps" / folder).rglob("config.yaml"))
    ]
    first = [ORDER.index(method) if (method := name.split("/")[1]) in ORDER else len(ORDER) for name in names]
    return [name for _, name in sorted(zip(first, names, strict=True), key=lambda pair: pair[0])]


# ------------------------------------------------------------------------------------------------------------- collect


def collect(exp: Path, name: str) -> Answers:
    """Return the prediction of an experiment for each held-out video.

    Raises:
        UserError: folds are missing, or the experiment is on another data set.
    """
    folds, missing = evaluated(exp, name)
    if missing:
        raise UserError(f"{exp}: fold {', '.join(missing)} is not evaluated; start {exp / 'train.sh'} again")
    cfg = config.load(exp)
    data = data_set(cfg)
    if data not in DATA_SETS:
        raise UserError(f"{exp}: trains on {data}; docs/results.md is about {', '.join(DATA_SETS)}")
    videos = tuple(
        (path, int(label), fold, int(answer))
        for fold, one in folds.items()
        for path, label, answer in zip(one.ids, one.labels, one.scores.argmax(axis=1), strict=True)
    )
    curve = {fold: _curve(exp / FOLDER / fold / "events/scalars.jsonl") for fold in folds}
    return Answers(data, exp.resolve().parent.name, _about(exp, next(iter(folds.values()))), videos, curve)


def _about(exp: Path, first: Results) -> dict[str, object]:
    """Return the settings of the training and the evaluation of a fold, from its result."""
    summary = first.summary
    cfg = config.load(first.exp)
    return {
        "method": cfg.model.type,
        "backbone": cfg.model.backbone,
        "experiment": "/".join(exp.resolve().parts[-3:]),
        "weights": Path(cfg.model.pretrained).stem if isinstance(cfg.model.pretrained, str) else "random",
        "frames": cfg.model.num_segments * cfg.data.clip_len,
        "pixels": cfg.augmentation.input_size,
        "epochs": cfg.lr_scheduler.max_epoch,
        "crops": summary["protocol"]["views"],
        "views": summary["protocol"]["text"],
        "parameters": summary.get("cost", {}).get("parameters", 0),
        "seed": cfg.seed,
    }


def _curve(file: Path) -> list[list[float]]:
    """Return at most `CURVE_POINTS` pairs [iteration, training loss] of a fold."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    points = [[row["step"], round(row["loss_train"], 3)] for row in rows if "loss_train" in row]
    return points[:: -(-len(points) // CURVE_POINTS)]


# ---------------------------------------------------------------------------------------------------------------- page


def page(by_data: dict[str, list[Answers]]) -> str:
    """Return the text of docs/results.md."""
    parts = [HEAD]
    for data, of_data in by_data.items():
        title, _, folds = DATA_SETS[data]
        networks = [one for one in of_data if one.name != BASE]
        parts.append(f"## {title}: {len(of_data[0].videos)} videos, {folds}\n")
        parts.append(_table(of_data) if networks else "No network has been trained on it yet.\n\n" + _table(of_data))
        if networks:
            parts.append(_by_fold(of_data))
            parts.append(_confusions(networks[0]))
    if any(one.curve for of_data in by_data.values() for one in of_data):
        parts.append(PICTURE)
    spreads = [_spread(Spread.read(file), by_data) for file in sorted(SPREADS.glob("*.json"))]
    parts += ["## Spread between seeds\n", *spreads] if spreads else []
    parts.append(TAIL)
    return "\n".join(parts)


def _table(of_data: list[Answers]) -> str:
    base = next(one for one in of_data if one.name == BASE)
    lines = [
        "| method | starts from | clip | parameters, M | top-1 | 95 % interval | p against ridge |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    for one in of_data:
        low, high = interval(one.right)
        about = one.about
        ridge = one.name == BASE
        words = (
            ["ridge regression", "", about["recipe"], ""]
            if ridge
            else [
                _label(one),
                "ImageNet features" if "imagenet" in about["weights"] else about["weights"],
                f"{about['frames']} frames, {about['pixels']} pixels"
                + (f", {about['crops']} crops" * (about["crops"] > 1)),
                f"{about['parameters'] / 1e6:.1f}",
            ]
        )
        test = "" if ridge else _against(base, one)
        lines.append(f"| {' | '.join(words)} | {one.right.mean():.3f} | {low:.2f} to {high:.2f} | {test} |")
    return "\n".join(lines) + "\n"


def _label(one: Answers) -> str:
    """Return the name of the method with a link to its experiment."""
    text = one.name.replace("_", " ", 1)
    return f"[{text}](../exps/{one.about['experiment']}/config.yaml)"


def _against(base: Answers, one: Answers) -> str:
    """Return the p-value of the exact McNemar test, and the numbers of videos it compares."""
    lost, won = int((base.right & ~one.right).sum()), int((one.right & ~base.right).sum())
    p = mcnemar(lost, won)
    return f"{p:.2g} ({won} won, {lost} lost)"


def _by_fold(of_data: list[Answers]) -> str:
    folds = list(dict.fromkeys(video[2] for video in of_data[0].videos))
    names = sorted(folds)
    lines = ["Top-1 of each fold:\n", "| method | " + " | ".join(names) + " | mean | std |"]
    lines.append("|---|" + "---:|" * (len(names) + 2))
    for one in of_data:
        values = [
            float(np.mean([label == answer for _, label, fold, answer in one.videos if fold == name])) for name in names
        ]
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(
            f"| {one.name.replace('_', ' ', 1)} | {cells} | {np.mean(values):.2f} | {np.std(values, ddof=1):.2f} |"
        )
    return "\n".join(lines) + "\n"


def _confusions(best: Answers, shown: int = 5) -> str:
    """Return the pairs of classes that the best method confuses most often."""
    names = class_names(best)
    wrong: dict[tuple[int, int], int] = {}
    for _, label, _, answer in best.videos:
        if label != answer:
            wrong[label, answer] = wrong.get((label, answer), 0) + 1
    total = sum(wrong.values())
    if not total:
        return f"{best.name.replace('_', ' ', 1)} makes no error.\n"
    first = sorted(wrong.items(), key=lambda pair: (-pair[1], pair[0]))[:shown]
    words = ", ".join(f"{names[label]} as {names[answer]} ({count})" for (label, answer), count in first)
    return f"{best.name.replace('_', ' ', 1)} makes {total} errors. The most frequent are {words}.\n"


def _spread(spread: Spread, by_data: dict[str, list[Answers]]) -> str:
    """Return the paragraph on the seeds of one experiment."""
    labels = [label for _, label, *_ in sorted(by_data[spread.data][0].videos)]
    top1 = np.mean(np.array(list(spread.answers.values())) == labels, axis=1)  # (seeds,)
    deviation = float(top1.std(ddof=1))
    experiment = f"[{spread.name.replace('_', ' ', 1)}](../exps/{spread.about['experiment']}/config.yaml)"
    words = (
        f"{len(top1)} trainings of {experiment} on {DATA_SETS[spread.data][0]} differ only in the seed: top-1 is "
        f"{top1.mean():.3f} on average, from {top1.min():.3f} to {top1.max():.3f}, with a standard deviation of "
        f"{deviation:.3f}. Two single runs whose top-1 differs by less than {2 * math.sqrt(2) * deviation:.3f} (two "
        "standard deviations of a difference) may differ by the seed alone."
    )
    text = textwrap.fill(words, 100, break_long_words=False, break_on_hyphens=False)
    return f"{text}\n"


def class_names(one: Answers) -> list[str]:
    """Return the names of the classes, from the folders or, for UT-Interaction, from its documentation."""
    if one.data == "ut_interaction2":
        return ["handshake", "hug", "kick", "point", "punch", "push"]
    names = {label: path.split("/")[1] for path, label, _, _ in one.videos}
    return [names[label].replace("_", " ") for label in sorted(names)]


def with_numbers(readme: str, by_data: dict[str, list[Answers]]) -> str:
    """Return README.md with the best network of each data set between the two `MARKS`.

    Raises:
        UserError: README.md has no such marks.
    """
    first, start, rest = readme.partition(MARKS[0])
    _, end, last = rest.partition(MARKS[1])
    if not start or not end:
        raise UserError(f"{README.name}: the lines {MARKS[0]} and {MARKS[1]}, which enclose the numbers, are missing")
    lines = ["| data | method | protocol | top-1 | 95 % interval |", "|---|---|---|---:|---|"]
    for data, of_data in by_data.items():
        best = next((one for one in of_data if one.name != BASE), None)
        if best:
            low, high = interval(best.right)
            title, _, folds = DATA_SETS[data]
            words = (
                title,
                best.name.replace("_", " ", 1),
                folds,
                f"{best.right.mean():.3f}",
                f"{low:.2f} to {high:.2f}",
            )
            lines.append("| " + " | ".join(words) + " |")
    return f"{first}{MARKS[0]}\n\n" + "\n".join(lines) + f"\n\n{MARKS[1]}{last}"


HEAD = """\
# Accuracy on real people

`python -m tests.benchmarks.analysis.results page` writes this page from `tests/data/results`. Do
not edit it by hand.

We evaluate on three small public data sets and hold out each video once ([folds.md](folds.md)).
Top-1 is pooled over all held-out videos. The interval is Wilson's 95 % interval for other videos of
the same kind. The baseline is a ridge regression on the mean frame and the mean motion of each
video, trained on the same folds (`python -m tests.benchmarks.analysis.ridge`). p is the p-value of
an exact McNemar test against this baseline. "Won" counts the videos that only the network
classifies correctly, "lost" those that only the baseline does.

We evaluate the last checkpoint, not the best one. A single crop covers the whole short side. If
frames are wider than 1.2 times their height, three crops side by side cover the frame. This is the
rule of [start](start.md), which was chosen after a look at 12 videos of UT-Interaction. The recipe
was tuned on UCF Sports (folds 1 and 2: a peak rate of .004 instead of .01 raised the correct videos
from 44 to 51 of 64) and reused on the other data sets. The numbers on UCF Sports are therefore
slightly optimistic. The four settings of the ridge regression were tuned on the folds of all three
data sets, which favours the baseline.

To reproduce the numbers, run `python -m tests.benchmarks.analysis.results train DIR`. It trains a
copy of every experiment, and resumes if you run it again. To train only one of them, run
`exps/.../train.sh local 0`, and for three crops also `eval.sh local 0 --views 3crop`.
"""

PICTURE = """\
## Training loss and confusions

![Training loss of each method, and the confusion matrix of the best one](pictures/results.png)

`.venv/bin/python docs/pictures/results.py` draws this figure from the same files.
"""

TAIL = """\
## Limits of these numbers

- UCF Sports is a grey version of 64x64 pixels, cropped around the person, and Weizmann consists of
  silhouettes. Do not compare these numbers with published ones, which use the original videos.
  Of UT-Interaction we use only set 2.
- Each line of the tables is one run with one seed. The interval does not include the spread between
  seeds.
"""


# ---------------------------------------------------------------------------------------------------------------- rows

GOALS = {"ucf_sports": 0.80, "weizmann10": 0.97, "ut_interaction2": 0.90}


def above_ridge() -> dict:
    """Compare the best network of UCF Sports with the ridge regression and the goals on each data set."""
    by_data = kept()
    best = next((one.name for one in by_data["ucf_sports"] if one.name != BASE), "")
    measured, holds = {}, bool(best)
    for data, of_data in by_data.items():
        base = next(one for one in of_data if one.name == BASE)
        one = next((one for one in of_data if one.name == best), None)
        if one is None:
            measured[data], holds = {"ridge": round(float(base.right.mean()), 3), best: "not trained yet"}, False
            continue
        p = mcnemar(int((base.right & ~one.right).sum()), int((one.right & ~base.right).sum()))
        top1 = float(one.right.mean())
        measured[data] = {
            "ridge": round(float(base.right.mean()), 3),
            best: round(top1, 3),
            "interval": [round(end, 3) for end in interval(one.right)],
            "p": float(f"{p:.2g}"),
            "goal": GOALS[data],
        }
        holds &= top1 > base.right.mean() and p < 0.05
    return {"measured": measured, "holds": holds}


def page_is_made() -> dict:
    """Check that docs/results.md is what the command writes."""
    readme = README.read_text(encoding="utf-8")
    same = page(kept()) == PAGE.read_text(encoding="utf-8") and with_numbers(readme, kept()) == readme
    return {"measured": "the same" if same else f"{PAGE.name} differs", "holds": same}


ROWS = {
    "ridge": (
        "the best method on ucf_sports, on ucf_sports, weizmann10 and ut_interaction2, by folds",
        "above the ridge regression by an exact McNemar test, p < .05; goals, reported either way: .80, .97, .90",
        above_ridge,
    ),
    "page": ("every number in docs/results.md", "written by the command from tests/data/results", page_is_made),
}


if __name__ == "__main__":
    sys.exit(main())
