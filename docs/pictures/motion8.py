"""Draw docs/pictures/motion8.png: why order matters, from three finished runs and the demo's own videos.

    exps/demo_exps/tsm_resnet18/motion8/train.sh local 2       (then tsn_resnet18/motion8 and tsn_resnet18/shape)
    .venv/bin/python docs/pictures/motion8.py

Top: frames of a clip of `left` and one of `right`. Below: validation top-1 of the runs, as in `events/scalars.jsonl`;
a square marks the top-1 of the last evaluation in `results/`, if there was one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "exps" / "demo_exps"
CURVES = (  # option, label, colour
    ("tsm", "TSM, motion", "tab:blue"),
    ("tsn", "TSN, motion", "tab:red"),
    ("tsn_shape", "TSN, shape of the same videos", "tab:gray"),
)
STRIP = 8  # frames shown of a clip


def main(argv: list[str]) -> int:
    """Read the runs, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tsm", type=Path, default=DEMO / "tsm_resnet18/motion8", help="experiment folder")
    parser.add_argument("--tsn", type=Path, default=DEMO / "tsn_resnet18/motion8", help="experiment folder")
    parser.add_argument("--tsn-shape", type=Path, default=DEMO / "tsn_resnet18/shape", help="experiment folder")
    parser.add_argument("--data", type=Path, default=ROOT / "data/motion8", help="what demo-data made")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args(argv)

    # Read all runs before anything is drawn, so that a missing one leaves the picture alone
    curves = []
    for option, label, colour in CURVES:
        exp = getattr(args, option)
        if not (exp / "events/scalars.jsonl").is_file():
            sys.exit(f"error: {exp} has no events/scalars.jsonl; run {exp}/train.sh local 2 first")
        curves.append((validation_curve(exp), last_result(exp), label, colour))

    draw(args.out, [frames_of(args.data, motion) for motion in ("left", "right")], curves)
    print(f"wrote {args.out}")
    return 0


def validation_curve(exp: Path) -> list[tuple[int, float]]:
    """Return (iteration, top-1 in per cent) of a run; the last value of an iteration that a restart repeated."""
    points: dict[int, float] = {}
    for line in (exp / "events/scalars.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "resume" in record:  # later points came from a process whose steps were repeated
            points = {step: value for step, value in points.items() if step <= record["resume"]}
        if "top1_val" in record:
            points[record["step"]] = float(record["top1_val"])
    return sorted(points.items())


def last_result(exp: Path) -> float | None:
    """Return the top-1 in per cent of the newest evaluation; None if there was none."""
    files = sorted((exp / "results").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(files[-1].read_text(encoding="utf-8"))["metrics"]["top1"] if files else None


def frames_of(data: Path, motion: str) -> np.ndarray:
    """Return frames of a motion's first validation clip, side by side: uint8 (H, STRIP * (W + 2) - 2, 3)."""
    import av

    classes = [line.split()[1] for line in (data / "lists/classInd.txt").read_text().splitlines()]
    lines = [line.split() for line in (data / "lists/val.txt").read_text().splitlines()]
    video = next(path for path, _, label in lines if classes[int(label)] == motion)

    with av.open(str(data / video)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = [pictures[i] for i in np.linspace(0, len(pictures) - 1, STRIP).round().astype(int)]

    # White gaps of 2 pixels between the frames
    gap = np.full((pictures[0].shape[0], 2, 3), 255, np.uint8)
    return np.concatenate([part for picture in chosen for part in (picture, gap)][:-1], axis=1)


def draw(
    out: Path, strips: list[np.ndarray], curves: list[tuple[list[tuple[int, float]], float | None, str, str]]
) -> None:
    """Put strips and curves into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Frames of both motions on top, the curves below
    figure, axes = plt.subplots(3, 1, figsize=(7.2, 6.0), height_ratios=[1, 1, 3.6], layout="constrained")
    for axis, strip, motion in zip(axes, strips, ("left", "right"), strict=False):
        axis.imshow(strip, interpolation="nearest")
        axis.set_ylabel(motion)
        axis.set(xticks=[], yticks=[], frame_on=False)

    _draw_curves(axes[2], curves)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw_curves(axis: Axes, curves: list[tuple[list[tuple[int, float]], float | None, str, str]]) -> None:
    for points, result, label, colour in curves:
        steps = [step for step, _ in points]
        axis.plot(steps, [value for _, value in points], "o-", color=colour, label=label)
        if result is not None and points:
            axis.plot(steps[-1], result, "s", color=colour, fillstyle="none", markersize=11)

    # A motion and its reverse show the same frames: without their order, a method guesses between the two
    axis.axhline(50, color="tab:red", linestyle=":", linewidth=1)
    axis.text(
        0.01, 51, "best possible without order", color="tab:red", transform=axis.get_yaxis_transform(), fontsize=8
    )
    axis.set(xlabel="iteration", ylabel="validation top-1, %", ylim=(0, 103))
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(loc="center right", fontsize=9)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
