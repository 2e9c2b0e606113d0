"""Published weights: the parity set of the golden data, what must fit and what is refused, pickles that are no data."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from methods import interop
from methods.interop import _names, load_weights, pyslowfast
from networks import BACKBONES
from tests import models, parity_entry
from utils import weights_file
from utils.errors import UserError

# One quick case of every family; `make nightly` runs the others too.
QUICK = {
    "mma_tsn_r18", "mma_tsm_mobilenetv2", "tsm_orig_mobilenetv2", "tsn_orig_r50", "psf_slow_r50_4x16",
    "ptv_slowfast_r50", "paddle_pptsn_r50_odd", "tpn_orig_slowonly_r50_8x8_fcn",
}  # fmt: skip
OTHERS = {
    "mma_slowfast_r50_4x16", "mma_slowfast_r50_8x8", "mma_slowonly_r50_8x8", "mma_tpn_slowonly_r50_8x8",
    "mma_tpn_tsm_r50_1x1x8", "mma_tsm_r50", "mma_tsm_r50_nl", "mma_tsn_r50", "paddle_pptsm_r50", "paddle_pptsn_r50",
    "paddle_tsm_r50", "paddle_tsn_r50", "psf_slow_r50_8x8", "psf_slowfast_nln_r50_8x8", "psf_slowfast_r50_4x16",
    "psf_slowfast_r50_8x8", "ptv_slow_r50", "tpn_orig_slowonly_r50_32x2", "tpn_orig_slowonly_r50_8x8",
    "tpn_orig_tsm_r50_sthv1", "tsm_orig_r101_blockres", "tsm_orig_r50_blockres", "tsm_orig_r50_nl",
}  # fmt: skip
CASES = [
    *(pytest.param(case, marks=pytest.mark.slow if "tpn" in case else ()) for case in sorted(QUICK)),
    *(pytest.param(case, marks=pytest.mark.nightly) for case in sorted(OTHERS)),
]


@pytest.fixture(scope="session")
def parity(shared_data: Path) -> ModuleType:
    """The tool that rebuilds the checkpoints."""
    tool = shared_data.parent / "tools" / "parity-expand"
    if not tool.is_file():
        pytest.skip("the tool parity-expand is not on this machine")
    loader = importlib.machinery.SourceFileLoader("parity_expand", str(tool))
    spec = importlib.util.spec_from_loader("parity_expand", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader_sets = importlib.machinery.SourceFileLoader.set_data
    importlib.machinery.SourceFileLoader.set_data = lambda *args, **kwargs: None  # no byte code beside the tool
    try:
        loader.exec_module(module)
    finally:
        importlib.machinery.SourceFileLoader.set_data = loader_sets
    return module


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_peers(parity: ModuleType, shared_data: Path, tmp_path: Path, case: str) -> None:
    case_dir, meta, arrays = parity.expand(str(shared_data / "golden" / "parity"), case, str(tmp_path))
    assert not meta["fill_mismatch"]
    got, expected = parity_entry.logits(case_dir, meta, arrays), arrays["logits"]
    (Path(case_dir) / meta["checkpoint"]).unlink()  # 100 to 370 MB
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def test_every_case_is_listed(shared_data: Path) -> None:
    folder = shared_data / "golden" / "parity"
    assert {file.stem for file in folder.glob("*.json")} == QUICK | OTHERS


def build(method: str = "slowonly", **options: Any) -> models.Model:
    arguments = {"type": method, "backbone": "resnet18", "num_class": 5, "num_segments": 4}
    return models.build(**(arguments | options))


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    torch.save(BACKBONES["resnet18"](num_class=5).state_dict(), tmp_path / "image.pth")
    return tmp_path / "image.pth"


def test_image_weights_are_inflated(image_file: Path) -> None:
    model = build()
    report = load_weights(model, image_file)
    assert report.family == "torchvision_timm"
    assert len(report.loaded) == len(model.state_dict())
    assert set(report.reshaped.values()) == {"inflated"}
    assert len(report.reshaped) == 20
    assert "122 tensors from torchvision_timm; reshaped: backbone.conv1.weight" in str(report)


def test_what_does_not_fit_is_named_and_nothing_is_changed(image_file: Path) -> None:
    for options, message in (
        ({"num_class": 6}, r"missing: classifier.weight.*unexpected: classifier.weight \(5, 512\) for \(6, 512\)"),
        ({"backbone": "resnet34"}, "missing: backbone.layer1.2.conv1.weight"),
    ):
        model = build("tsn", **options)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(UserError, match=message):
            load_weights(model, image_file)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_loose_loading_takes_what_fits(image_file: Path) -> None:
    model = build("tsn", num_class=6)
    report = load_weights(model, image_file, strict=False)
    assert report.missing == ["classifier.weight", "classifier.bias"]
    assert len(report.loaded) == 120


def test_classifiers_can_be_left_alone(image_file: Path) -> None:
    report = load_weights(build("tsn", num_class=6), image_file, classifier=False)
    assert report.skipped == ["classifier.weight", "classifier.bias"]
    assert not report.missing
    assert not report.unexpected


def test_families_are_checked(image_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no family called 'mmacton'.*did you mean mmaction"):
        load_weights(build("tsn"), image_file, family="mmacton")
    torch.save({"odd.weight": torch.zeros(2)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd.pth: its tensors \(odd.weight\) have neither .* our models") as caught:
        load_weights(build("tsn"), tmp_path / "odd.pth")
    for word in (*interop.FAMILIES, "MMAction2", "PySlowFast", "PaddleVideo", "torchvision and timm", "docs/weights"):
        assert word in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        load_weights(build("tsn"), tmp_path / "none.pth")


def test_options_that_tensors_cannot_tell_are_checked(tmp_path: Path) -> None:
    tsm = build("tsm", shift_direction="paddle")
    names = {
        f"module.base_model.{k.removeprefix('backbone.')}": v for k, v in tsm.state_dict().items() if "classif" not in k
    }
    names |= {f"module.new_fc.{k}": v for k, v in tsm.classifier.state_dict().items()}
    torch.save({"state_dict": names, "epoch": 3, "best_prec1": 50.0}, tmp_path / "tsm.pth.tar")
    with pytest.raises(UserError, match="the weights need shift_direction: tsm, the model has paddle"):
        load_weights(tsm, tmp_path / "tsm.pth.tar")
    assert load_weights(build("tsm"), tmp_path / "tsm.pth.tar").family == "tsn_tsm"


def test_pretrained_takes_them_too(image_file: Path, tmp_path: Path) -> None:
    """`model.pretrained` may name a file of another project; a classifier of other classes is left out."""
    tsm = build("tsm")
    names = {
        f"base_model.{k.removeprefix('backbone.')}": v for k, v in tsm.backbone.state_dict(prefix="backbone.").items()
    }
    names |= {f"new_fc.{k}": v for k, v in tsm.classifier.state_dict().items()}
    torch.save({"state_dict": names}, tmp_path / "tsm.pth.tar")
    same, other = (build("tsm", num_class=k, pretrained=str(tmp_path / "tsm.pth.tar")) for k in (5, 9))
    assert torch.equal(same.classifier.weight, tsm.classifier.weight)
    assert torch.equal(other.backbone.layer4[1].conv2.weight, tsm.backbone.layer4[1].conv2.weight)
    assert "122 tensors from tsn_tsm" in same.pretrained_note
    assert "skipped: classifier.weight, classifier.bias" in other.pretrained_note
    with pytest.raises(UserError, match=r"model\.pretrained: .*need shift_direction: tsm"):
        build("tsm", shift_direction="paddle", pretrained=str(tmp_path / "tsm.pth.tar"))


def original_tsm(file: Path, **options: object) -> nn.Module:
    """A TSM whose weights are written with the names of the TSM repository."""
    torch.manual_seed(7)
    tsm = build("tsm", **options)
    names = {
        f"module.base_model.{k.removeprefix('backbone.')}".replace(".conv1.weight", ".conv1.net.weight")
        if k.startswith("backbone.layer") else f"module.base_model.{k.removeprefix('backbone.')}": v
        for k, v in tsm.state_dict().items() if "classif" not in k
    }  # fmt: skip
    names |= {f"module.new_fc.{k}": v for k, v in tsm.classifier.state_dict().items()}
    torch.save({"state_dict": names, "epoch": 3, "best_prec1": 50.0}, file)
    return tsm


def test_a_rule_of_the_family_can_be_overridden(tmp_path: Path) -> None:
    original_tsm(tmp_path / "tsm.pth.tar")
    paddle = build("tsm", shift_direction="paddle")
    with pytest.raises(UserError, match="the weights need shift_direction: tsm"):
        load_weights(paddle, tmp_path / "tsm.pth.tar")
    assert load_weights(paddle, tmp_path / "tsm.pth.tar", accept=["shift_direction"]).family == "tsn_tsm"


def test_what_a_file_implies(tmp_path: Path) -> None:
    original_tsm(tmp_path / "tsm.pth.tar", backbone="resnet34")
    assert interop.what_is(tmp_path / "tsm.pth.tar") == (
        "tsn_tsm", {"type": "tsm", "backbone": "resnet34", "num_class": 5, "shift_direction": "tsm"}
    )  # fmt: skip
    slowfast = build("slowfast", num_segments=8, fusion_kernel=5, lateral_norm=False, beta_inv=4)
    shown = interop.implied(slowfast.state_dict(), [], "mmaction", {"slow_index": "strided", "flow": "cascade"})
    assert shown == {
        "type": "slowfast", "backbone": "resnet18", "num_class": 5, "beta_inv": 4, "fusion_kernel": 5,
        "lateral_norm": False, "slow_index": "strided",
    }  # fmt: skip
    tpn = build("tpn", base="tsm", aux_weight=0.0).state_dict()
    needs = {"shift_shortcut": "true", "flow": "cascade", "slow_index": "strided"}
    assert interop.implied(tpn, [], "tpn_original", needs) == {
        "type": "tpn", "backbone": "resnet18", "num_class": 5, "base": "tsm", "aux_weight": 0,
        "shift_shortcut": True, "flow": "cascade",
    }  # fmt: skip
    assert interop.implied(build("pptsn").state_dict(), [], "paddle", {})["backbone"] == "resnet18_vd"
    assert interop.implied(build("slowonly").state_dict(), [], "pyslowfast", {})["type"] == "slowonly"


@pytest.mark.slow
def test_options_of_every_parity_case_are_implied(parity: ModuleType, shared_data: Path, tmp_path: Path) -> None:
    """What tests/parity_entry.py writes from the description is what the file itself shows."""
    for case in sorted(QUICK):
        case_dir, meta, arrays = parity.expand(str(shared_data / "golden" / "parity"), case, str(tmp_path))
        _, shown = interop.what_is(Path(case_dir) / meta["checkpoint"])
        (Path(case_dir) / meta["checkpoint"]).unlink()
        expected = parity_entry.options(meta, num_segments=8)
        same = {key for key in shown.keys() & expected if key not in ("type", "backbone")}
        assert {key: shown[key] for key in same} == {key: expected[key] for key in same}
        assert shown["backbone"].removesuffix("_vd") == expected["backbone"]
        assert shown.get("type", expected["type"]) == expected["type"]
        assert shown["num_class"] == arrays["logits"].shape[-1]


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(5)
    state = BACKBONES["resnet18"](num_class=5).state_dict()
    save_file(state, tmp_path / "image.safetensors")
    model = build("tsn")
    assert len(load_weights(model, tmp_path / "image.safetensors").loaded) == len(state)
    assert torch.equal(model.classifier.weight, state["fc.weight"])
    whole = (tmp_path / "image.safetensors").read_bytes()
    for number, content in enumerate((whole[:1000], whole[:-4], b"", b"\xff" * 64)):
        file = tmp_path / f"cut{number}.safetensors"
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{file.name} is not a whole safetensors file"):
            load_weights(model, file)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pyth"])
def test_the_forbidden_name_in_a_torch_file_is_said(tmp_path: Path, zipped: bool, suffix: str) -> None:
    file, trace = tmp_path / f"x{suffix}", tmp_path / "trace"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "x": Touch(trace)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"x{suffix} holds more than tensors.*it names posix.mkdir"):
        interop.read(file)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_plain_pickle_that_calls_itself_pth(tmp_path: Path, protocol: int) -> None:
    file, trace = tmp_path / "x.pth", tmp_path / "trace"
    file.write_bytes(dumped({"x": Touch(trace)}, protocol))
    with pytest.raises(UserError, match=r"x.pth.*it names posix.mkdir"):
        interop.read(file)
    assert not trace.exists()
    file.write_bytes(dumped({"w": np.ones(3, np.float32)}, protocol))
    assert interop.read(file)["w"].tolist() == [1, 1, 1]


def test_truncated_torch_files(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100)}, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-10], b"", b"text"):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(UserError, match="x.pth is not a whole weights file"):
            interop.read(tmp_path / "x.pth")


@pytest.mark.slow
def test_caffe2_names(tmp_path: Path) -> None:
    """A SlowFast under Caffe2's blob names, as a pickle of arrays."""
    torch.manual_seed(3)
    model = build("slowfast", backbone="resnet50", num_segments=8, non_local="dot_product")
    blobs = {"model_iter": np.zeros(1), "conv1_w_momentum": np.zeros(1)}
    names = pyslowfast_names(model)
    for blob in caffe2_blobs(list(names)):
        theirs = next(iter(_names.rename([blob], pyslowfast.CAFFE2).values()))
        if theirs in names:
            blobs[blob] = model.state_dict()[names[theirs]].numpy()
    assert len(blobs) - 2 == len(names)
    with (tmp_path / "model.pkl").open("wb") as file:
        pickle.dump({"blobs": blobs}, file, protocol=2)
    other = build("slowfast", backbone="resnet50", num_segments=8, non_local="dot_product")
    report = load_weights(other, tmp_path / "model.pkl")
    assert sorted(report.skipped) == ["conv1_w_momentum", "model_iter"]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items() if "batches" not in name)


