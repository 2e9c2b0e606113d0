"""The augmentations of video transformers beside timm and torchvision, and kills of a run with the whole recipe.

`$ZOETROPE_TIMM_PYTHON` names the interpreter of a virtual environment with timm, torchvision and our version of torch;
without it the rows that need it are not measured.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.reliability import soak
from tests.benchmarks.rows import run_rows
from tests.recipe import RECIPE

WORKER = Path(__file__).with_name("recipe_worker.py")
MISSING = {"measured": "not measured: $ZOETROPE_TIMM_PYTHON names no interpreter with timm", "holds": True}
TEXT = "rand-m7-n4-mstd0.5-inc1"
DRAWS, SIDE = 10_000, 112

# timm's names, with inc1, in our order.
NAMES = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY"),
    *("TranslateXRel", "TranslateYRel"),
)


class Worker:
    """A process of `recipe_worker.py`, in a folder of its own: our packages hide some of the same names."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [os.environ["ZOETROPE_TIMM_PYTHON"], str(WORKER)],
            cwd=self.folder.name,
            env=env | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **request: Any) -> Any:
        """Send a request and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{WORKER.name} left with {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def sigmas(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """Return the difference of two means in standard deviations of that difference."""
    spread = math.sqrt(np.var(one) / len(one) + np.var(other) / len(other))
    return abs(float(np.mean(one) - np.mean(other))) / spread if spread else 0.0


def share_sigmas(count: int, other: int, of: int, of_other: int) -> float:
    """Return the difference of two shares in standard deviations of that difference."""
    both = (count + other) / (of + of_other)
    return abs(count / of - other / of_other) / math.sqrt(both * (1 - both) * (1 / of + 1 / of_other))


def policy() -> dict:
    """Compare which operations are drawn, and their arguments: at 21 magnitudes exactly, and over 10,000 draws."""
    from datasets.plan.ops.randaugment import OPERATIONS, RandAugment
    from datasets.plan.order import uniforms
    from utils.config.kinds import rand_policy

    if not os.environ.get("ZOETROPE_TIMM_PYTHON"):
        return MISSING
    magnitudes = [step / 2 for step in range(21)]
    wrong, compared = [], 0
    with Worker() as theirs:
        for inc in (0, 1):
            their_arguments = theirs.ask("arguments", text=f"rand-n1-inc{inc}", magnitudes=magnitudes)
            for number, name in enumerate(NAMES if inc else [name.removesuffix("Increasing") for name in NAMES]):
                for index, expected in enumerate(their_arguments[name]):
                    ours = RandAugment(rand_policy(f"rand-m{magnitudes[index // 2]}-n1-inc{inc}"))
                    u = np.array([[(number + 0.5) / len(NAMES), 0.0, 0.5, (0.25, 0.75)[index % 2]]])
                    argument = ours.resolve(u, 100)[0, 0, 1] / (100 if "translate" in OPERATIONS[number] else 1)
                    compared += 1
                    wrong += [] if math.isclose(argument, expected, abs_tol=1e-12) else [f"{name} inc{inc} {index}"]
        drawn = theirs.ask("policy", text=TEXT, images=DRAWS, seed=0)
    op = RandAugment(rand_policy(TEXT))
    rows = op.resolve(np.concatenate([uniforms(0, 0, p, op.block, op.uniforms)[None] for p in range(DRAWS)]), 1)
    rows = rows.reshape(-1, 2)
    odds, means = {}, {}
    for number, name in enumerate(NAMES):
        ours = rows[rows[:, 0] == number, 1]
        odds[name] = share_sigmas(len(ours), len(drawn[name]), len(rows), 4 * DRAWS)
        means[name] = max(sigmas(ours, drawn[name]), sigmas(np.abs(ours - 1), np.abs(np.array(drawn[name]) - 1)))
    measured = {"arguments_compared": compared, "different": wrong}
    measured |= {"odds_sigmas": round(max(odds.values()), 2), "arguments_sigmas": round(max(means.values()), 2)}
    # 45 differences of independent draws: 3 sigma each would fail one run in nine.
    return {"measured": measured, "holds": not wrong and max(*odds.values(), *means.values()) <= 4}


def pixels() -> dict:
    """Compare every operation at drawn arguments with torchvision's function of the same parameters."""
    import torch

    from datasets.plan.ops.randaugment import OPERATIONS, RandAugment
    from utils.config.kinds import rand_policy
    from utils.ops import randaugment

    if not os.environ.get("ZOETROPE_TIMM_PYTHON"):
        return MISSING
    grey, ours = [128.0] * 3, RandAugment(rand_policy("rand-m7-n1-mstd3-inc1"))
    generator, compared, different = np.random.default_rng(0), 0, {}

    def call(name: str, argument: float, side: int) -> tuple[str, list, dict] | None:
        degrees, moved = math.degrees(math.atan(argument)), {"bilinear": True, "fill": grey}
        without_argument = {"autocontrast", "equalize", "invert"}
        adjusted = {name: f"adjust_{name}" for name in ("saturation", "contrast", "brightness", "sharpness")}
        if name in without_argument:
            return name, [], {}
        if name in adjusted:
            return adjusted[name], [argument], {}
        affine = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **moved}
        return {
            "rotate": ("rotate", [argument], moved),
            "posterize": ("posterize", [int(argument)], {}) if argument else None,
            "solarize": ("solarize", [argument], {}) if argument < 256 else None,
            "solarize_add": None,
            "shear_x": ("affine", [], affine | {"shear": [degrees, 0.0], "center": [0, 0]}),
            "shear_y": ("affine", [], affine | {"shear": [0.0, degrees], "center": [0, 0]}),
            "translate_x": ("affine", [], affine | {"translate": [-argument, 0]}),
            "translate_y": ("affine", [], affine | {"translate": [0, -argument]}),
        }[name]

    with Worker() as theirs:
        for number, name in enumerate(OPERATIONS):
            for case in range(20):
                side = (SIDE, 57)[case % 2]
                frames = torch.from_numpy(generator.integers(0, 256, (4, 3, side, side), np.uint8))
                frames = frames // (1 + case % 4) + 10 * (case % 3)
                u = np.array([[(number + 0.5) / len(OPERATIONS), 0.0, *generator.random(2)]])
                drawn = ours.resolve(u, side)
                asked = call(name, float(drawn[0, 0, 1]), side)
                if asked is None:
                    continue
                file = Path(theirs.folder.name) / "frames.pt"
                torch.save(frames, file)
                theirs.ask("pixels", file=str(file), name=asked[0], arguments=asked[1], keywords=asked[2])
                clips = frames.permute(0, 2, 3, 1)[None]
                augmented = randaugment.apply(clips, torch.from_numpy(drawn)[None], lambda _: torch.zeros(3))[0]
                unequal = (augmented.permute(0, 3, 1, 2) != torch.load(file, weights_only=True)).sum().item()
                compared += 1
                if unequal:
                    different[f"{name} {case}"] = unequal
    return {"measured": {"compared": compared, "different": different}, "holds": not different}


