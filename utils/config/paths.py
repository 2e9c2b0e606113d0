"""Files that a config names: resolve relative paths, and check that the files exist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.config.schema import Config
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO_DATA = ROOT / "data" / "motion8"
PATH_KEYS = ("train_root", "train_source", "val_root", "val_source")
CLASS_FILE = "classInd.txt"


def resolve(path: str, folder: Path) -> Path:
    """Resolve a path: a relative one is in the repository if it exists there, else next to the config.

    If neither exists, return the path in the repository, which the error message then names.
    """
    written = Path(path).expanduser()
    if written.is_absolute():
        return written
    beside = folder.resolve() / written
    return beside if beside.exists() and not (ROOT / written).exists() else ROOT / written


def check_files(cfg: Config, splits: Sequence[str] = ("train", "val")) -> None:
    """Check that every file and folder that the config names exists. Not part of `load`: any machine reads a config.

    Args:
        cfg: the config.
        splits: the splits whose list and root are needed; an evaluation needs no training list.

    Raises:
        UserError: all files that are missing, one per line, `file:line: common.x: ...`.
    """
    problems = []
    # Lists and roots
    for key in (f"{split}_source" for split in splits):
        if not Path(getattr(cfg, key)).is_file():
            problems.append(f"{_where(cfg, key)}there is no list file {getattr(cfg, key)}")
    for key in (f"{split}_root" for split in splits):
        if not Path(getattr(cfg, key)).is_dir():
            problems.append(f"{_where(cfg, key)}there is no folder {getattr(cfg, key)}")

    # Files that only some configs name
    others = [("data.class_names", cfg.data.class_names), ("data.metadata", cfg.data.metadata)]
    if "train" in splits:
        others += [("model.pretrained", cfg.model.pretrained), ("distill.teacher", cfg.distill.teacher)]
    for key, path in others:
        if isinstance(path, str) and not Path(path).exists():
            problems.append(f"{_where(cfg, key)}there is no {path}")

    if problems:
        if any(str(DEMO_DATA) in problem for problem in problems):
            problems.append("`python main.py demo-data` makes the demo's data")
        raise UserError("\n".join(problems))


def class_names_file(cfg: Config) -> Path | None:
    """Return `data.class_names`, else classInd.txt next to the training list, else None: classes are then numbered."""
    if cfg.data.class_names is not None:
        return Path(cfg.data.class_names)
    beside = Path(cfg.train_source).parent / CLASS_FILE
    return beside if beside.is_file() else None


def _where(cfg: Config, key: str) -> str:
    origin = cfg.origin(key)
    return f"{origin}: common.{key}: " if origin != "default" else f"common.{key}: "
