"""`main.py import` on the configs of MMAction2 1.2.0 and PySlowFast, beside what MMAction2 itself builds of them.

`$ZOETROPE_MMACTION_PYTHON` names the interpreter of a virtual environment with mmaction2 1.2.0;
`$ZOETROPE_PYSLOWFAST_CONFIGS` names a folder of PySlowFast's `configs/Kinetics`, `$ZOETROPE_MMACTION0_CONFIGS` one of
mmaction2 0.24.1's `configs/recognition`. Rows that need what is missing are not
measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.rows import run_rows

WORKER = Path(__file__).with_name("mmaction_worker.py")
PYTHON = os.environ.get("ZOETROPE_MMACTION_PYTHON", "")
PYSLOWFAST = os.environ.get("ZOETROPE_PYSLOWFAST_CONFIGS", "")
MMACTION0 = os.environ.get("ZOETROPE_MMACTION0_CONFIGS", "")
NO_MMACTION = {"measured": "not measured: $ZOETROPE_MMACTION_PYTHON names no interpreter with mmaction2", "holds": True}
NO_PYSLOWFAST = {"measured": "not measured: $ZOETROPE_PYSLOWFAST_CONFIGS names no folder", "holds": True}

FAMILIES = ("tsn", "tsm", "slowonly", "slowfast", "tpn", "videomae", "videomaev2")
COMPARED = (
    "tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb",
    "tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x16-50e_sthv2-rgb",
    "tsn/tsn_imagenet-pretrained-r50_8xb32-dense-1x1x5-100e_kinetics400-rgb",
    "tsm/tsm_imagenet-pretrained-r50_8xb16-1x1x8-50e_kinetics400-rgb",
    "tsm/tsm_imagenet-pretrained-r50-nl-gaussian_8xb16-1x1x8-50e_kinetics400-rgb",
    "tsm/tsm_imagenet-pretrained-mobilenetv2_8xb16-1x1x8-100e_kinetics400-rgb",
    "tsm/tsm_imagenet-pretrained-r101_8xb16-1x1x8-50e_sthv2-rgb",
    "slowonly/slowonly_r50_8xb16-4x16x1-256e_kinetics400-rgb",
    "slowonly/slowonly_imagenet-pretrained-r50_16xb16-8x8x1-steplr-150e_kinetics700-rgb",
    "slowonly/slowonly_r50-in1k-pre-nl-embedded-gaussian_8xb16-8x8x1-steplr-150e_kinetics400-rgb",
    "slowfast/slowfast_r101-r50_32xb8-4x16x1-256e_kinetics400-rgb",
    "slowfast/slowfast_r50_8xb8-8x8x1-steplr-256e_kinetics400-rgb",
    "tpn/tpn-slowonly_r50_8xb8-8x8x1-150e_kinetics400-rgb",
    "tpn/tpn-tsm_imagenet-pretrained-r50_8xb8-1x1x8-150e_sthv1-rgb",
)
LENGTHS = (*range(1, 90), 120, 150, 233, 300, 301, 1000)
FRAMES = ((340, 256), (256, 340), (320, 240), (455, 256))
EPOCH = 20  # iterations


class Peer:
    """MMAction2 in its own process."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.folder = Path(str(self.ask("where")))

    def ask(self, what: str, **request: object) -> Any:  # what JSON holds
        """Return the answer to a request."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"do": what, **request}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{what} {request.get('file')}: the peer has ended")
        return json.loads(line)


@contextlib.contextmanager
def peer() -> Iterator[Peer]:
    """Start MMAction2 in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [PYTHON, str(WORKER)]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            argv,
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            try:
                yield Peer(process)
            finally:
                assert process.stdin
                process.stdin.close()


def parsed() -> dict:
    """Every config of the package through our parser and through mmengine."""
    if not PYTHON:
        return NO_MMACTION
    from anal_tools.import_config import python_file
    from utils.errors import UserError

    different, refused, same = [], [], 0
    with peer() as theirs:
        for file in sorted(theirs.folder.rglob("*.py")):
            name = str(file.relative_to(theirs.folder))
            try:
                ours = _as_json(python_file.read(file))
            except UserError as error:
                refused.append(str(error).replace(f"{theirs.folder}/", ""))
                continue
            if ours == _as_json(theirs.ask("values", file=str(file))):
                same += 1
            else:
                different.append(name)
    measured = {"same": same, "different": different, "refused": refused}
    return {"measured": measured, "holds": not different and not refused and same > 200}


