"""`python main.py report EXP [EXP2 ...]`: write EXP/report/index.html and its pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from anal_tools import analyze, compare, intervals, label_errors
from anal_tools.analyze import Analysis
from anal_tools.compare import Experiment
from anal_tools.evaluate import scoring
from anal_tools.report import content, maps, media, page
from anal_tools.report.media import Pictures
from anal_tools.text import shown
from utils import files, metrics
from utils.errors import UserError
from utils.options import Parser
from utils.version import VERSION

PICTURES, CLIPS = 200, 100  # number of videos shown with frames, and of these with a clip
HEADLINE = ("top1", "top5", "mean_class_accuracy")  # metrics at the top of the page
MOST = 8  # experiments that the page has colours for


def main(argv: Sequence[str]) -> int:
    """Parse the command line and write the report."""
    parser = Parser(prog="main.py report", description="Write EXP/report/index.html.")
    parser.add_argument("exp", nargs="+", help="evaluated experiment folders; EXP:NAME selects the results NAME")
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="default: report/ in the first EXP")
    parser.add_argument(
        "--pictures", type=int, default=PICTURES, metavar="N", help="number of videos shown with frames"
    )
    parser.add_argument("--clips", type=int, default=CLIPS, metavar="N", help="how many of them also get a clip")
    parser.add_argument(
        "--cam", action="store_true", help="show where the network looked in its most confident mistakes"
    )
    parser.add_argument("--cam-layer", default=None, metavar="NAME", help="like --cam, with the map of this layer")
    parser.add_argument(
        "--no-media", action="store_true", help="include no video frames, and delete those of earlier reports"
    )
    parser.add_argument(
        "--good-pairs", type=Path, default=None, metavar="FILE", help="allowed pairs, one `child -> parent` per line"
    )

    args = parser.parse_args(list(argv))
    if min(args.pictures, args.clips) < 0:
        raise UserError("report: --pictures and --clips are numbers of videos, 0 or more")
    cam = args.cam or args.cam_layer is not None
    if cam and (args.no_media or not args.pictures):
        raise UserError("report: --cam draws on pictures; leave out --no-media and --pictures 0")

    started = time.monotonic()

    try:
        index = build(
            args.exp,
            out=args.out,
            pictures=0 if args.no_media else args.pictures,
            clips=args.clips,
            good_pairs=args.good_pairs,
            cam=cam,
            cam_layer=args.cam_layer,
        )
    except OSError as error:
        raise UserError(f"{error.filename}: the report cannot be written here ({error.strerror}); try --out") from error
    size = sum(path.stat().st_size for path in index.parent.rglob("*") if path.is_file())
    print(f"{shown(str(index))}: {size / 1e6:.1f} MB with pictures, written in {time.monotonic() - started:.1f} s")
    return 0


def build(
    where: Sequence[str],
    *,
    out: Path | None = None,
    pictures: int = PICTURES,
    clips: int = CLIPS,
    good_pairs: Path | None = None,
    cam: bool = False,
    cam_layer: str | None = None,
) -> Path:
    """Write the page of one or several experiments.

    Args:
        where: `EXP` or `EXP:NAME`; the first gives the list of videos.
        out: folder to write; default: report/ in the first experiment.
        pictures: number of videos shown with the frames that the model saw; 0 for no media, which also deletes those
            of earlier reports in this folder.
        clips: how many of them also get a clip.
        good_pairs: file of allowed pairs.
        cam: show which parts of the frames each network used in its most confident mistakes.
        cam_layer: layer of Grad-CAM; None to choose it.

    Returns:
        The path of the page.

    Raises:
        UserError: no results, or results that cannot be shown together.
    """
    if len(where) > MOST:
        raise UserError(f"report: at most {MOST} experiments fit on a page; compare has no such limit")

    experiments = [compare.load(one) for one in where]
    analyses = [Analysis.of(one.results, good_pairs) for one in experiments]
    if len(analyses[0].names) >= content.ABSENT:
        raise UserError(f"report: {len(analyses[0].names)} classes are more than a page can show")
    for other in experiments[1:]:
        compare.pair(experiments[0].results, other.results)  # raises UserError before any work is done

    folder = out or experiments[0].exp / "report"
    folder.mkdir(parents=True, exist_ok=True)
    # Maps are added to the entries of the pictures, so pictures come first
    media_of, note = pictures_of(experiments, analyses, folder / "media", pictures=pictures, clips=clips)
    about_maps = maps_of(experiments, analyses, media_of, folder / "media", layer=cam_layer) if cam else []
    # All files of the page are known from here on
    media.forget_others(folder / "media", media_of)

    suspects = label_errors.suspects(experiments[0].results.scores, experiments[0].results.labels)
    if suspects:
        label_errors.write_csv(folder / label_errors.CSV, suspects, experiments[0].results)

    blocks = content.blocks(
        experiments,
        analyses,
        media_of,
        pictures=note,
        maps=about_maps,
        suspects=label_errors.CSV if suspects else "",
    )

    protocol = shown(str(experiments[0].results.summary.get("protocol", {}).get("text", "")))
    text = page.render(
        title=" and ".join(one.title for one in experiments),
        protocol=f"{experiments[0].title}: {protocol}" if len(experiments) > 1 else protocol,
        headline=headline(experiments[0], analyses[0]),
        footer=f"Made by Zoetrope {VERSION} on {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC. "
        "Nothing here leaves this folder.",
        sections=[name for name in page.SECTIONS if name != "compare" or len(experiments) > 1],
        blocks=blocks,
    )

    index = folder / "index.html"
    files.write_text(index, text)
    return index


def headline(one: Experiment, analysis: Analysis) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page, each with a label."""
    numbers = one.results.numbers
    # With five classes or fewer, every prediction is among the first five
    chosen = [name for name in HEADLINE if name != "top5" or len(analysis.names) > 5]
    shown_metrics = [metric for metric in metrics.metrics_of("report") if metric.name in chosen]
    ends = intervals.of_metrics(one.results.videos, shown_metrics)

    shares = []
    for metric in shown_metrics:
        low, high = ends[metric.name]
        shares.append((metric.on_page(numbers[metric.name]), f"{metric.title}, 95 % interval {low:.1f} to {high:.1f}"))

    return [
        *shares,
        (f"{len(analysis.predicted):,}", f"videos in {len(analysis.names)} classes"),
    ]


