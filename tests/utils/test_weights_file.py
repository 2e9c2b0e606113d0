"""Weights files of every format: verified where they are read, bounded before they are loaded, never run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anal_tools.evaluate import network
from anal_tools.predict import predictor
from methods import fetch, interop
from tests import models, weights
from tests.benchmarks.reliability import checkpoint_mutants
from tests.fuzz import weights as fuzz
from utils import checkpoint, config, files, weights_file
from utils.dist import World
from utils.engine import distill
from utils.engine.network import model_arguments
from utils.errors import UserError
from utils.weights_file import opcodes


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment whose best checkpoint has an average of the weights, recomputed statistics and momentum."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "data" / "lists").mkdir(parents=True)
    for name in ("train", "val"):
        (folder / "data" / "lists" / f"{name}.txt").write_text("a.mp4 8 0\n")
    exp = weights.make(folder / "exp", folder / "data", backbone="mobilenetv2")
    state = checkpoint.load(exp / checkpoint.BEST)
    state["ema"] = {key: value * 0.5 if value.is_floating_point() else value for key, value in state["model"].items()}
    state["precise_bn"] = {key: value + 1 for key, value in state["model"].items() if key.endswith("running_mean")}
    state["optimizer"] = {"state": {0: {"momentum_buffer": torch.randn(1000)}}, "param_groups": []}
    state["config"] |= {"ema": 0.9, "precise_bn": {"batches": 2}}
    checkpoint.save(exp, checkpoint.BEST, state)
    return exp


def flipped(file: Path, target: Path, what: torch.Tensor) -> Path:
    """Copy a checkpoint with one bit changed inside of a tensor that it holds."""
    data = bytearray(file.read_bytes())
    at = data.find(what.numpy().tobytes())
    assert at > 0
    data[at + 3] ^= 1
    target.write_bytes(data)
    return target


@pytest.fixture(params=["ema", "precise_bn", "optimizer", "model"])
def damaged(request: pytest.FixtureRequest, exp: Path, tmp_path: Path) -> Path:
    state = checkpoint.load(exp / checkpoint.BEST)
    if request.param == "optimizer":
        tensor = state["optimizer"]["state"][0]["momentum_buffer"]
    else:
        tensor = max(state[request.param].values(), key=lambda value: value.numel())
    return flipped(exp / checkpoint.BEST, tmp_path / "ckpt_best.pth.tar", tensor)


def test_a_flipped_bit_is_found_by_every_reader(exp: Path, damaged: Path) -> None:
    """The part that a reader does not use counts too: the file is not the one that was written."""
    cfg = config.load(exp)
    arguments = model_arguments(cfg, pretrained=False)
    (damaged.parent / "config.yaml").write_bytes((exp / "config.yaml").read_bytes())
    readers = {
        "eval": lambda: interop.load_checkpoint(damaged, lambda: models.build(**arguments)),
        "predict": lambda: predictor.from_experiment(damaged, None, [], World()),
        "export": lambda: predictor.from_experiment(exp, str(damaged), [], World(), as_is=True),
        "pretrained": lambda: models.build(**arguments | {"pretrained": str(damaged)}),
        "pretrained folder": lambda: models.build(**arguments | {"pretrained": str(damaged.parent)}),
        "teacher": lambda: distill.find(damaged, cfg),
        "teacher folder": lambda: distill.find(damaged.parent, cfg),
        "convert": lambda: interop.what_is(damaged),
        "load": lambda: checkpoint.load(damaged),
    }
    for read in readers.values():
        with pytest.raises(UserError, match=r"ckpt_best.pth.tar.*not a whole .*wrong checksum"):
            read()


def test_mutants_are_found_or_harmless(exp: Path, tmp_path: Path) -> None:
    """A sample of the row `checkpoint_mutants`; each header field and each kind of member can be hit."""
    good = exp / checkpoint.BEST
    seed = random.SystemRandom().randrange(1 << 31)
    read = weights_file.read
    reference, verdicts = read(good), set()
    for what, data in checkpoint_mutants.mutants(good.read_bytes(), 32, 8, random.Random(seed)):
        (tmp_path / "m.pth.tar").write_bytes(data)
        verdict = checkpoint_mutants.judged(read, tmp_path / "m.pth.tar", reference)
        assert verdict in ("detected", "harmless"), f"seed {seed}: {what}: {verdict}"
        verdicts.add(verdict)
    assert "detected" in verdicts


def test_every_bit_of_a_header_and_its_entry(tmp_path: Path) -> None:
    """A mark as a folder made torch return a tensor that was never filled: no field may be left out."""
    file = tmp_path / "x.pth"
    torch.save({"w": torch.arange(3.0)}, file)
    good, reference = file.read_bytes(), {"w": torch.arange(3.0)}
    header = next(info.header_offset for info in zipfile.ZipFile(file).infolist() if info.filename == "x/data/0")
    entry = good.rindex(b"x/data/0") - 46
    for at in (*range(header, header + 38), *range(entry, entry + 54)):
        for bit in range(8):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            verdict = checkpoint_mutants.judged(weights_file.read, file, reference)
            assert verdict in ("detected", "harmless"), f"bit {bit} of byte {at}: {verdict}"


@pytest.mark.parametrize("what", ["dangling", "folder", "fifo", "empty", "cut", "head"])
def test_a_damaged_best_is_no_reason_to_take_the_latest(exp: Path, tmp_path: Path, what: str) -> None:
    for name in ("config.yaml", checkpoint.BEST):
        (tmp_path / name).write_bytes((exp / name).read_bytes())
    best = (tmp_path / checkpoint.BEST).rename(tmp_path / checkpoint.LATEST).with_name(checkpoint.BEST)
    data = (tmp_path / checkpoint.LATEST).read_bytes()
    if what == "dangling":
        best.symlink_to(tmp_path / "nowhere")
    elif what == "folder":
        best.mkdir()
    elif what == "fifo":
        os.mkfifo(best)
    else:
        best.write_bytes({"empty": b"", "cut": data[:-30], "head": b"X" + data[1:]}[what])
    cfg = config.load(exp)
    arguments = model_arguments(cfg, pretrained=False)
    for read in (
        lambda: interop.load_checkpoint(network.choose_weights(tmp_path, None), lambda: models.build(**arguments)),
        lambda: models.build(**arguments | {"pretrained": str(tmp_path)}),
        lambda: distill.find(tmp_path, cfg),
        lambda: interop.what_is(best),
    ):
        with pytest.raises(UserError, match="ckpt_best.pth.tar.*not a whole"):
            read()


# Small files that hang or fill the memory of an unpickler.


def proto2(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


NESTED = b"N\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60  # a tuple of itself, 60 deep: hashing it takes 2**60 steps
ONE_HASH = b"".join(b"\x8a\x14" + ((2**61 - 1) * k).to_bytes(20, "little") + b"N" for k in range(1, 9))
COPY = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
BOMBS = {
    "memo of 4 GiB": bytes.fromhex("80027d72ffffff0f2e"),
    "memo in protocol 0": b"}p999999999\n.",
    "tuple as key": proto2(b"}" + NESTED + b"Ns"),
    "tuple as key of a pair": proto2(b"ccollections\nOrderedDict\n]]" + NESTED + b"aNaa\x85R"),
    "tuple in a set": proto2(b"c__builtin__\nset\n]" + NESTED + b"a\x85R"),
    "tuple as byte order": proto2(b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R(K\x03" + NESTED + b"tb"),
    "text of 4 GiB": proto2(b"X\xff\xff\xff\xff"),
    "bytes of 16 EiB": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "bytearray of 16 EiB": b"\x80\x05\x96" + b"\xff" * 8 + b".",
    "frame of 16 EiB": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "number of many digits": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\xff" * 99 + b".",
    "keys of one hash": proto2(b"}(" + ONE_HASH + b"u"),
    "codec": proto2(b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00idna\x86R"),
    "bytearray of 100 GB": proto2(b"cbuiltins\nbytearray\n\x8a\x05\x00\xe8\x76\x48\x17\x85R"),
    "copies of a text": proto2(b"X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x000](" + COPY * 200 + b"e"),
    "no end": b"\x80\x02" + b"(" * 1000,
}  # fmt: skip


@contextlib.contextmanager
def bounded():
    """At most 2 seconds of CPU and 300 MiB more."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