def _as_json(value: object) -> object:
    """Return a value as JSON has it, without `_delete_`, which mmengine leaves where it had nothing to replace."""
    if isinstance(value, dict):
        return {str(key): _as_json(inner) for key, inner in value.items() if key != "_delete_"}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def converted(folder: Path, files: list[Path]) -> dict:
    """Convert files; say why of those that are refused, and what has no counterpart."""
    from anal_tools.import_config import verb
    from anal_tools.import_config.draft import NOT
    from utils.errors import UserError

    refused, unknown = {}, {}
    for file in files:
        name = str(file.relative_to(folder))
        try:
            draft = verb.convert(file)
        except UserError as error:
            refused[name] = str(error).replace(f"{file}: ", "")
            continue
        left = [row.theirs for row in draft.rows if row.kind == NOT and "none is known" in row.note]
        if left:
            unknown[name] = left
    share = 1 - len(refused) / max(len(files), 1)
    return {"files": len(files), "share": round(share, 4), "refused": refused, "without_counterpart": unknown}


def mmaction_converts() -> dict:
    """All RGB configs of the named families."""
    if not PYTHON:
        return NO_MMACTION
    with peer() as theirs:
        folder = theirs.folder / "recognition"
    files = sorted(file for family in FAMILIES for file in (folder / family).rglob("*.py") if "flow" not in file.name)
    figures = converted(folder, files)
    return {"measured": figures, "holds": figures["share"] >= 0.95 and len(files) >= 40}


def pyslowfast_converts() -> dict:
    """PySlowFast's Kinetics configs of SlowFast and Slow."""
    if not PYSLOWFAST:
        return NO_PYSLOWFAST
    folder = Path(PYSLOWFAST)
    files = sorted(file for file in folder.rglob("*.yaml") if file.name.startswith(("SLOWFAST", "SLOW_", "SLOWONLY")))
    figures = converted(folder, files)
    return {"measured": figures, "holds": figures["share"] >= 0.9 and len(files) >= 20}


def mmaction0_converts() -> dict:
    """The RGB configs of mmaction2 0.24.1."""
    if not MMACTION0:
        return {"measured": "not measured: $ZOETROPE_MMACTION0_CONFIGS names no folder", "holds": True}
    folder = Path(MMACTION0)
    files = sorted(file for family in FAMILIES for file in (folder / family).rglob("*.py") if "flow" not in file.name)
    figures = converted(folder, files)
    return {"measured": figures, "holds": figures["share"] >= 0.9 and len(files) >= 100}


# ------------------------------------------------------------------------------------------------ what MMAction2 builds


def same_as_built() -> dict:
    """Frames, crops, rates and parameter groups of the experiments beside those that MMAction2 builds."""
    if not PYTHON:
        return NO_MMACTION
    from anal_tools.import_config import verb
    from utils import config

    differences = {}
    with peer() as theirs, tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(COMPARED):
            file = theirs.folder / "recognition" / f"{name}.py"
            exp = verb.write(Path(folder) / str(number), file, verb.convert(file), [])
            cfg = config.load(exp)
            differences[name] = {
                "frames": _frames(theirs, file, cfg),
                "boxes": _boxes(theirs, file, cfg),
                "rates": _rates(theirs, file, cfg),
                "groups": _groups(theirs, file, cfg),
            }
    one_iteration = 1 / (34 * EPOCH)  # of the longest warm-up that moves with every iteration
    limits = {"frames": 0, "boxes": 0, "rates": one_iteration, "groups": 0}
    wrong = [
        f"{name}: {what}"
        for name, one in differences.items()
        for what, most in limits.items()
        if not one[what]["differ"] <= most
    ]
    return {"measured": {"configs": len(differences), "different": wrong, "found": differences}, "holds": not wrong}


def _frames(theirs: Peer, file: Path, cfg) -> dict:  # noqa: ANN001
    from datasets.plan import sampling

    plan = sampling.sampling_of(cfg)
    draws = np.random.default_rng(0)
    videos = [(n, draws.random(plan.num_segments).tolist()) for n in LENGTHS]
    differ = 0
    for (n, u), frames in zip(videos, theirs.ask("frames", file=str(file), part="train", videos=videos), strict=True):
        differ += sampling.train_frames(plan, n, 30.0, np.array(u)).tolist() != frames
    dense = cfg.data.sampling == "tsm_dense"  # validates on ten clips there
    tested = [] if dense else theirs.ask("frames", file=str(file), part="val", videos=[(n, []) for n in LENGTHS])
    for n, frames in zip(LENGTHS, tested, strict=False):
        differ += sampling.test_frames(plan, n, 30.0)[0].tolist() != frames
    return {"clips": len(videos) + len(tested), "differ": differ}


