"""The other side of `recipe.py`: timm and torchvision, in a process that answers lines of JSON.

It imports none of our code.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import sys
from unittest import mock

import numpy as np
import torch

# torchvision's compiled part may be of another build of torch; its functions on tensors do not need it.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _schema in (
    "nms(Tensor dets, Tensor scores, float t) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float t) -> Tensor",
):
    with contextlib.suppress(RuntimeError):
        _LIBRARY.define(_schema)

from timm.data import auto_augment, random_erasing  # noqa: E402  # pyright: ignore[reportMissingImports]
from timm.data.mixup import Mixup, cutmix_bbox_and_lam  # noqa: E402  # pyright: ignore[reportMissingImports]


def policy(request: dict) -> dict:
    """Apply a policy to so many images, whose operations only record what they are asked to do."""
    random.seed(request["seed"])
    np.random.seed(request["seed"])
    transform = auto_augment.rand_augment_transform(request["text"], {"translate_pct": 0.45})
    drawn: dict[str, list[float]] = {op.name: [] for op in transform.ops}
    for op in transform.ops:
        op.aug_fn = lambda image, *arguments, _name=op.name, **_: (
            drawn[_name].append(float(arguments[0]) if arguments else 0.0) or image
        )
    for _ in range(request["images"]):
        transform(None)
    return drawn


def arguments(request: dict) -> dict:
    """Return operation -> arguments at each magnitude, as drawn with either direction."""
    transform = auto_augment.rand_augment_transform(request["text"], {"translate_pct": 0.45})
    values = {}
    for op in transform.ops:
        rows = []
        for magnitude in request["magnitudes"]:
            for draw in (0.25, 0.75):  # 0.75 is negated
                with mock.patch.object(random, "random", lambda draw=draw: draw):
                    level = op.level_fn(magnitude, op.hparams) if op.level_fn else (0.0,)
                rows.append(float(level[0]))
        values[op.name] = rows
    return values


def pixels(request: dict) -> dict:
    """Apply one of torchvision's functions on tensors to a file of frames."""
    functional = importlib.import_module("torchvision.transforms.functional")  # of this environment
    frames = torch.load(request["file"], weights_only=True)
    keywords = dict(request["keywords"])
    if keywords.pop("bilinear", False):
        keywords["interpolation"] = functional.InterpolationMode.BILINEAR
    torch.save(getattr(functional, request["name"])(frames, *request["arguments"], **keywords), request["file"])
    return {}


def mixes(request: dict) -> dict:
    """Draw how so many batches are mixed, and the box and lam of given draws."""
    np.random.seed(request["seed"])
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=400)
    drawn = [mixup._params_per_batch() for _ in range(request["batches"])]
    boxes = []
    for lam, y, x in request["given"]:
        with mock.patch.object(np.random, "randint", side_effect=[np.int64(y), np.int64(x)]):
            box, corrected = cutmix_bbox_and_lam((2, 3, request["side"], request["side"]), lam)
        boxes.append([*map(int, box), float(corrected)])
    return {"drawn": [[float(lam), bool(cut)] for lam, cut in drawn], "boxes": boxes}


def erasing(request: dict) -> dict:
    """Erase so many images of zeros; return y, x, h, w of each, and the mean and variance of the noise."""
    random.seed(request["seed"])
    torch.manual_seed(request["seed"])
    side, eraser = request["side"], random_erasing.RandomErasing(0.25, mode="pixel", device="cpu")
    boxes, values = [], []
    for _ in range(request["images"]):
        image = eraser(torch.zeros(1, side, side))[0]
        places = image.nonzero()
        if len(places):
            low, high = places.amin(0), places.amax(0) + 1
            boxes.append([*low.tolist(), *(high - low).tolist()])
            values.append(image[image != 0])
    noise = torch.cat(values)
    return {"boxes": boxes, "mean": noise.mean().item(), "variance": noise.var().item()}


DO = {function.__name__: function for function in (policy, arguments, pixels, mixes, erasing)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(DO[asked.pop("do")](asked)), flush=True)