def mixes() -> dict:
    """Compare CutMix's boxes and lam with timm's for the same draws, and the odds of mixup and CutMix."""
    from utils import mixup

    if not os.environ.get("ZOETROPE_TIMM_PYTHON"):
        return MISSING
    ours = [mixup.draw(0, step, mix_up=0.8, cutmix=1.0, switch=0.5, side=SIDE) for step in range(DRAWS)]
    cuts = [mixup.draw(0, step, mix_up=None, cutmix=1.0, switch=0.5, side=SIDE) for step in range(500)]
    given = [(area, int(y * SIDE), int(x * SIDE)) for _, area, y, x in (mixup.cut(0, s, 1.0) for s in range(500))]
    with Worker() as theirs:
        their_draws = theirs.ask("mixes", seed=0, batches=DRAWS, given=given, side=SIDE)
    different = sum([*(mix.box or ()), mix.lam] != box for mix, box in zip(cuts, their_draws["boxes"], strict=True))
    cut = sum(is_cut for _, is_cut in their_draws["drawn"])
    lams = [mix.lam for mix in ours if mix.box is None], [lam for lam, is_cut in their_draws["drawn"] if not is_cut]
    apart = {
        "switch_sigmas": share_sigmas(sum(mix.box is not None for mix in ours), cut, DRAWS, DRAWS),
        "mixup_lam_sigmas": max(sigmas(*lams), sigmas(*(np.abs(np.array(lam) - 0.5) for lam in lams))),
    }
    measured = {"boxes_different_of_500": different} | {key: round(value, 2) for key, value in apart.items()}
    return {"measured": measured, "holds": not different and max(apart.values()) <= 3}