@pytest.mark.parametrize("suffix", [".pkl", ".pdparams", ".pth", ".pth.tar"])
@pytest.mark.parametrize("what", BOMBS)
def test_small_files_that_hang_or_fill_memory(tmp_path: Path, what: str, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_bytes(BOMBS[what])
    with bounded(), pytest.raises(UserError, match=r"x\.p.*(not a whole|never run)"):
        interop.read(file)


def zipped(data: bytes, parts: dict[str, bytes] | None = None, *, deflate: bool = False) -> bytes:
    """An archive as torch writes it, with this pickle."""
    buffer = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **(parts or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.mark.parametrize("what", BOMBS)
def test_the_same_inside_of_an_archive(tmp_path: Path, what: str) -> None:
    (tmp_path / "x.pth").write_bytes(zipped(BOMBS[what]))
    with bounded(), pytest.raises(UserError, match=r"x\.pth.*(not a whole|never run)"):
        interop.read(tmp_path / "x.pth")


def storage(items: int, kind: bytes = b"FloatStorage", key: bytes = b"0") -> bytes:
    count = b"\x8a\x08" + items.to_bytes(8, "little", signed=True)
    name = b"X\x01\x00\x00\x00" + key
    return b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\n" + name + b"X\x03\x00\x00\x00cpu" + count + b"tQ"


def tensor(items: int, size: int, stride: int, offset: int = 0) -> bytes:
    numbers = [b"J" + struct.pack("<i", number) for number in (offset, size, stride)]
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(items) + numbers[0]
    return head + numbers[1] + b"\x85" + numbers[2] + b"\x85" + b"\x89ccollections\nOrderedDict\n)RtR"


def state_of(value: bytes) -> bytes:
    return proto2(b"}X\x01\x00\x00\x00w" + value + b"s")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (tensor(4, 4, 1), None),
        (tensor(400, 4, 1), "storage 0 has a different length"),  # torch would read what lies behind it in memory
        (tensor(-4, 4, 1), "length is not a number"),
        (tensor(4, 5, 1), "extends beyond its storage"),
        (tensor(4, 4, 1, offset=1), "extends beyond its storage"),
        (tensor(4, 2, 4), "extends beyond its storage"),
        (tensor(4, -1, 1), "shape is not described"),
        (tensor(4, 2**31 - 1, 0), "many times the size"),  # one number seen as 8 GiB
    ],
)
def test_tensors_are_those_of_their_storages(tmp_path: Path, value: bytes, message: str | None) -> None:
    (tmp_path / "x.pth").write_bytes(zipped(state_of(value), {"data/0": np.arange(4, dtype=np.float32).tobytes()}))
    if message is None:
        assert interop.read(tmp_path / "x.pth")["w"].tolist() == [0, 1, 2, 3]
        return
    with pytest.raises(UserError, match=message):
        interop.read(tmp_path / "x.pth")


