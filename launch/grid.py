"""Define a sweep: experiments x values = trials, with the name and the folder of each.

A trial's name follows from its experiment and its values alone. So a sweep that runs again, or is enlarged, finds the
trials that it already has.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anal_tools import new
from utils import config, files, renamed
from utils.config.verb import as_yaml
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = ROOT / "sweeps"
FILE = "sweep.json"
TRIALS = "trials"  # folder of the trials that are trained
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")
_OPTION = "eval."  # a key of the grid with this prefix is an option of `main.py eval`, not of the config
_EVAL_OPTIONS = ("checkpoint", "protocol", "views", "scale", "crop_size", "average")
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}  # change of the nesting depth


@dataclass(frozen=True)
class Trial:
    """One experiment with one choice of values.

    Attributes:
        name: letters, digits and - _ . = +
        source: the experiment that the trial copies, with other values.
        values: dotted key (without `common.`) -> value as the user typed it.
    """

    name: str
    source: Path
    values: tuple[tuple[str, str], ...]

    @property
    def overrides(self) -> list[str]:
        """`key=value` for `config.load`."""
        return [f"{key}={value}" for key, value in self.values if not key.startswith(_OPTION)]

    @property
    def options(self) -> list[str]:
        """Arguments for `main.py eval`, from the keys `eval.views` and the like."""
        options = [(key.removeprefix(_OPTION), value) for key, value in self.values if key.startswith(_OPTION)]
        return [word for name, value in options for word in (f"--{name.replace('_', '-')}", value)]


@dataclass(frozen=True)
class Sweep:
    """A sweep as the user requested it; `<folder>/sweep.json` stores it.

    Attributes:
        folder: `sweeps/NAME`, or NAME in another folder that the user named.
        verb: train: each trial is an experiment folder below `trials/`; eval: each is a result of its experiment.
        exps: experiment folders, absolute.
        grid: `key=a,b` texts.
        options: other arguments for main.py.
    """

    folder: Path
    verb: str
    exps: tuple[Path, ...]
    grid: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """NAME."""
        return self.folder.name

    def trials(self) -> list[Trial]:
        """Return all trials in the order of the command line; the last key varies fastest.

        Raises:
            UserError: a grid text that cannot be parsed.
        """
        columns = [parse(text) for text in self.grid]
        keys = [key for key, _ in columns]

        if len(set(keys)) < len(keys):
            raise UserError(f"--grid: {next(key for key in keys if keys.count(key) > 1)} is given twice")

        for name in (key.removeprefix(_OPTION) for key in keys if key.startswith(_OPTION)):
            if self.verb != "eval" or name not in _EVAL_OPTIONS:
                raise UserError(
                    f"--grid: {_OPTION}{name} is an option of --verb eval, which has "
                    f"{', '.join(_OPTION + option for option in _EVAL_OPTIONS)}"
                )

        return [
            Trial(_trial_name(exp, list(zip(keys, values, strict=True))), exp, tuple(zip(keys, values, strict=True)))
            for exp in self.exps
            for values in itertools.product(*(values for _, values in columns))
        ]

    def exp_of(self, trial: Trial) -> Path:
        """Return the experiment folder in which a trial's job works."""
        if self.verb != "train":
            return trial.source
        # A sweep that an earlier version began has its folders under the old name.
        old = next(name for name, new in renamed.FOLDERS.items() if new == TRIALS)
        return self.folder / (old if (self.folder / old).is_dir() else TRIALS) / trial.name

    def writes(self, trial: Trial) -> bool:
        """Return True if a trial gets a folder of its own with a config."""
        return self.verb == "train"

    def result_of(self, trial: Trial) -> Path:
        """Return the file with the summary of an evaluated trial."""
        return trial.source / "results" / f"{self.name}.{trial.name}.json"

    def argv(self, trial: Trial) -> list[str]:
        """Return the arguments that main.py gets for a trial."""
        # A training trial has its values in its own config.yaml; an evaluation gets them as overrides.
        if self.verb == "train":
            return ["train", str(self.exp_of(trial)), *self.options]
        sets = [word for override in trial.overrides for word in ("--set", override)]
        return ["eval", str(trial.source), *sets, *trial.options, "--name", self.result_of(trial).stem, *self.options]

    def commands(self, trial: Trial) -> list[list[str]]:
        """Return the arguments of each call of main.py for a trial, in order."""
        return [self.argv(trial)]

    @property
    def next_step(self) -> str:
        """The user's next command once all trials are done."""
        return f"`launch collect {self.name}` prints the table"

    def write(self) -> None:
        """Write `sweep.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"verb": self.verb, "exps": [str(exp) for exp in self.exps], "grid": self.grid, "options": self.options}
        files.write_text(self.folder / FILE, json.dumps(about, indent=2) + "\n")


def folder_of(name: str, into: Path = SWEEPS) -> Path:
    """Return the folder of the sweep of this name.

    Raises:
        UserError: the name has characters that are not allowed.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"NAME: {name!r} is not allowed here (up to 64 letters, digits, _ . -; not _ . - first)")
    return Path(os.path.abspath(into)) / name


