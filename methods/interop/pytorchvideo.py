"""Convert names of PyTorchVideo's hub models `slow_r50` and `slowfast_r50`: PySlowFast's networks, renamed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from methods.interop._names import Converted, convert, has

SLOW_FIRST = True  # the classifier's input is [slow, fast]
NEEDS = {"slow_index": "linspace"}


def recognises(names: Mapping[str, Tensor]) -> bool:
    """Return True if the names are of this family."""
    return has(names, r"blocks\.0\.(multipathway_blocks\.0\.)?conv\.weight$")


def to_ours(state: Mapping[str, Tensor]) -> Converted:
    """Return their state dict under our names."""
    two = has(state, r"blocks\.0\.multipathway_blocks")
    paths = {r"multipathway_blocks\.0\.": "slow.", r"multipathway_blocks\.1\.": "fast."} if two else {"": ""}

    # block 5 holds the head of Slow, block 6 that of SlowFast
    rules = [(r"blocks\.[56]\.proj\.(.*)", r"classifier.\1")]
    rules += [
        (r"blocks\.(\d)\.multipathway_fusion\.conv_fast_to_slow\.(.*)", r"backbone.laterals.\1.conv.\2"),
        (r"blocks\.(\d)\.multipathway_fusion\.norm\.(.*)", r"backbone.laterals.\1.bn.\2"),
    ]

    for theirs, ours in paths.items():
        block = rf"blocks\.([1-4])\.{theirs}res_blocks\.(\d+)\."
        rules += [
            (rf"blocks\.0\.{theirs}conv\.(.*)", rf"backbone.{ours}conv1.\1"),
            (rf"blocks\.0\.{theirs}norm\.(.*)", rf"backbone.{ours}bn1.\1"),
            (block + r"branch1_conv\.(.*)", rf"backbone.{ours}layer\1.\2.downsample.0.\3"),
            (block + r"branch1_norm\.(.*)", rf"backbone.{ours}layer\1.\2.downsample.1.\3"),
        ]
        for index, letter in enumerate("abc", start=1):
            rules += [
                (block + rf"branch2\.conv_{letter}\.(.*)", rf"backbone.{ours}layer\1.\2.conv{index}.\3"),
                (block + rf"branch2\.norm_{letter}\.(.*)", rf"backbone.{ours}layer\1.\2.bn{index}.\3"),
            ]
    return convert(state, rules)
