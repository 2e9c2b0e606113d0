"""The options of `main.py train`: the launcher checks them before a start, main.py reads them in every rank."""

from __future__ import annotations

import argparse
from pathlib import Path


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb train."""
    parser = argparse.ArgumentParser(
        prog="main.py train", description="train an experiment folder, or continue it (what train.sh runs)"
    )
    parser.add_argument("exp", type=Path, help="experiment folder, holds config.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for this run")
    parser.add_argument("--fresh", action="store_true", help="move an earlier run to old/ and start again")
    return parser