def erasing() -> dict:
    """Compare odds, areas and aspects of erased boxes with timm's mode "pixel"."""
    from datasets.plan.ops.random_erasing import PixelErasing
    from datasets.plan.order import uniforms

    if not os.environ.get("ZOETROPE_TIMM_PYTHON"):
        return MISSING
    op = PixelErasing((0.25, 0.02, 1 / 3, 0.3))
    rows = op.resolve(np.concatenate([uniforms(0, 0, p, op.block, op.uniforms)[None] for p in range(DRAWS)]), SIDE)
    with Worker() as theirs:
        their_draws = theirs.ask("erasing", seed=0, images=DRAWS, side=SIDE)
    ours, other = rows[rows[:, 2] > 0, :4], np.array(their_draws["boxes"])
    apart = {"odds": share_sigmas(len(ours), len(other), DRAWS, DRAWS)}
    for name, value in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: np.log(box[:, 2] / box[:, 3]),
        "y": lambda box: box[:, 0] / (SIDE - box[:, 2] + 1),
        "x": lambda box: box[:, 1] / (SIDE - box[:, 3] + 1),
    }.items():
        apart[name] = sigmas(value(ours), value(other))
    measured = {f"{name}_sigmas": round(value, 2) for name, value in apart.items()}
    return {"measured": measured, "holds": max(apart.values()) <= 3}


def kills() -> dict:
    """Kill runs with the whole recipe at 1, 2 and 3 ranks, 21 times, and compare every bit with undisturbed twins."""
    points = [
        ("step", "phase.forward/backward"),
        ("step", "phase.optimiser step"),
        ("checkpoint", "checkpoint.replace"),
    ]
    settings = RECIPE | {"save_minutes": 1e-9, "val_freq": 4, "lr_scheduler.max_iter": 8}
    plan = []
    for ranks in (1, 2, 3):
        for case in range(7):
            phase, point = points[case % 3]
            rank = 0 if phase == "checkpoint" else case % ranks
            event = {"phase": phase, "point": point, "rank": rank, "count": 2 + case % 4, "action": "kill"}
            more = {"workers": case % 2, "seed": case, "precision": ("fp32", "bf16", "fp64")[case % 3]}
            plan.append({"ranks": ranks, "settings": settings | more, "events": [event]})
    lines, summary = soak.run((1, 2, 3), plan=plan)
    equal = sum(line.get("equal", False) for line in lines)
    measured = {"runs": summary["runs"], "kills": summary["hits"], "equal": equal, "faults": summary["faults"]}
    return {"measured": measured, "holds": summary["hits"] >= 20 and equal == len(plan) and not summary["faults"]}


ROWS = {
    "recipe_policy": ("RandAugment beside timm: arguments; odds of 10,000 draws", "equal; within sampling", policy),
    "recipe_pixels": ("RandAugment's pixels beside torchvision's functions on tensors", "equal", pixels),
    "recipe_mixes": ("CutMix boxes and lam beside timm's; odds of the switch", "equal; within 3 sigma", mixes),
    "recipe_erasing": ("erasing by noise beside timm: odds, areas, aspects", "within 3 sigma", erasing),
    "recipe_kills": ("21 kills with the whole recipe on, 1, 2 and 3 ranks", "bits equal", kills),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