def chosen_rows(experiments: Sequence[Experiment], analyses: Sequence[Analysis]) -> list[int]:
    """Return rows of the first experiment's list in the order in which they deserve pictures.

    The most confident mistakes come first, then an example of each frequent class pair, mistakes of other experiments,
    labels in doubt, a correctly classified video of each class, and all others.
    """
    first, results = analyses[0], experiments[0].results
    mistakes = analyze.worst_videos(first, len(results.ids))
    candidates = mistakes[: analyze.TOP]

    # The most confident mistake of each class pair
    examples: dict[tuple[int, int], int] = {}
    for row in mistakes:
        examples.setdefault((int(results.labels[row]), int(first.predicted[row])), row)
    errors = first.errors()
    candidates += sorted(examples.values(), key=lambda r: -errors[results.labels[r], first.predicted[r]])[: analyze.TOP]

    for one, analysis in zip(experiments[1:], analyses[1:], strict=True):
        # Rows of the other list, as rows of the first one
        here, there = scoring.common_rows(results.ids, one.results.ids)
        place = dict(zip(there.tolist(), here.tolist(), strict=True))
        candidates += [place[row] for row in analyze.worst_videos(analysis) if row in place]
    candidates += [s.row for s in label_errors.suspects(results.scores, results.labels)[: analyze.TOP]]

    right: dict[int, int] = {}
    for row, (label, guess) in enumerate(zip(results.labels.tolist(), first.predicted.tolist(), strict=True)):
        if label == guess:
            right.setdefault(label, row)
    candidates += [*right.values(), *range(len(results.ids))]

    unread = first.predicted < 0
    # dict.fromkeys keeps the first of equal rows, and their order
    return [row for row in dict.fromkeys(candidates) if not unread[row]]


def pictures_of(
    experiments: Sequence[Experiment], analyses: Sequence[Analysis], folder: Path, *, pictures: int, clips: int
) -> tuple[dict[int, Pictures], str]:
    """Return the pictures of the chosen videos, and a line that explains what they show or why there are none."""
    if not pictures:
        return {}, "Made without pictures: this folder contains no video frames."
    rows = chosen_rows(experiments, analyses)[:pictures]
    if not rows:
        return {}, ""

    # A report without pictures is better than none: the videos may be on another machine
    try:
        source = media.source_of(experiments[0].exp, experiments[0].results)
    except UserError as error:
        print(f"no pictures: {shown(str(error))}")
        return {}, f"No pictures: {shown(str(error))}"

    pictures_by_row, failed = media.make(source, rows, folder, clips=clips, say=print)
    for line in failed[:5]:
        print(f"no picture: {shown(line)}")
    note = (
        f"Frames are those that {experiments[0].title} saw, cropped as it saw them; click one to find it in the clip."
    )
    return pictures_by_row, note + (f" {len(failed)} videos could not be shown." if failed else "")


def maps_of(
    experiments: Sequence[Experiment],
    analyses: Sequence[Analysis],
    pictures_by_row: dict[int, Pictures],
    folder: Path,
    *,
    layer: str | None,
) -> list[str]:
    """Add maps to the pictures of each experiment's most confident mistakes; return a line about each."""
    first, notes = experiments[0].results, []
    for number, (one, analysis) in enumerate(zip(experiments, analyses, strict=True)):
        here, there = scoring.common_rows(first.ids, one.results.ids)
        place = dict(zip(there.tolist(), here.tolist(), strict=True))
        rows = [row for row in analyze.worst_videos(analysis) if place.get(row) in pictures_by_row]
        try:
            maps_by_row, note = maps.make(one.exp, one.results, rows, folder, layer=layer, say=print)
        except UserError as error:
            print(f"no maps of {one.title}: {shown(str(error))}")
            maps_by_row, note = {}, f"No maps: {shown(str(error))}"

        for row, row_maps in maps_by_row.items():
            pictures_by_row[place[row]].setdefault("maps", {})[str(number)] = row_maps
        notes.append(note)
    return notes