def test_an_archive_that_inflates_a_thousandfold(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    data = {"data/0": bytes(1 << 26)}
    file.write_bytes(zipped(state_of(tensor(1 << 24, 4, 1)), data, deflate=True))
    assert file.stat().st_size < 1 << 17
    with bounded(), pytest.raises(UserError, match="inflates to many times its size"):
        interop.read(file)
    noise = np.random.default_rng(0).bytes(1 << 12)
    file.write_bytes(zipped(state_of(tensor(1 << 10, 4, 1)), {"data/0": noise}, deflate=True))  # packed by hand
    assert interop.read(file)["w"].numpy().tobytes() == noise[:16]


def test_archives_that_two_readers_could_understand_differently(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"w": torch.arange(4.0)}, file)
    good = file.read_bytes()
    names = {info.filename: info.header_offset for info in zipfile.ZipFile(file).infolist()}
    storage_at = names["x/data/0"]
    odd = {
        "bytes before": b"MZ" + good,
        "bytes after": good + b"\0",
        "comment": good[:-2] + b"\x01\x00x",
        "local name": good[: storage_at + 30] + b"y" + good[storage_at + 31 :],
        "end record gone": good[:-22],
        "two archives": good + good,
    }
    for data in odd.values():
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.pth is not a whole weights file"):
            interop.read(file)