def pyslowfast_names(model: nn.Module) -> dict[str, str]:
    """PySlowFast's name: ours, for a SlowFast, without the counts of batches."""
    names_of = {}
    letters = {"1": "a", "2": "b", "3": "c"}
    for ours in model.state_dict():
        if ours.endswith("num_batches_tracked"):
            continue
        parts = ours.split(".")
        if parts[0] == "classifier":
            theirs = f"head.projection.{parts[1]}"
        elif parts[1] == "laterals":
            theirs = f"s{int(parts[2]) + 1}_fuse.{'conv_f2s' if parts[3] == 'conv' else 'bn'}.{parts[4]}"
        else:
            path, rest = ("0" if parts[1] == "slow" else "1"), parts[3:]
            if parts[2] in ("conv1", "bn1"):
                theirs = f"s1.pathway{path}_stem.{parts[2][:-1]}.{rest[0]}"
            else:
                head = f"s{int(parts[2][-1]) + 1}.pathway{path}_"
                if rest[0].endswith("_non_local"):
                    layer = "bn" if rest[1] == "bn" else f"conv_{rest[1]}"
                    theirs = f"{head}nonlocal{rest[0].split('_')[0]}.{layer}.{rest[2]}"
                elif rest[1] == "downsample":
                    theirs = f"{head}res{rest[0]}.{'branch1' if rest[2] == '0' else 'branch1_bn'}.{rest[3]}"
                else:
                    suffix = "_bn" if rest[1].startswith("bn") else ""
                    theirs = f"{head}res{rest[0]}.branch2.{letters[rest[1][-1]]}{suffix}.{rest[2]}"
        names_of[theirs] = ours
    return names_of


