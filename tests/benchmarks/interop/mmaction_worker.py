"""The other side of `foreign_configs.py`: MMAction2 1.2.0 in a process of its own, answering lines of JSON.

It imports none of our code, and runs in a folder of its own, for our `datasets` and `utils` hide packages of these
names. Where MMAction2 draws random numbers, `Uniforms` gives it the uniforms of the request in the same form, so that
both sides can be compared box by box; all arithmetic on them is MMAction2's.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import warnings
from pathlib import Path

import numpy as np

warnings.filterwarnings("ignore")


class Uniforms:
    """Takes the place of `random` and `numpy.random` while a transform runs."""

    def __init__(self, values: list[float]) -> None:
        self.values = list(values)

    def take(self, size: int | None) -> np.ndarray | float:
        if size is None:
            return self.values.pop(0)
        taken, self.values = self.values[:size], self.values[size:]
        return np.array(taken)

    def np_randint(self, low: int, high: int | None = None, size: int | tuple | None = None) -> np.ndarray | int:
        low, high = (0, low) if high is None else (low, high)
        count = size[0] if isinstance(size, tuple) else size
        drawn = self.take(count)
        return np.minimum(np.floor(drawn * (high - low)), high - low - 1).astype(np.int64) + int(low)

    def np_uniform(self, low: float, high: float, size: int | None = None) -> np.ndarray | float:
        return low + self.take(size) * (high - low)

    def choice(self, options: list) -> object:
        return options[min(int(self.take(None) * len(options)), len(options) - 1)]

    def randint(self, low: int, high: int) -> int:
        return low + min(int(self.take(None) * (high - low + 1)), high - low)

    @contextlib.contextmanager
    def given(self):  # noqa: ANN201
        old = np.random.randint, np.random.uniform, random.choice, random.randint
        np.random.randint, np.random.uniform = self.np_randint, self.np_uniform
        random.choice, random.randint = self.choice, self.randint
        try:
            yield
        finally:
            np.random.randint, np.random.uniform, random.choice, random.randint = old


def as_json(value: object) -> object:
    """Return a value as JSON has it."""
    if isinstance(value, dict):
        return {str(key): as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def config(file: str):  # noqa: ANN201
    from mmengine.config import Config

    return Config.fromfile(file)


def where(request: dict) -> object:
    """Return the folder of the package's configs."""
    import mmaction

    return str(Path(mmaction.__file__).parent / ".mim" / "configs")


def values(request: dict) -> object:
    """Return what mmengine reads from a file."""
    return as_json(config(request["file"]).to_dict())


def _steps(request: dict) -> list[dict]:
    loaded = config(request["file"])
    return loaded[f"{request['part']}_dataloader"]["dataset"]["pipeline"]


def frames(request: dict) -> object:
    """Return the frames of clips: one for each (number of frames, uniforms)."""
    from mmaction.registry import TRANSFORMS

    step = TRANSFORMS.build(next(step for step in _steps(request) if step["type"].endswith("SampleFrames")))
    clips = []
    for count, uniforms in request["videos"]:
        with Uniforms(uniforms).given():
            result = step.transform({"total_frames": count, "start_index": 0, "avg_fps": 30})
        clips.append(np.asarray(result["frame_inds"]).reshape(-1).tolist())
    return clips


def boxes(request: dict) -> object:
    """Return the boxes of a crop: one list for each (width, height, uniforms)."""
    from mmaction.registry import TRANSFORMS

    names = ("MultiScaleCrop", "RandomResizedCrop", "CenterCrop", "ThreeCrop")
    step = TRANSFORMS.build(next(step for step in _steps(request) if step["type"] in names))
    boxes_of = []
    for width, height, uniforms in request["videos"]:
        image = np.zeros((height, width, 3), np.uint8)
        with Uniforms(uniforms).given():
            result = step.transform({"imgs": [image], "img_shape": (height, width), "modality": "RGB"})
        boxes_of.append(np.asarray(result["crop_bbox"]).reshape(-1, 4).tolist())
    return boxes_of


def rates(request: dict) -> object:
    """Return the learning rate of every iteration, by the schedulers and the hook's order of mmengine."""
    import torch
    from mmengine.registry import PARAM_SCHEDULERS

    loaded, length = config(request["file"]), request["epoch"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=loaded.optim_wrapper.optimizer.lr)
    schedulers = []
    for one in loaded.param_scheduler:
        one = dict(one)
        to_iterations = one.pop("convert_to_iter_based", False)
        kind = PARAM_SCHEDULERS.get(one.pop("type"))
        if to_iterations:
            schedulers.append((kind.build_iter_from_epoch(optimizer, epoch_length=length, **one), False))
        else:
            schedulers.append((kind(optimizer, **one), one.get("by_epoch", True)))
    rates_of = []
    for step in range(loaded.train_cfg.max_epochs * length):
        rates_of.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler, by_epoch in schedulers:
            if not by_epoch or (step + 1) % length == 0:
                scheduler.step()
    return rates_of


def groups(request: dict) -> object:
    """Return {"rate decay": number of parameters} of the optimiser that is built for the model."""
    from mmaction.registry import MODELS
    from mmengine.optim import build_optim_wrapper

    loaded = config(request["file"])
    model = MODELS.build(without_weights(loaded.model))
    wrapper = build_optim_wrapper(model, loaded.optim_wrapper)
    counts: dict[str, int] = {}
    for group in wrapper.optimizer.param_groups:
        if group["params"]:
            name = f"{group['lr']:.9g} {group['weight_decay']:.9g}"
            counts[name] = counts.get(name, 0) + sum(parameter.numel() for parameter in group["params"])
    return counts


def without_weights(model: object) -> object:
    """Return a model's config that loads no file."""
    if isinstance(model, dict):
        for key in list(model):
            model[key] = None if key == "pretrained" else without_weights(model[key])
    return model


OPERATIONS = {one.__name__: one for one in (where, values, frames, boxes, rates, groups)}


def main() -> None:
    import mmaction.datasets
    import mmaction.engine
    import mmaction.models  # noqa: F401
    from mmengine.registry import init_default_scope

    init_default_scope("mmaction")
    answers = sys.stdout
    sys.stdout = sys.stderr  # what the packages print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(OPERATIONS[request["do"]](request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
