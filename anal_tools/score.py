"""`python main.py score EXP...`: score kept views again without a GPU; fuse several experiments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anal_tools import text
from anal_tools.evaluate import protocols, scoring
from anal_tools.evaluate.results import Results
from utils import metrics
from utils.errors import UserError
from utils.options import Parser


@dataclass(frozen=True)
class ScoreRow:
    """One line of the table: some views of the models, fused and scored.

    Attributes:
        protocol: of the first model.
        number: number of views of all models.
        gmacs: of a video; None if an evaluation did not record it.
        numbers: every metric.
        right: k -> (N,) bool: a label is among the first k predictions.
        intervals: k -> ends of the bootstrap interval of the top-k accuracy, per cent.
        note: how the views differ from those of the protocol; "" if they do not.
    """

    protocol: protocols.Protocol
    number: int
    gmacs: float | None
    numbers: dict[str, float]
    right: dict[int, np.ndarray]
    intervals: dict[int, list[float]]
    note: str

    @property
    def top1(self) -> float:
        """Top-1 accuracy in per cent."""
        return self.numbers["top1"]

    @property
    def views(self) -> str:
        """The views as text: clips x crops."""
        return f"{self.protocol.spec.num_clips}x{self.protocol.spec.crops_per_clip}"

    def to_json(self) -> str:
        """Return the row as one line of JSON."""
        about = {"views": self.views, "number": self.number, "average": self.protocol.average, "gmacs": self.gmacs}
        ends = {f"top{k}_interval": interval for k, interval in self.intervals.items()}
        rest = {"note": self.note, "protocol": dataclasses.asdict(self.protocol)}
        return json.dumps(about | self.numbers | ends | rest)


def main(argv: list[str]) -> int:
    """Parse the command line and print the table."""
    parser = Parser(
        prog="main.py score",
        description="Score the kept views of finished evaluations again. Several EXP are combined into one model.",
    )
    parser.add_argument("exp", nargs="+", metavar="EXP[:NAME]", help="experiment folder, and the name of its results")
    parser.add_argument(
        "--protocol", choices=sorted(protocols.PRESETS), help="the views of a tool's published evaluation protocol"
    )
    parser.add_argument("--views", metavar="V,...", help="centre, 3crop, 10x1, ...: one row each (default: all views)")
    parser.add_argument("--average", metavar="A,...", help=f"of {', '.join(protocols.AVERAGES)}: one row each")
    parser.add_argument("--weights", metavar="W,...", help="weights of the models, one per EXP (default: equal)")
    parser.add_argument(
        "--level", type=float, default=scoring.LEVEL, help="confidence level of the intervals (default: %(default)s)"
    )
    parser.add_argument(
        "--resamples", type=int, default=scoring.RESAMPLES, help="number of bootstrap draws (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of these draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per row instead of the table")

    args = parser.parse_args(argv)
    if not 0 < args.level < 1 or args.resamples < 1:
        raise UserError("--level must be between 0 and 1, and --resamples at least 1")

    models = [load(where) for where in args.exp]
    weights = parse_weights(args.weights, len(models))
    draws = {"level": args.level, "resamples": args.resamples, "seed": args.seed}
    rows = [
        row(models, weights, protocol=args.protocol, views=views, average=average, **draws)
        for views in (args.views.split(",") if args.views else [None])
        for average in (args.average.split(",") if args.average else [None])
    ]

    if args.json:
        print("\n".join(one.to_json() for one in rows))
        return 0
    names = ", ".join(f"{model.exp} ({model.name})" for model in models)
    print(f"{names}: {len(models[0].ids)} videos")
    if len(models) > 1:
        print(f"together, weights {', '.join(f'{weight:g}' for weight in weights)}")
    print(table(rows, multi_label=models[0].multi_label))
    return 0


def load(where: str) -> Results:
    """Return the results that EXP or EXP:NAME names; a folder whose own name has a colon is found first."""
    if Path(where).is_dir():
        return Results.load(Path(where))
    # From the right: a path may contain colons
    exp, colon, name = where.rpartition(":")
    if not colon or not Path(exp).is_dir():
        raise UserError(f"{where}: there is no such experiment folder")
    return Results.load(Path(exp), name)


def parse_weights(given: str | None, models: int) -> list[float]:
    """Return one positive number per model.

    Raises:
        UserError: the number of weights is wrong, or one is not positive.
    """
    if given is None:
        return [1.0] * models
    try:
        weights = [float(word) for word in given.split(",")]
    except ValueError as error:
        raise UserError(f"--weights {given}: numbers separated by commas, such as 2,1") from error

    if len(weights) != models or not all(np.isfinite(weights)) or min(weights) <= 0:
        raise UserError(f"--weights {given}: give one positive number for each of the {models} experiments")
    return weights


def row(
    models: Sequence[Results],
    weights: Sequence[float] = (1.0,),
    *,
    protocol: str | None = None,
    views: str | None = None,
    average: str | None = None,
    level: float = scoring.LEVEL,
    resamples: int = scoring.RESAMPLES,
    seed: int = 0,
) -> ScoreRow:
    """Return one line of the table: the chosen views of all models, fused and scored."""
    if average is not None and average not in protocols.AVERAGES:
        raise UserError(f"--average {average}: give one of {', '.join(protocols.AVERAGES)}")

    # Scores of each model, from the views that it has
    parts, notes, number = [], [], 0
    for model in models:
        kept = scoring.kept_protocol(model)
        if protocol in (None, kept.name):  # even if it was run at a different scale
            chosen = scoring.smaller(kept, views, average)
        else:
            asked = protocols.choose(scoring.config_of(model), protocol=protocol, views=views, average=average)
            chosen = scoring.subset(kept, asked)
        # The softmax came before the average over windows, so there are no logits
        if chosen.protocol.average == "logit" and kept.window:
            raise UserError("views kept with --per-position are probabilities; they have no mean of logits")
        parts.append((chosen, scoring.scores_of(model, chosen)))
        number += len(chosen.views)
        notes += [chosen.note] if chosen.note and chosen.note not in notes else []

    # Fuse them on the videos of the first model
    chosen, scores = parts[0]
    first = models[0]
    if len(models) > 1:
        # Rows of each model in the order of the first one's list
        orders = scoring.aligned(models)
        fused = [model_scores[order] for (_, model_scores), order in zip(parts, orders, strict=True)]
        scores = scoring.fuse(fused, weights, chosen.protocol.average)

    videos = metrics.Videos(scores, first.labels, first.targets)
    right = {k: videos.right(k) for k in (1, 5)}
    draws = {"level": level, "resamples": resamples, "seed": seed}

    # GMACs add up over models and views, and one unknown makes the sum unknown
    cost: float | None = 0
    for model, (part, _) in zip(models, parts, strict=True):
        per_view = model.summary.get("cost", {}).get("gmacs_per_view")
        cost = None if cost is None or per_view is None else cost + per_view * len(part.views)

    return ScoreRow(
        protocol=chosen.protocol,
        number=number,
        gmacs=cost,
        numbers=metrics.evaluate(videos),
        right=right,
        intervals={k: [100 * end for end in scoring.interval(hits, **draws)] for k, hits in right.items()},
        note="; ".join(notes),
    )


def table(rows: Sequence[ScoreRow], *, multi_label: bool = False) -> str:
    """Return the rows as text, the intervals next to top-1, the notes below."""
    shown = metrics.metrics_of("score", multi_label=multi_label)
    heads = [
        "views",
        "average",
        "GMAC/video",
        *(metric.head or metric.title for metric in shown),
        "top-1 interval" if not multi_label else "hit@1 interval",
    ]

    lines, notes = [heads], text.Notes()
    for one in rows:
        low, high = one.intervals[1]
        cost = "?" if one.gmacs is None else f"{one.gmacs:.1f}"
        values = [f"{one.numbers[metric.name]:.2f}" for metric in shown]
        lines.append(
            [one.views + notes.mark(one.note), one.protocol.average, cost, *values, f"{low:.2f} .. {high:.2f}"]
        )
    return "\n".join([*text.columns(lines), *notes.lines()])
