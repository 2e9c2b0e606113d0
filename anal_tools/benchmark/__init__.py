"""`python main.py benchmark step|eval|data EXP`: how fast an experiment's parts are on this machine."""

from __future__ import annotations

import importlib

from utils import errors
from utils.errors import UserError

# {kind: (module whose main(argv) measures it, one line of help)}; a module is imported only when it is called
KINDS = {
    "step": ("anal_tools.benchmark.step", "one training step: forward, backward, optimiser, memory"),
    "eval": ("anal_tools.benchmark.eval", "videos per second of an evaluation, model alone and end to end, memory"),
    "data": ("anal_tools.benchmark.data", "clips per second of the readers"),
}


def main(argv: list[str]) -> int:
    """Run the benchmark that the first argument names and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python main.py benchmark KIND EXP ...   (KIND --help shows its options)\n")
        print("\n".join(f"  {kind:<6}{text}" for kind, (_, text) in KINDS.items()))
        return 0

    if argv[0] not in KINDS:
        raise UserError(
            f"no benchmark called {argv[0]!r}{errors.did_you_mean(argv[0], KINDS)}; choose one of {', '.join(KINDS)}"
        )

    return importlib.import_module(KINDS[argv[0]][0]).main(argv[1:])
