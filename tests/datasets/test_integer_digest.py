"""Orders, plans and views are integers: one digest over a grid of settings, equal on every machine and after any move.

Unlike a hash of weights this digest does not depend on the machine, so it can be stored. It changes only when what is
trained on or evaluated changes. To write it again: `python -m tests.datasets.test_integer_digest`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from datasets.plan import order, sampling, views
from datasets.plan import train as plan
from datasets.plan.metadata import VideoMetadata
from datasets.plan.sampling import Sampling
from tests.datasets.specs import train_spec
from utils import mixup

DIGESTS = Path(__file__).resolve().parents[1] / "data" / "integer_digests.json"
VIDEOS = [
    VideoMetadata(n, h, w, fps)
    for n, (h, w), fps in itertools.product((1, 7, 16, 300), ((64, 64), (240, 427)), (25.0,))
]
POSITIONS = (0, 1, 47, 10_000_019)
TRANSFORMERS = ("videomae", "vjepa2")  # newer than the digests of the others
CONVOLUTIONAL = tuple(preset for preset in sampling.PRESETS if preset not in TRANSFORMERS)
SAMPLINGS = {
    "num_segments": {"num_segments": 8},
    "clip": {"num_segments": 1, "clip_len": 8, "frame_interval": 4},
}


class Digest:
    """A sha256 over integers, in the order in which they are added."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def add(self, *values: Any) -> None:
        """Add integers, arrays of integers, booleans or texts."""
        for value in values:
            if isinstance(value, str):
                self.sha.update(value.encode())
            else:
                array = np.asarray(value)
                assert array.dtype.kind in "iub", f"{array.dtype} depends on the machine"
                self.sha.update(f"{array.shape}".encode() + array.astype("<i8").tobytes())


def samplings(*, presets: tuple[str, ...] = CONVOLUTIONAL) -> list[Sampling]:
    """Return presets with both kinds of numbers, where they take them."""
    all_samplings = []
    for preset, numbers in itertools.product(presets, SAMPLINGS.values()):
        try:
            all_samplings.append(Sampling(preset, **numbers))
        except sampling.UserError:
            continue
    return all_samplings


class Members:
    """A list of 23 videos in three classes."""

    def __len__(self) -> int:
        return 23

    def members(self) -> list[np.ndarray]:
        return [np.arange(0, 5), np.arange(5, 6), np.arange(6, 23)]


MEMBERS: Any = Members()


def orders() -> str:
    """Digest the shuffled and the class-balanced order."""
    digest = Digest()
    for kind, seed in itertools.product(("shuffled", "class_balanced"), (0, 1, 2**40 + 7)):
        at = order.Order(kind, seed, MEMBERS)
        digest.add(kind, [at(position).sample for position in (*range(60), 10_000_019)])
    return digest.sha.hexdigest()


def training_plans() -> str:
    """Digest frames, boxes, flips and erased boxes of training clips."""
    digest = Digest()
    for rule, crop in itertools.product(samplings(), plan.TRAIN_CROPS):
        spec = train_spec(
            rule, 56, crop, random_erasing=(0.5, 0.02, 0.4, 0.3), random_erasing_per_frame=rule.num_segments > 1
        )
        for position, metadata in itertools.product(POSITIONS, VIDEOS):
            clip_plan = plan.resolve(plan.draw(3, position // 23, position, spec), metadata, spec, 5)
            digest.add(
                clip_plan.frames,
                clip_plan.box,
                clip_plan.size,
                clip_plan.ops["flip"][0, 0],
                clip_plan.ops["random_erasing"],
            )
    return digest.sha.hexdigest()


def evaluation_plans() -> str:
    """Digest frames, boxes and flips of all views."""
    digest = Digest()
    known = [crops for crops in views.EVAL_CROPS if crops != "three_vjepa2"]  # newer than this digest
    for rule, crops, clips in itertools.product(samplings(), known, (1, 3)):
        try:
            spec = views.EvalSpec(
                rule, clips, crops, scale=64, crop_size=64 if views.EVAL_CROPS[crops].whole_side else 56
            )
        except views.UserError:
            continue
        for metadata in VIDEOS:
            view_plan = views.resolve_eval(metadata, spec, 2)
            digest.add(view_plan.frames, view_plan.size, view_plan.clip_rows, view_plan.boxes, view_plan.flips)
    return digest.sha.hexdigest()


def recipe_plans() -> str:
    """Digest what video transformers add: views of a turn, operations of RandAugment, boxes of noise and of CutMix."""
    digest = Digest()
    spec = train_spec(
        Sampling("pyslowfast", 1, 4, 4),
        56,
        "random_resized",
        randaugment="rand-m7-n4-mstd0.5-inc1",
        random_erasing=(0.25, 0.02, 0.333, 0.3),
        random_erasing_mode="pixel",
    )
    at = order.Order("shuffled", 3, MEMBERS, batch_size=8, num_sample=2)
    for position in (*range(40), 10_000_019):
        shown = at(position)
        turn, view = shown.first // 8 * 4 + shown.first % 8, (position - shown.first) // 4
        clip_plan = plan.resolve(plan.draw(3, shown.epoch, position, spec, frames_of=shown.first), VIDEOS[-1], spec, 5)
        operations = clip_plan.ops["randaugment"][..., 0].astype(int)
        digest.add([turn, view], clip_plan.frames, clip_plan.box, operations)
        digest.add(clip_plan.ops["random_erasing"])
    for rule, metadata, seed in itertools.product(samplings(presets=TRANSFORMERS), VIDEOS, (0, 1)):
        drawn = order.uniforms(seed, 0, 7, plan.TEMPORAL, rule.num_segments)
        digest.add(sampling.train_frames(rule, metadata.frames, metadata.fps, drawn))
        digest.add(*(sampling.test_frames(rule, metadata.frames, metadata.fps, clips) for clips in (1, 2, 5)))
    digest.add(*(views.EVAL_CROPS["three_vjepa2"].boxes(w, h, 56) for w, h in ((99, 56), (56, 100), (56, 56))))
    for step in range(40):
        mix = mixup.draw(3, step, mix_up=0.8, cutmix=1.0, switch=0.5, side=56)
        digest.add(mix.box or (0, 0, 0, 0))
    return digest.sha.hexdigest()


def digests() -> dict[str, str]:
    """Return all digests by name."""
    return {function.__name__: function() for function in (orders, training_plans, evaluation_plans, recipe_plans)}


def test_integers_are_those_of_the_file() -> None:
    assert digests() == json.loads(DIGESTS.read_text())


def test_the_digest_sees_one_other_integer() -> None:
    one, other = Digest(), Digest()
    one.add([1, 2, 3])
    other.add([1, 2, 4])
    assert one.sha.hexdigest() != other.sha.hexdigest()


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(digests(), indent=4) + "\n")