def caffe2_blobs(names: list[str]) -> list[str]:
    """Blob names of a SlowFast-50 with non-local blocks."""
    blobs = ["pred_w", "pred_b", "conv1_w", "t_conv1_w", "t_pool1_subsample_w"]
    blobs += [f"{p}_bn_{s}" for p in ("res_conv1", "t_res_conv1", "t_pool1_subsample") for s in ("s", "b", "rm", "riv")]
    for stage, depth in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        last = f"t_res{stage}_{depth - 1}_branch2c_bn_subsample"
        blobs += [f"{last}_w", *(f"{last}_bn_{s}" for s in ("s", "b", "rm", "riv"))]
        for index in range(depth):
            nl = f"nonlocal_conv{stage}_{index}"
            blobs += [f"{nl}_{part}_{kind}" for part in ("theta", "phi", "g", "out") for kind in "wb"]
            blobs += [f"{nl}_bn_{s}" for s in ("s", "b", "rm", "riv")]
            for path in ("", "t_"):
                for branch in ("branch1", "branch2a", "branch2b", "branch2c"):
                    block = f"{path}res{stage}_{index}_{branch}"
                    blobs += [f"{block}_w", *(f"{block}_bn_{s}" for s in ("s", "b", "rm", "riv"))]
    return blobs


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_unpickler_reads_arrays_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    content: OrderedDict[str, Any] = OrderedDict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3),
        fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        big=np.arange(3, dtype=">i4"),
        none=np.zeros((0, 2), np.int64),
        flags=np.array([True, False]),
        scalar=np.float64(0.5),
        nested={"list": [1, "two", None, (3.0, b"four")]},
    )
    file = tmp_path / "x.pdparams"
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    arrays = weights_file.read(file)
    for key in ("a", "fortran", "big", "none", "flags"):
        assert arrays[key].shape == content[key].shape
        assert (arrays[key] == content[key]).all()
        assert arrays[key].dtype.newbyteorder("=") == content[key].dtype.newbyteorder("=")
        assert arrays[key].flags.writeable
    assert arrays["scalar"] == 0.5
    assert arrays["nested"] == content["nested"]