def read(folder: Path) -> Sweep:
    """Read the sweep in a folder.

    Raises:
        UserError: there is none, or its file cannot be read.
    """
    try:
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        exps = tuple(Path(exp) for exp in about["exps"])
        return Sweep(folder, about["verb"], exps, tuple(about["grid"]), tuple(about["options"]))
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no such sweep; start it with --exp and --grid") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / FILE}: cannot be read ({error})") from error


def parse(text: str) -> tuple[str, list[str]]:
    """Split `common.lr_scheduler.base_lr=0.01,0.1` into ("lr_scheduler.base_lr", ["0.01", "0.1"]); [a, b] is one value.

    Raises:
        UserError: the text does not have this form.
    """
    key, equals, rest = text.partition("=")
    key = key.strip().removeprefix("common.")
    if not equals or not _KEY.fullmatch(key):
        raise UserError(
            f"--grid {text}: write it as key=value,value (PARTITION and N go before --grid, or after another option)"
        )

    # A comma separates values only outside of brackets and quotes.
    values, depth, quote = [""], 0, ""
    for sign in rest:
        quote = "" if sign == quote else sign if not quote and sign in "'\"" else quote
        depth += 0 if quote else _BRACKETS.get(sign, 0)
        if sign == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += sign

    values = [value.strip() for value in values]
    if "" in values or len(set(values)) < len(values):
        raise UserError(f"--grid {text}: a value is {'empty' if '' in values else 'given twice'}")
    return key, values


def make(sweep: Sweep, trial: Trial) -> Path:
    """Write the experiment folder of a training trial; its config names the values and where they come from.

    Raises:
        UserError: the trial was trained already, and its experiment has changed since.
    """
    folder = sweep.exp_of(trial)
    cfg = config.load(trial.source, trial.overrides)
    body = as_yaml(cfg).replace("  # --set", f"  # sweep {sweep.name}")

    origin = config.config_file(trial.source)
    head = [f"# Trial of the sweep {sweep.name}, made from {new.printable(origin)} with"]
    head += [f"#   common.{new.printable(text)}" for text in trial.overrides] or ["#   no changes"]
    text = "\n".join([*head, f"# The comments show where each value comes from ({origin.name}: that file).", body, ""])

    file = folder / "config.yaml"
    if file.is_file() and (folder / "log.txt").exists() and config.to_dict(config.load(folder)) != config.to_dict(cfg):
        raise UserError(
            f"{folder}: was trained with a different config than {origin} and --set give now; use a new NAME, or move "
            "the folder away"
        )

    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    # Read it back: a value that YAML reads in a different way would silently train something else.
    if config.to_dict(config.load(folder)) != config.to_dict(cfg):
        raise RuntimeError(f"{file} does not give the config that it was written from")
    new.write_scripts(folder)
    return folder


def _trial_name(exp: Path, values: Sequence[tuple[str, str]]) -> str:
    """Return a readable name, made unique by six digits of a hash over experiment and values."""
    # Relative to the repository: the same sweep has the same names in another checkout.
    place = str(exp.relative_to(ROOT)) if exp.is_relative_to(ROOT) else str(exp)
    digest = hashlib.sha256(json.dumps([place, values]).encode()).hexdigest()[:6]

    words = ["-".join(exp.parts[-2:]), *(f"{key.rpartition('.')[2]}={value}" for key, value in values)]
    readable = re.sub(r"[^A-Za-z0-9_.=+-]+", "_", "_".join(words)).strip("._-/")

    # Cut for file systems that allow 255 bytes; the hash keeps the name unique.
    return f"{readable[:80]}-{digest}"