def test_a_file_that_shares_lists_too_often(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]
    torch.save({"model": {"w": torch.zeros(1)}, "config": nested}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="too many values"):
        interop.read(tmp_path / "x.pth")


def test_attributes_of_a_dict_do_not_hide_its_methods(tmp_path: Path) -> None:
    state: Any = OrderedDict(w=torch.ones(2))
    state.get = state.keys = state.values = "hidden"
    torch.save(state, tmp_path / "x.pth")
    assert interop.read(tmp_path / "x.pth")["w"].tolist() == [1, 1]


def test_a_script_is_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(zipped(state_of(b"N"), {"constants.pkl": b"\x80\x02).", "code/a.py": b"1"}))
    with pytest.raises(UserError, match="TorchScript archive, which is never run"):
        interop.read(tmp_path / "x.pth")


def test_older_files_are_checked_too(tmp_path: Path) -> None:
    """torch before 1.6: storages follow the pickles; one that no tensor fills would hold whatever was in memory."""
    file = tmp_path / "x.pth"
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    good = file.read_bytes()
    assert interop.read(file)["a"].tolist() == [0, 1, 2, 3]
    for data in (good[:-1], good + b"\0", good[: len(good) // 2], good[:-8] + bytes(7) + good[-1:] + b"1"):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"x\.pth is not a whole weights file"):
            interop.read(file)


def test_what_a_run_cannot_read_again_is_not_written(tmp_path: Path) -> None:
    for state in ({"step": 1, (1, 2): 3}, {"step": 1, "x": {2**70: 1}}, {"step": 1, "x": np.float64(1)}):
        with pytest.raises(TypeError, match="plain Python types"):
            checkpoint.save(tmp_path, checkpoint.LATEST, state)
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_checked_quickly() -> None:
    """A network of 1000 tensors with two moments each is read without a thought about the bound."""
    tensors = {f"layer{k}.weight": torch.zeros(1) for k in range(1000)}
    adam = {
        k: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)} for k in range(1000)
    }
    buffer = io.BytesIO()
    torch.save({"model": tensors, "optimizer": adam}, buffer)
    data = zipfile.ZipFile(buffer).read("archive/data.pkl")
    machine = opcodes._Machine(io.BytesIO(data), len(data), opcodes.NAMES["torch"], 1 << 20, lambda *_: None)
    machine.run()
    assert machine.steps < opcodes.MOST_STEPS / 10


# model.pretrained


def build(pretrained: bool | str = False, **options: Any) -> models.Model:
    arguments = {"type": "tsn", "backbone": "resnet18", "num_class": 5, "num_segments": 2, "pretrained": pretrained}
    return models.build(**(arguments | options))


@pytest.fixture(scope="module")
def image_weights() -> dict[str, torch.Tensor]:
    from networks import BACKBONES

    torch.manual_seed(5)
    return BACKBONES["resnet18"](num_class=10).state_dict()


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        ("state_dict", "module."),
        ("model_state_dict", ""),
        ("model_state", "_orig_mod.module."),
        ("model", "_orig_mod."),
    ],
)
def test_pretrained_unwraps_what_convert_unwraps(
    tmp_path: Path, image_weights: dict, wrapper: str, prefix: str
) -> None:
    file = tmp_path / "model_best.pth.tar"
    named = {f"{prefix}{key}": value for key, value in image_weights.items()}
    torch.save({"epoch": 3, "arch": "resnet18", "best_acc1": 70.0, wrapper: named}, file)
    model = build(str(file))
    assert torch.equal(model.backbone.conv1.weight, image_weights["conv1.weight"])
    assert "its classifier is left out" in model.pretrained_note
    assert interop.what_is(file)[0] == "torchvision_timm"