class Touch:
    """Its pickle would make a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def dumped(value: object, protocol: int = 4) -> bytes:
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def test_unpickler_runs_nothing(tmp_path: Path) -> None:
    file, trace = tmp_path / "x.pkl", tmp_path / "trace"
    file.write_bytes(dumped({"w": Touch(trace)}))
    with pytest.raises(UserError, match=r"x.pkl holds more than tensors, arrays.*it names posix.mkdir"):
        weights_file.read(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        dumped({"w": np.array([{"a": 1}], dtype=object)}),
        dumped({"w": np.array(["text"])}),
        dumped({"w": {1, 2}}),
        dumped({"w": np.zeros(4)}).replace(b"K\x04\x85", b"K\x05\x85"),  # a shape that is not that of the bytes
        dumped({"w": np.zeros(4)})[:-40],
        b"cos\nsystem\n(S'true'\ntR.",
        b"cnumpy\nndarray\n(I9\ntR.",
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"",
        b"text",
    ],
)
def test_unpickler_refuses(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(content)
    with pytest.raises(UserError, match="x.pkl"):
        weights_file.read(file)


def test_a_pickle_cannot_change_the_unpickler(tmp_path: Path) -> None:
    """BUILD sets attributes of whatever was named last: our stand-ins must stay as they are for the next file."""
    file = tmp_path / "x.pkl"
    for name in ("cnumpy.core.multiarray\nscalar\n", "c_codecs\nencode\n", "cnumpy\ndtype\n"):
        file.write_bytes(name.encode() + b"(N}S'numpy'\nNs}S'code'\nNstb.")
        with pytest.raises(UserError, match="x.pkl"):
            weights_file.read(file)
    file.write_bytes(pickle.dumps({"a": np.arange(3.0), "s": np.float64(2.5)}, 2))
    assert weights_file.read(file)["a"].tolist() == [0, 1, 2]
    assert weights_file.read(file)["s"] == 2.5


def test_shared_parts_are_read_once(tmp_path: Path) -> None:
    """Sixty lists that hold the one before twice would be 2**60 lists."""
    nested: list = []
    for _ in range(60):
        nested = [nested, nested]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(nested, 4))
    assert weights_file.read(tmp_path / "x.pkl")[0] is not None
