"""Ridge regression on the mean picture and the mean motion of each video: what a network has to beat (docs/results.md).

    python -m tests.benchmarks.analysis.ridge [ucf_sports ...]

trains it on the folds of the data sets in data/ (or $ZOETROPE_RESULTS_DATA) and writes what it answered for each video
to tests/data/results/NAME/ridge.json, beside the answers of the networks.

Its four choices (maps of 32 pixels, mirrored copies, each map scaled to a mean length of 1, strength 1) were made on
these folds, among some hundred others, so it is if anything too good; no network had such a choice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.benchmarks.analysis.answers import DATA_SETS, Answers, data_folder, read_folds

SIDE, STRENGTH = 32, 1.0


def maps(video: Path) -> np.ndarray:
    """Mean grey picture and mean absolute change from frame to frame, (2, SIDE, SIDE) float64, in shares of white."""
    import av
    import cv2

    with av.open(str(video)) as container:
        frames = [
            cv2.resize(frame.to_ndarray(format="gray"), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            for frame in container.decode(video=0)
        ]
    pixels = np.array(frames, np.float64) / 255
    return np.stack([pixels.mean(axis=0), np.abs(np.diff(pixels, axis=0)).mean(axis=0)])


def predict(train: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Classes of the held-out videos by a ridge regression on one-hot labels (Hoerl and Kennard 1970), in dual form.

    Args:
        train: (N, 2, SIDE, SIDE).
        labels: (N,).
        held_out: (M, 2, SIDE, SIDE).

    Returns:
        (M,) labels.
    """
    train = np.concatenate([train, train[..., ::-1]])
    one_hot = np.eye(labels.max() + 1)[np.concatenate([labels, labels])]
    centre, offset = train.mean(axis=0), one_hot.mean(axis=0)
    length = np.sqrt(((train - centre) ** 2).sum(axis=(2, 3), keepdims=True).mean(axis=0))
    x, z = (((part - centre) / length).reshape(len(part), -1) for part in (train, held_out))
    weights = np.linalg.solve(x @ x.T + STRENGTH * np.eye(len(x)), one_hot - offset)
    return (z @ x.T @ weights + offset).argmax(axis=1)


def answers(name: str) -> Answers:
    """What the regression says about each held-out video of a data set."""
    folder = data_folder(name)
    folds = read_folds(name)
    paths = sorted({path for _, held_out in folds.values() for path, _ in held_out})
    of = {path: maps(folder / "videos" / path) for path in paths}
    videos = []
    for fold, (train, held_out) in folds.items():
        labels = np.array([label for _, label in train])
        predicted = predict(
            np.array([of[path] for path, _ in train]), labels, np.array([of[path] for path, _ in held_out])
        )
        videos += [(path, label, fold, int(one)) for (path, label), one in zip(held_out, predicted, strict=True)]
    about = {"method": "ridge", "recipe": f"mean and motion maps of {SIDE} pixels, mirrored, strength {STRENGTH:g}"}
    return Answers(name, "ridge", about, tuple(videos))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the answers for each data set and print the accuracy."""
    parser = argparse.ArgumentParser(description="the ridge regression on the folds of the real data sets")
    parser.add_argument("data", nargs="*", choices=[[], *DATA_SETS], default=[])
    for name in parser.parse_args(argv).data or DATA_SETS:
        regression = answers(name)
        regression.write()
        print(f"{name}: {regression.right.mean():.3f} of {len(regression.videos)} held-out videos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
