"""What the tests of the training steps share: run the cases of a method, and check what each one has shown."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from tests.fake_cuda import build, cases

RECORDED = Path(__file__).with_name("recorded.json")
ONE_WAIT = ["an event is waited for at utils/transfer.py"]
#: Outside of training steps, once each: the first chunk, the metrics, the factors of batch norm, a new constant.
BESIDE = {
    "a stream is waited for at utils/transfer.py",
    "the device is waited for at utils/view_batches.py",
    "an event is waited for at utils/transfer.py",  # the scores of 64 videos
    "copy to the GPU at utils/sync_bn.py",
    "copy to the GPU at networks/vit3d.py",  # the rotary positions of a grid
}


#: The same code for every method: TSN shows it in `make test`, the others in `make nightly`.
SHARED_CASES = (
    *("fp32 plain", "fp32", "fp16", "bf16 4 micro-batches", "bf16 group of 4 ranks", "validation fp32"),
    *("validation bf16, measured", "precise BN and distillation"),
)
SHOWN_BY = ("tsn",)


def names_of(method: str, *, nightly: bool) -> list[str]:
    """Return the cases of a method that `make test` runs, or those that `make nightly` adds."""
    every = [*cases.cases_of(method), *cases.BESIDE_TRAINING]
    added = [name for name in every if name in SHARED_CASES and method not in SHOWN_BY]
    return added if nightly else [name for name in every if name not in added]


@functools.cache
def figures_of(methods: tuple[str, ...], *, nightly: bool) -> list[dict[str, Any]]:
    """Run cases of methods in one process; a start costs as much as a case."""
    words = [f"{method}={name}" for method in methods for name in names_of(method, nightly=nightly)]
    return build.run("cases", *words)


def check(method: str, methods: tuple[str, ...], *, nightly: bool = False) -> list[dict[str, Any]]:
    """Assert what every case of a method must show, and return its figures; `methods` share a process if these are few.

    So a method that shows the shared cases too, a minute of them on a busy machine, has a process of its own.
    """
    names = names_of(method, nightly=nightly)
    together = (method,) if method in SHOWN_BY or nightly else tuple(name for name in methods if name not in SHOWN_BY)
    results = [figures for figures in figures_of(together, nightly=nightly) if figures["method"] == method]
    assert [figures["case"] for figures in results] == names
    recorded = json.loads(RECORDED.read_text())
    for figures in results:
        name = f"{method} {figures['case']}"
        assert figures["strides"] == [], name
        if "fp64" not in name:  # cuDNN has no channels-last kernels for it
            assert figures["layouts"] == [], name
        if "waits_of_a_log_line" in figures:
            assert without_lines(figures["waits"]) == ONE_WAIT, name
            assert without_lines(figures["waits_of_a_log_line"]) == ["copy to the host at utils/stragglers.py"], name
            assert figures["ahead_first"], f"{name}: the next batch is not copied before the host waits"
        else:
            assert set(without_lines(figures["waits"])) <= BESIDE, name
        check_kernels(name, figures["kernels"], recorded)
    return results


def without_lines(waits: list[str]) -> list[str]:
    """`what at file` of each wait."""
    return [wait.rpartition(":")[0] for wait in waits]


def check_kernels(name: str, kernels: int, recorded: dict[str, Any]) -> None:
    """Within 5 per cent of the recorded number, where the version of PyTorch is the recorded one."""
    expected = recorded["kernels"].get(name)
    if torch.__version__.split("+")[0] != recorded["torch"]:
        print(f"{name}: {kernels} kernels, {expected} with torch {recorded['torch']}")
        return
    assert expected is not None, f"{name}: record its {kernels} kernels (python -m tests.fake_cuda.record)"
    assert abs(kernels - expected) <= 0.05 * expected, f"{name}: {kernels} kernels, recorded {expected}"
