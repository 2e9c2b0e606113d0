"""What a method answered for each held-out video of a real data set: small files in tests/data/results.

They hold the label and the predicted class of each video, not one accuracy: intervals, tests and tables are computed
from them again (`tests.benchmarks.analysis.results`), and a reader can check every number of docs/results.md.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.rows import ROOT
from utils import files
from utils.errors import UserError

KEPT = ROOT / "tests/data/results"
SPREADS = ROOT / "tests/data/spreads"
# name: (title, folder of its experiments, how its folds are made)
DATA_SETS = {
    "ucf_sports": ("UCF Sports", "ucf_sports_exps", "5 contiguous folds"),
    "weizmann10": ("Weizmann", "weizmann_exps", "9 folds, one person each"),
    "ut_interaction2": ("UT-Interaction, set 2", "ut_interaction_exps", "10 folds, one sequence each"),
}
QUANTILE = 1.959964  # of the normal distribution, for 95 %

Video = tuple[str, int, str, int]  # path, label, fold, predicted class


def data_folder(name: str) -> Path:
    """Folder of a data set: `videos` and `lists` are in it, as data/README.md says.

    Raises:
        UserError: it is not there.
    """
    folder = Path(os.environ.get("ZOETROPE_RESULTS_DATA", ROOT / "data")) / name
    if not (folder / "lists/all.txt").is_file():
        raise UserError(f"{folder / 'lists/all.txt'}: is not there; data/README.md says what {name} looks like")
    return folder


def read_folds(name: str) -> dict[str, tuple[list[tuple[str, int]], list[tuple[str, int]]]]:
    """(training, held-out) videos of each fold of a data set, each video as (path, label)."""
    lists = sorted((data_folder(name) / "lists").glob("fold*_val.txt"))
    return {file.stem[4:-4]: (_rows(file.with_name(f"{file.stem[:-4]}_train.txt")), _rows(file)) for file in lists}


def _rows(file: Path) -> list[tuple[str, int]]:
    pairs = (line.rsplit(None, 1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return [(path, int(label)) for path, label in pairs]


@dataclass(frozen=True)
class Answers:
    """One method on one data set.

    Attributes:
        data: name of the data set.
        name: of the file; for a network that of its experiment.
        about: what it is: method, recipe, views, code revision, CPU minutes.
        videos: path, label, fold and predicted class of each held-out video.
        curve: of each fold [iteration, training loss, learning rate] rows; empty for a method without one.
    """

    data: str
    name: str
    about: dict[str, Any]
    videos: tuple[Video, ...]
    curve: dict[str, list[list[float]]] = field(default_factory=dict)

    @cached_property
    def right(self) -> np.ndarray:
        """(N,) bool, by the order of the paths, so that two methods line up."""
        return np.array([label == answer for _, label, _, answer in sorted(self.videos)])

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return KEPT / self.data / f"{self.name}.json"

    def write(self) -> None:
        """Keep it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        head = {"data": self.data, "name": self.name, "about": self.about}
        lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
        for key, rows in (("videos", list(self.videos)), ("curve", list(self.curve.items()))):
            lines.append(f'"{key}": [' + ",".join("\n  " + json.dumps(row) for row in rows) + "]")
        files.write(self.file, ("{" + ",\n".join(lines) + "}\n").encode())

    @classmethod
    def read(cls, file: Path) -> Answers:
        """Read what `write` kept."""
        kept = json.loads(file.read_text(encoding="utf-8"))
        videos = tuple((path, label, fold, answer) for path, label, fold, answer in kept["videos"])
        return cls(kept["data"], kept["name"], kept["about"], videos, dict(kept["curve"]))


@dataclass(frozen=True)
class Spread:
    """One experiment, trained with several seeds.

    Attributes:
        data, name, about: as in `Answers`.
        answers: seed -> predicted class of each held-out video, by the order of the paths.
    """

    data: str
    name: str
    about: dict[str, Any]
    answers: dict[int, list[int]]

    def write(self) -> None:
        """Keep it."""
        SPREADS.mkdir(parents=True, exist_ok=True)
        rows = ",".join(f'\n  "{seed}": {json.dumps(answers)}' for seed, answers in self.answers.items())
        head = {"data": self.data, "name": self.name, "about": self.about}
        lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()] + [f'"answers": {{{rows}}}']
        files.write(SPREADS / f"{self.data}-{self.name}.json", ("{" + ",\n".join(lines) + "}\n").encode())

    @classmethod
    def read(cls, file: Path) -> Spread:
        """Read what `write` kept."""
        kept = json.loads(file.read_text(encoding="utf-8"))
        answers = {int(seed): row for seed, row in kept["answers"].items()}
        return cls(kept["data"], kept["name"], kept["about"], answers)


def interval(right: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927), which holds for few videos and near 1; a bootstrap does not."""
    n, share, z = len(right), float(right.mean()), QUANTILE
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