def test_a_misfit_names_the_network_first(tmp_path: Path, image_weights: dict) -> None:
    torch.save(image_weights, tmp_path / "image.pth")
    with pytest.raises(
        UserError, match=r"does not fit: the file holds weights of resnet18, the model is resnet50; miss"
    ):
        build(str(tmp_path / "image.pth"), backbone="resnet50")
    torch.save(build(backbone="resnet34").state_dict(), tmp_path / "ours.pth")
    with pytest.raises(UserError, match="the file holds weights of resnet34, the model is resnet18"):
        build(str(tmp_path / "ours.pth"))
    with pytest.raises(UserError, match="the file holds weights of resnet18, the model is resnet50"):
        interop.load_weights(build(backbone="resnet50"), tmp_path / "image.pth")


def test_pretrained_refuses_what_is_not_finite(tmp_path: Path, image_weights: dict) -> None:
    broken = image_weights | {"conv1.weight": torch.full_like(image_weights["conv1.weight"], float("nan"))}
    torch.save(broken, tmp_path / "x.pth")
    with pytest.raises(UserError, match="NaN or infinity in: backbone.conv1.weight"):
        build(str(tmp_path / "x.pth"))


def test_a_method_that_ignores_pretrained_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from methods import _backbones, tsn

    monkeypatch.setattr(_backbones, "load", lambda model, *_: model)
    file = tmp_path / "x.pth"
    torch.save({"w": torch.ones(1)}, file)
    for value in (True, str(file)):
        with pytest.raises(UserError, match=r"model\.pretrained: tsn ignores it .*random weights; .*_backbones\.load"):
            build(value)
    assert isinstance(build(False), tsn.TSN)


def test_published_files_are_compared_with_their_hash(
    tmp_path: Path, image_weights: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older format has no checksum: one bit in the weights shows in the published sha256 only."""
    monkeypatch.setattr(fetch, "FOLDER", tmp_path)
    torch.save(image_weights, tmp_path / "new", _use_new_zipfile_serialization=False)
    file = tmp_path / f"resnet18-{files.sha256(tmp_path / 'new')[:8]}.pth"
    (tmp_path / "new").rename(file)
    monkeypatch.setitem(fetch.FILES, "resnet18", file.name)
    build(True)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.sha256", None)  # the same file is not hashed twice
        build(True)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    for read in (lambda: build(True), lambda: build(str(file)), lambda: interop.load_weights(build(), file)):
        with pytest.raises(UserError, match=rf"{file.name}: its sha256 does not begin with"):
            read()


@pytest.mark.parametrize("index", range(len(fuzz.seeds())))
def test_seeds_of_the_fuzz_target_are_valid(tmp_path: Path, index: int) -> None:
    assert fuzz.run(fuzz.seeds()[index], tmp_path) == "ok"


def test_arrays_of_a_pickle_share_bytes_within_bounds(tmp_path: Path) -> None:
    one = np.zeros(1 << 20, np.uint8)
    data = pickle.dumps({"a": one, "b": one}, 4)
    (tmp_path / "x.pkl").write_bytes(data)
    assert interop.read(tmp_path / "x.pkl")["b"].shape == (1 << 20,)


def test_a_file_that_this_user_may_not_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # root, who runs tests in containers, may read everything

    path = tmp_path / "weights.pth"
    path.write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match="weights.pth: this user may not read it") as caught, weights_file.opened(path):
        pass
    assert not isinstance(caught.value, weights_file.DamagedWeights)
