"""Convert names of PySlowFast: Slow and SlowFast, even with non-local blocks; `.pyth`, and `.pkl` from Caffe2."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from methods.interop._names import Converted, convert, has, rename

SLOW_FIRST = True  # the classifier's input is [slow, fast]
NEEDS = {"slow_index": "linspace"}  # the frames of the Slow pathway

# {name in a blob of Caffe2: name of a tensor of BN}; `t_` marks blobs of the Fast pathway.
_STATISTICS = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
#: Blobs of Caffe2 -> PySlowFast's names.
CAFFE2 = [
    (r"pred_w", r"head.projection.weight"),
    (r"pred_b", r"head.projection.bias"),
    (r"conv1_w", r"s1.pathway0_stem.conv.weight"),
    (r"t_conv1_w", r"s1.pathway1_stem.conv.weight"),
    (r"t_pool1_subsample_w", r"s1_fuse.conv_f2s.weight"),
    (r"t_res(\d)_\d+_branch2c_bn_subsample_w", r"s\1_fuse.conv_f2s.weight"),
    (r"nonlocal_conv(\d)_(\d+)_(theta|phi|g|out)_w", r"s\1.pathway0_nonlocal\2.conv_\3.weight"),
    (r"nonlocal_conv(\d)_(\d+)_(theta|phi|g|out)_b", r"s\1.pathway0_nonlocal\2.conv_\3.bias"),
]
for _prefix, _path in (("", 0), ("t_", 1)):
    CAFFE2 += [
        (rf"{_prefix}res(\d)_(\d+)_branch1_w", rf"s\1.pathway{_path}_res\2.branch1.weight"),
        (rf"{_prefix}res(\d)_(\d+)_branch2([abc])_w", rf"s\1.pathway{_path}_res\2.branch2.\3.weight"),
    ]
for _blob, _name in _STATISTICS.items():
    CAFFE2 += [
        (rf"res_conv1_bn_{_blob}", f"s1.pathway0_stem.bn.{_name}"),
        (rf"t_res_conv1_bn_{_blob}", f"s1.pathway1_stem.bn.{_name}"),
        (rf"t_pool1_subsample_bn_{_blob}", f"s1_fuse.bn.{_name}"),
        (rf"t_res(\d)_\d+_branch2c_bn_subsample_bn_{_blob}", rf"s\1_fuse.bn.{_name}"),
        (rf"nonlocal_conv(\d)_(\d+)_bn_{_blob}", rf"s\1.pathway0_nonlocal\2.bn.{_name}"),
    ]
    for _prefix, _path in (("", 0), ("t_", 1)):
        CAFFE2 += [
            (rf"{_prefix}res(\d)_(\d+)_branch1_bn_{_blob}", rf"s\1.pathway{_path}_res\2.branch1_bn.{_name}"),
            (rf"{_prefix}res(\d)_(\d+)_branch2([abc])_bn_{_blob}", rf"s\1.pathway{_path}_res\2.branch2.\3_bn.{_name}"),
        ]
# states of the optimiser and counters
IGNORED = r".*_momentum|lr|model_iter|epoch"


def recognises(names: Mapping[str, Tensor]) -> bool:
    """Return True if the names are of this family."""
    return has(names, r"s1\.pathway0_stem\.|res2_0_branch2a_w$")


def to_ours(state: Mapping[str, Tensor]) -> Converted:
    """Return their state dict under our names."""
    # first to PySlowFast's own names, so that one table serves both kinds of files
    if has(state, r"res2_0_branch2a_w$"):
        names = rename(state, CAFFE2)
        state = {names[name]: tensor for name, tensor in state.items()}

    paths = ("slow.", "fast.") if has(state, r"s1\.pathway1_stem") else ("",)
    rules: list[tuple[str, str | None]] = [
        (IGNORED, None),
        (r"head\.projection\.(.*)", r"classifier.\1"),
    ]

    for stage in range(2, 6):  # res2 is layer1
        rules += [
            (rf"s{stage - 1}_fuse\.conv_f2s\.(.*)", rf"backbone.laterals.{stage - 2}.conv.\1"),
            (rf"s{stage - 1}_fuse\.bn\.(.*)", rf"backbone.laterals.{stage - 2}.bn.\1"),
        ]
        for number, path in enumerate(paths):
            theirs, ours = rf"s{stage}\.pathway{number}_", rf"backbone.{path}layer{stage - 1}"
            rules += [
                (theirs + r"res(\d+)\.branch1\.(.*)", rf"{ours}.\1.downsample.0.\2"),
                (theirs + r"res(\d+)\.branch1_bn\.(.*)", rf"{ours}.\1.downsample.1.\2"),
                (theirs + r"nonlocal(\d+)\.conv_(theta|phi|g|out)\.(.*)", rf"{ours}.\1_non_local.\2.\3"),
                (theirs + r"nonlocal(\d+)\.bn\.(.*)", rf"{ours}.\1_non_local.bn.\2"),
            ]
            for index, letter in enumerate("abc", start=1):
                rules += [
                    (theirs + rf"res(\d+)\.branch2\.{letter}\.(.*)", rf"{ours}.\1.conv{index}.\2"),
                    (theirs + rf"res(\d+)\.branch2\.{letter}_bn\.(.*)", rf"{ours}.\1.bn{index}.\2"),
                ]

    for number, path in enumerate(paths):
        rules += [
            (rf"s1\.pathway{number}_stem\.conv\.(.*)", rf"backbone.{path}conv1.\1"),
            (rf"s1\.pathway{number}_stem\.bn\.(.*)", rf"backbone.{path}bn1.\1"),
        ]
    return convert(state, rules)