def _boxes(theirs: Peer, file: Path, cfg) -> dict:  # noqa: ANN001
    from datasets.plan import crops
    from datasets.plan.train import TRAIN_CROPS, train_spec

    spec, draws, differ, asked, ours = train_spec(cfg), np.random.default_rng(1), 0, [], []
    for width, height in FRAMES:
        for _ in range(60):
            u = draws.random(crops.RANDOM_RESIZED_UNIFORMS).tolist()
            ours.append(list(TRAIN_CROPS[spec.crop](width, height, u, spec)))
            # They draw aspects before areas.
            asked.append((width, height, [*u[10:20], *u[:10], *u[20:]] if spec.crop == "random_resized" else u))
    for mine, box in zip(ours, theirs.ask("boxes", file=str(file), part="train", videos=asked), strict=True):
        differ += mine != box[0]
    sizes = [crops.mmaction2_rescale(w, h, cfg.augmentation.test_resize) for w, h in FRAMES]
    for (w, h), box in zip(
        sizes, theirs.ask("boxes", file=str(file), part="val", videos=[(*s, []) for s in sizes]), strict=True
    ):
        differ += list(crops.mmaction2_center(w, h, cfg.augmentation.input_size)) != box[0]
    return {"boxes": len(asked) + len(sizes), "differ": differ}


def _rates(theirs: Peer, file: Path, cfg) -> dict:  # noqa: ANN001
    from types import SimpleNamespace

    from utils.config import resolve_lengths
    from utils.engine.run import TrainingRun

    batch = cfg.batch_size * (cfg.shards or 1)
    resolved = resolve_lengths(cfg, EPOCH * batch, batch)
    steps = resolved.lr_scheduler.max_iter or 0
    run = SimpleNamespace(
        cfg=resolved,
        train_records=range(EPOCH * batch),
        learner=SimpleNamespace(shards=SimpleNamespace(global_batch=batch)),
        last=steps,
    )
    ours = np.array([TrainingRun.lr_at(run, step) for step in range(steps)])  # pyright: ignore[reportArgumentType]
    built = np.array(theirs.ask("rates", file=str(file), epoch=EPOCH))
    if len(built) != steps:
        return {"steps": [steps, len(built)], "differ": float("inf")}
    return {"steps": steps, "differ": float(np.max(np.abs(ours - built) / built))}


def _groups(theirs: Peer, file: Path, cfg) -> dict:  # noqa: ANN001
    import methods
    from utils import optim
    from utils.engine.network import model_arguments

    model = methods.build(**model_arguments(cfg, pretrained=False))
    schedule = cfg.lr_scheduler
    rate = schedule.warmup_lr or schedule.base_lr
    built = optim.build(
        model,
        lr=rate,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
        nesterov=cfg.nesterov,
        no_wd=cfg.no_wd,
        policy=cfg.policy,
    )
    ours: dict[str, int] = {}
    for group in built.param_groups:
        name = f"{group['lr']:.9g} {group['weight_decay']:.9g}"
        ours[name] = ours.get(name, 0) + sum(parameter.numel() for parameter in group["params"])
    their_groups = theirs.ask("groups", file=str(file))
    return {
        "groups": ours,
        "differ": 0 if ours == their_groups else 1,
        **({} if ours == their_groups else {"theirs": their_groups}),
    }


ROWS = {
    "parsed": ("all configs of mmaction2 1.2.0, our parser and mmengine's", "the same values", parsed),
    "mmaction_converts": (
        "mmaction2 1.2.0: tsn, tsm, slowonly, slowfast, tpn, videomae on RGB video",
        ">= 95 % convert, the rest by key",
        mmaction_converts,
    ),
    "same_as_built": (
        "frames, crops, rates, parameter groups beside what mmaction2 builds",
        "equal; rates to one iteration of a warm-up",
        same_as_built,
    ),
    "mmaction0_converts": (
        "mmaction2 0.24.1: the same families",
        ">= 90 % convert, the rest by key",
        mmaction0_converts,
    ),
    "pyslowfast_converts": (
        "PySlowFast's Kinetics configs of SlowFast and Slow",
        ">= 90 % convert",
        pyslowfast_converts,
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
