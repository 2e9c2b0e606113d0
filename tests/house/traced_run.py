"""Train a tiny experiment of a checkout under `sys.setprofile` and print what a clip and a validation enter.

    python tests/house/traced_run.py CHECKOUT EMPTY_FOLDER

TSN ResNet-18, no reader processes, six steps, two validations. Only named functions of product files count: no lambda,
no comprehension, nothing inside networks/ and methods/ (the network is the paper's).

- `clip_functions`: distinct functions entered in one steady step, from the return of the step before it to the last
  line of the loss. What a reader does below `read` and `probe` (decoding) counts as these two, and what the colour
  operations do below utils/transforms.py as the function that was called: since they are parts of their own, these are
  the files of utils/ops/. 66 at commit 176f066, where its review counted 62 by hand.
- `validation_crossings`: calls from main.py to the engine, and from the engine to main.py, below the call by which
  train() starts a validation; each pair of caller and callee once. 4 at commit 176f066, where utils/run.py is the
  engine.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGES = ("main.py", "datasets/", "utils/")
TRAIN, STEP = "main.py:train", "main.py:train_step"
BACKWARD, LEFT = "backward", "left"
CONFIG = """\
common:
    model:
        type: tsn
        backbone: resnet18
        num_segments: 2
        num_class: 8
        dropout: 0.5
        pretrained: False
    augmentation:
        input_size: 32
        test_resize: 36
        crop: random_resized
        colorjitter: [0.2, 0.2, 0.2, 0.1]
        random_erasing: [0.5, 0.02, 0.4, 0.3]
        mix_up: 0.2
    data: {{reader: video, sampling: tsn}}
    workers: 0
    batch_size: 4
    lr_scheduler: {{type: COSINE, base_lr: 0.01, max_iter: 6}}
    val_freq: 3
    print_freq: 2
    train_root: {data}
    train_source: {data}/lists/train.txt
    val_root: {data}
    val_source: {data}/lists/val.txt
"""


Stack = tuple[str, ...]


class Tracer:
    """Record the calls of named functions of the product, each with our functions that led to it."""

    def __init__(self, root: Path) -> None:
        self.root = f"{root}/"
        self.names: dict[CodeType, str | None] = {}
        self.stack: list[str] = []
        self.calls: list[Stack] = []  # (outermost, ..., caller, callee); a single word is a mark

    def name_of(self, code: CodeType) -> str | None:
        """Return `file:function` of product code; None for the rest."""
        if code not in self.names:
            file = code.co_filename.removeprefix(self.root)
            name = code.co_qualname  # pyright: ignore[reportAttributeAccessIssue]  of Python 3.11 and later
            is_function = bool(code.co_flags & inspect.CO_OPTIMIZED) and "<" not in code.co_name  # no class, no lambda
            self.names[code] = f"{file}:{name}" if file.startswith(PACKAGES) and is_function else None
        return self.names[code]

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == "backward" and code.co_filename.endswith("torch/_tensor.py"):
            self.calls.append((BACKWARD,))
        name = self.name_of(code) if event in ("call", "return") else None
        if name is None:
            return
        if event == "return":
            if self.stack and self.stack[-1] == name:
                self.stack.pop()
                self.calls.append((LEFT, name))
            return
        self.stack.append(name)
        self.calls.append(tuple(self.stack))


def clip_functions(calls: list[Stack], step: int) -> set[str]:
    """Return what step number `step` entered between its clips' positions and its loss."""
    begins = [at for at, call in enumerate(calls) if call[0] != LEFT and call[-1] == STEP]
    ends = [at for at, call in enumerate(calls) if call == (LEFT, STEP)]
    backward = next(at for at in range(begins[step], len(calls)) if calls[at] == (BACKWARD,))
    loss = max(at for at in range(begins[step], backward) if calls[at][0] == LEFT and "utils/loss.py" in calls[at][1])
    reading = [call for call in calls[ends[step - 1] : begins[step]] if call[-1].startswith("datasets/")]
    scoring = calls[begins[step] : loss]
    return {call[-1] for call in [*reading, *scoring] if call[0] != LEFT and not is_deeper(call)}


def is_deeper(call: Stack) -> bool:
    """Return True for a call inside a network, a reader's decoding, or a colour operation."""
    is_of_network = any(part in call[-1] for part in ("sync_bn.py", "Dropout"))
    return is_of_network or any(
        all(name.startswith(place) for name in call[-2:])
        for place in ("datasets/readers/", ("utils/transforms.py", "utils/ops/"))
    )


def validation_crossings(calls: list[Stack]) -> set[tuple[str, str]]:
    """Return the pairs of caller and callee between main.py and the engine below train()'s call of a validation."""
    crossings: set[tuple[str, str]] = set()
    pending: set[tuple[str, str]] = set()
    is_validation = False
    for call in calls:
        if call[0] == LEFT or TRAIN not in call:
            continue
        below = call[call.index(TRAIN) + 1 :]
        if len(below) == 1:
            pending, is_validation = set(), False  # train() begins another call
        is_validation = is_validation or bool(re.search("EvalLoader", call[-1]))
        sides = [side_of(name) for name in below[-2:]]
        if len(below) > 1 and None not in sides and sides[0] != sides[1]:
            pending.add((below[-2], below[-1]))
        if is_validation:
            crossings |= pending
    return crossings


def side_of(name: str) -> str | None:
    """Return main or engine."""
    file = name.split(":")[0]
    is_engine = file.startswith("utils/engine/") or file == "utils/run.py"
    return "main" if file == "main.py" else "engine" if is_engine else None


def main() -> int:
    """Train, then print one JSON line."""
    root, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    sys.path.insert(0, str(root))
    import main as program
    from datasets.demo import verb as demo

    data, exp = folder / "data", folder / "exp"
    assert demo.main(["--out", str(data), "--train", "24", "--val", "8", "--workers", "1"]) == 0
    exp.mkdir()
    (exp / "config.yaml").write_text(CONFIG.format(data=data))
    tracer = Tracer(root)
    sys.setprofile(tracer)
    try:
        code = program.train(exp)
    finally:
        sys.setprofile(None)
    assert code == 0
    assert any("EvalLoader" in call[-1] for call in tracer.calls), "no validation was seen: has EvalLoader a new name?"
    clip, crossed = clip_functions(tracer.calls, 1), validation_crossings(tracer.calls)
    figures = {"clip_functions": len(clip), "validation_crossings": len(crossed)}
    figures |= {"validation_crossings_named": [" -> ".join(pair) for pair in sorted(crossed)]}
    print(json.dumps(figures | ({"clip_functions_named": sorted(clip)} if "--named" in sys.argv else {})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
