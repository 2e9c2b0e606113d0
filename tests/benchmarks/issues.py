"""The rows of each table of figures by the number of the issue that promised them: `make accept ISSUE=01 ROWS=a,b`.

Each row also runs alone: `python -m tests.benchmarks.TOPIC.NAME --rows a,b`.
"""

from __future__ import annotations

import functools
import importlib
import sys

from tests.benchmarks.reliability.claims import CLAIMS
from tests.benchmarks.rows import Row, run_rows

# issue: {row: the module below tests/benchmarks whose ROWS hold it}
ISSUES: dict[str, dict[str, str]] = {
    "01": {
        "demo": "training.accuracy",
        "people": "training.accuracy",
        "kill": "training.exactness",
        "ranks": "training.exactness",
        "sync_bn": "training.exactness",
        "validation": "training.exactness",
        "same_clip": "training.exactness",
        "overhead": "training.loop_overhead",
        "published_config": "training.config",
        "config_errors": "training.config",
    },
    "02": {
        "elastic": "cluster.ranks",
        "hang": "cluster.ranks",
        "sweep": "cluster.ranks",
        "stop_overhead": "training.stop_overhead",
        "clone": "cluster.slurm",
        "events": "cluster.slurm",
        "eval": "cluster.slurm",
        "shape": "cluster.slurm",
        "hostile": "cluster.slurm",
    },
    "03": {
        "figures": "methods.figures",
        "weizmann": "methods.learning",
        "golden": "methods.by_tests",
        "order": "methods.learning",
        "operators": "methods.by_tests",
        "teacher": "methods.learning",
        "toy": "methods.by_tests",
        "experiments": "methods.by_tests",
    },
    "04": {
        "golden": "analysis.golden",
        "exact": "analysis.evaluation",
        "bench_dense": "analysis.evaluation",
        "kill": "analysis.evaluation",
        "metrics": "analysis.evaluation",
        "rescoring": "analysis.evaluation",
        "report": "analysis.report",
        "report_real": "analysis.report",
        "hostile": "analysis.report",
    },
    "05": {
        "conformance": "data.speed",
        "jpeg": "data.speed",
        "mp4": "data.speed",
        "clips": "data.speed",
        "dump": "data.dump",
        "dump_kill": "data.dump",
        "chaos": "data.memcached",
        "epoch2": "data.memcached",
        "memory": "data.memory",
        "odd": "data.odd_files",
        "gpu": "data.dali",
    },
    "06": {
        "parity": "interop.weights",
        "hostile": "interop.weights",
        "predict_export": "interop.weights",
        "step": "training.step",
        "gpu_step": "training.step",
    },
    "07": {name: f"reliability.{name}" for name in CLAIMS},
    "10": {
        "vit_sizes": "methods.vit",
        "vit_logits": "methods.vit",
        "vit_published": "methods.vit",
        "vit_cpu": "methods.vit",
        "vit_memory": "methods.vit",
        "probe_heads": "methods.probe_heads",
        "hf_round_trip": "methods.hf_folders",
        "hf_originals": "methods.hf_folders",
        "hf_mutants": "methods.hf_folders",
        "recipe_policy": "methods.recipe",
        "recipe_pixels": "methods.recipe",
        "recipe_mixes": "methods.recipe",
        "recipe_erasing": "methods.recipe",
        "recipe_kills": "methods.recipe",
        "recipe_overhead": "training.loop_overhead",
        "transformer": "methods.learning",
    },
    "11": {
        "start_weizmann4": "analysis.start",
        "start_ut_interaction2": "analysis.start",
        "start_ucf_sports": "analysis.start",
        "start_shapes": "analysis.start",
        "folds": "analysis.start",
        "cam_finite_difference": "analysis.cam",
        "cam_motion8": "analysis.cam",
        "report_chromium": "analysis.cam",
        "parsed": "interop.foreign_configs",
        "mmaction_converts": "interop.foreign_configs",
        "same_as_built": "interop.foreign_configs",
        "mmaction0_converts": "interop.foreign_configs",
        "pyslowfast_converts": "interop.foreign_configs",
        "wandb": "training.loggers",
        "mlflow": "training.loggers",
        "dead": "training.loggers",
        "silent": "training.loggers",
        "full": "training.loggers",
    },
    "12": {
        "ridge": "analysis.results",
        "page": "analysis.results",
        "peer_accuracy": "peers.side_by_side",
        "peer_epoch_cpu": "peers.side_by_side",
        "peer_memory": "peers.side_by_side",
        "epoch_over_bare": "training.epoch_cost",
        "same_accuracy": "training.same_accuracy",
    },
}


def rows_of(issue: str) -> dict[str, tuple[str, str, Row]]:
    """Return the rows of an issue; a module is imported when its row is measured."""
    return {
        row: (*claim_of(module, row), functools.partial(measure, module, row)) for row, module in ISSUES[issue].items()
    }


def claim_of(module: str, row: str) -> tuple[str, str]:
    """Return (claim, figure) of a row."""
    return CLAIMS[row] if module.startswith("reliability.") else loaded(module).ROWS[row][:2]


def measure(module: str, row: str) -> dict:
    """Measure one row."""
    return loaded(module).row() if module.startswith("reliability.") else loaded(module).ROWS[row][2]()


def loaded(module: str):  # noqa: ANN201
    """Import a module of measurements."""
    return importlib.import_module(f"tests.benchmarks.{module}")


def main() -> int:
    """Measure the chosen rows of one issue."""
    issue = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if issue not in ISSUES:
        sys.exit(f"error: no rows for issue {issue!r}; there are {', '.join(ISSUES)}")
    return run_rows(rows_of(issue), issue=issue)


if __name__ == "__main__":
    sys.exit(main())
