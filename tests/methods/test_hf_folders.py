"""Hugging Face folders and the authors' files of VideoMAE and V-JEPA 2: logits, strictness, hostile folders."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from methods import interop
from methods.interop import hf
from tests import hf_folders, models
from utils.errors import UserError

# Logits of transformers 5.24 (float64) on these folders and `clips`.
GOLDEN = {
    "videomae": ([0.02086650, -0.18262792, -0.23271200, -0.01209944, -0.24482469], "videomae", {}),
    "first token": (
        [0.00453703, -0.32842780, 0.20199981, 0.10847315, 0.26065000],
        "videomae",
        {"use_mean_pooling": False, "layer_norm_eps": 1e-3},
    ),
    "no biases": (
        [0.02310208, -0.17976939, -0.26326100, -3.028e-05, -0.21328598],
        "videomae",
        {"qkv_bias": None, "qv_bias": False},
    ),
    "vjepa2": ([-0.26171267, -0.02110026, -0.00625710, -0.06778756, 0.06969657], "vjepa2", {}),
    "vjepa2, no biases": (
        [-0.24709806, -0.02981822, -0.00157964, -0.06226328, 0.08255441],
        "vjepa2",
        {"qkv_bias": False},
    ),
}


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return (hf_folders.value("clips", (2, 4, 3, 32, 32)) * 20).transpose(1, 2)  # (B, T, C, H, W) -> (B, C, T, H, W)


def logits(net: nn.Module, clips: Tensor) -> Tensor:
    with torch.no_grad():
        return net.double().eval()(clips.double())


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("shards", [1, 3])
def test_logits_of_transformers(case: str, shards: int, clips: Tensor, tmp_path: Path) -> None:
    expected, kind, changes = GOLDEN[case]
    model = models.from_pretrained(hf_folders.write(tmp_path / "f", kind, shards=shards, **changes))
    torch.testing.assert_close(logits(model, clips)[0], torch.tensor(expected).double(), rtol=0, atol=2e-8)


def test_both_spellings_of_the_biases(clips: Tensor, tmp_path: Path) -> None:
    state = hf_folders.tensors("videomae")
    new = {name.replace("q_bias", "query.bias").replace("v_bias", "value.bias"): one for name, one in state.items()}
    bare = {name.removeprefix("videomae."): one for name, one in new.items()}  # of an encoder alone
    expected = logits(models.from_pretrained(hf_folders.write(tmp_path / "old", "videomae")), clips)
    for name, other in (("new", new), ("bare", bare)):
        model = models.from_pretrained(hf_folders.write(tmp_path / name, "videomae", state=other))
        assert torch.equal(logits(model, clips), expected)
    both = state | {"videomae.encoder.layer.0.attention.attention.query.bias": torch.zeros(24)}
    with pytest.raises(UserError, match=r"unexpected: videomae.encoder.layer.0.attention.attention.query.bias"):
        models.from_pretrained(hf_folders.write(tmp_path / "both", "videomae", state=both))


def test_original_videomae_is_the_same_network(clips: Tensor, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "hf", "videomae")
    state = hf_folders.original_videomae(hf_folders.tensors("videomae"))
    wrapped = {"module": state, "epoch": 3}, {"model": {f"module.{key}": one for key, one in state.items()}}
    one = models.from_pretrained(folder)
    for number, content in enumerate(wrapped):
        file = tmp_path / f"{number}.pth"
        torch.save(content, file)
        assert interop.what_is(file) == (
            "videomae",
            {
                "type": "videomae", "backbone": "vit3d", "width": 24, "depth": 2, "mlp_ratio": 2.5, "patch": 8,
                "num_class": 5, "eps": 1e-6, "head_eps": 1e-6,
            },
        )  # fmt: skip
        with pytest.raises(UserError, match=r"it does not show heads; pass it in the call"):
            models.from_pretrained(file)
        other = models.from_pretrained(file, heads=3, num_segments=4)
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])
        assert {norm.eps for norm in other.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    assert one.fc_norm.eps == 1e-5
    assert one.backbone.blocks[0].norm1.eps == 1e-12


def test_original_vjepa2_files_are_the_same_network(tmp_path: Path) -> None:
    model = models.from_pretrained(hf_folders.write(tmp_path / "hf", "vjepa2"))
    encoder, probe = hf_folders.original_vjepa2(hf_folders.tensors("vjepa2"))
    torch.save(encoder, tmp_path / "encoder.pt")
    torch.save(probe, tmp_path / "probe.pt")
    options = {"heads": 4, "num_segments": 4, "pooler_layers": 2}
    alone = models.from_pretrained(tmp_path / "encoder.pt", 5, **options)
    assert "newly initialised: pooler.query_tokens" in alone.pretrained_note
    assert alone.carried.keys() == model.carried.keys()
    assert all(torch.equal(alone.carried[name], one) for name, one in model.carried.items())
    both = interop.open_weights(tmp_path / "encoder.pt").tensors | interop.open_weights(tmp_path / "probe.pt").tensors
    with pytest.raises(
        UserError, match=r"need head_eps: 1e-05, the model has 1e-06.*pooler_heads: 16.*set model.kwargs"
    ):
        interop.load_tensors(alone, both, tmp_path / "encoder.pt")
    report = interop.load_tensors(alone, both, tmp_path / "encoder.pt", accept=("head_eps", "pooler_heads"))
    assert report.skipped == ["pos_embed"]
    assert not report.missing
    assert len(report.carried) == len(model.carried)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name
    with pytest.raises(UserError, match="missing: backbone"):
        interop.load_weights(alone, tmp_path / "probe.pt")


def test_a_giant_probe_needs_to_be_told_its_heads(tmp_path: Path) -> None:
    small = {"hidden_size": 1408, "num_hidden_layers": 1, "num_attention_heads": 22, "mlp_ratio": 0.1}
    small |= {"num_pooler_layers": 0, "pred_num_hidden_layers": 0}
    _, probe = hf_folders.original_vjepa2(hf_folders.tensors("vjepa2", hf_folders.VJEPA2 | small))
    options = {"backbone": "vit3d", "width": 1408, "depth": 1, "mlp_ratio": 0.1, "heads": 22, "pooler_layers": 0}
    options |= {"num_class": 5, "num_segments": 4, "head_eps": 1e-5, "patch": 8}
    state = {name.removeprefix("module."): one for name, one in probe["classifiers"][0].items()}
    with pytest.raises(
        UserError, match=r"neither the file nor a rule decides pooler_heads \(16 by the authors' recipe, 22"
    ):
        interop.load_tensors(models.build(type="vjepa2", **options), state, Path("g.pt"))
    for heads in (16, 22):
        report = interop.load_tensors(
            models.build(type="vjepa2", **options, pooler_heads=heads), state, Path("g.pt"), strict=False
        )
        assert "pooler.cross.kv.weight" in report.loaded


def test_later_networks_are_refused_with_the_reason(tmp_path: Path) -> None:
    encoder, _ = hf_folders.original_vjepa2(hf_folders.tensors("vjepa2"))
    encoder["target_encoder"]["module.backbone.norms_block.0.weight"] = torch.zeros(48)
    torch.save({"ema_encoder": encoder["target_encoder"]}, tmp_path / "vjepa2_1.pt")
    with pytest.raises(UserError, match=r"vjepa2_1.pt: the file holds V-JEPA 2.1, a different network"):
        models.from_pretrained(tmp_path / "vjepa2_1.pt", 5)


def test_pre_trained_weights_leave_the_head_new(tmp_path: Path) -> None:
    state = hf_folders.tensors("videomae", hf_folders.VIDEOMAE | {"use_mean_pooling": False})
    encoder = {name: one for name, one in state.items() if not name.startswith("classifier.")}
    extra = {"decoder.norm.weight": torch.zeros(3), "mask_token": torch.zeros(1, 1, 3)}
    folder = hf_folders.write(tmp_path / "pre", "videomae", state=encoder | extra, use_mean_pooling=False)
    with pytest.raises(UserError, match="it does not show num_class"):
        models.from_pretrained(folder)
    first = models.from_pretrained(folder, 7)
    assert first.pooling == "first"
    mean = models.from_pretrained(folder, 7, pooling="mean")
    assert "skipped: decoder.norm.weight, mask_token, backbone.norm.weight" in mean.pretrained_note
    assert "newly initialised: fc_norm.weight, fc_norm.bias, classifier.weight" in mean.pretrained_note
    assert torch.equal(mean.backbone.blocks[1].attn.q_bias, first.backbone.blocks[1].attn.q_bias)


def test_another_number_of_classes_leaves_the_classifier_new(tmp_path: Path) -> None:
    model = models.from_pretrained(hf_folders.write(tmp_path / "f", "vjepa2"), num_class=9)
    assert model.classifier.out_features == 9
    assert "newly initialised: classifier.weight, classifier.bias" in model.pretrained_note
    assert torch.equal(model.pooler.query_tokens, hf_folders.tensors("vjepa2")["pooler.query_tokens"])


def test_pretrained_of_a_config_is_strict_about_options(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "f", "videomae")
    arguments = {"type": "videomae", "backbone": "vit3d", "width": 24, "depth": 2, "heads": 3, "mlp_ratio": 2.5}
    arguments |= {"patch": 8, "num_class": 5, "num_segments": 4}
    with pytest.raises(UserError, match=r"set model.kwargs: \{eps: 1e-12, head_eps: 1e-05\}"):
        models.build(**arguments, pretrained=str(folder))
    with pytest.raises(UserError, match=r"set model.kwargs: \{heads: 3\}"):
        models.build(**arguments | {"heads": 4}, eps=1e-12, head_eps=1e-5, pretrained=str(folder))
    with pytest.raises(UserError, match=r"need pooling: mean, the model has first"):
        models.build(**arguments, eps=1e-12, pooling="first", pretrained=str(folder))
    model = models.build(**arguments, eps=1e-12, head_eps=1e-5, pretrained=str(folder))
    assert torch.equal(model.classifier.bias, hf_folders.tensors("videomae")["classifier.bias"])
    assert model.pretrained.initial["licence"] == "cc-by-nc-4.0"


@pytest.mark.parametrize("kind", ["videomae", "vjepa2"])
def test_a_probe_takes_the_encoder_alone(kind: str, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "f", kind)
    arguments = dict(hf.read_folder(folder).model)
    # The file's head has other options, which are of no concern here.
    options = {
        key: one for key, one in arguments.items() if key not in ("type", "head_eps", "pooler_heads", "pooler_layers")
    }
    options |= {"type": "probe", "encoder": kind, "head": "linear"}
    model = models.build(**options, pretrained=str(folder))
    whole = models.from_pretrained(folder)
    torch.save({"model": whole.state_dict()}, tmp_path / "ours.pth")
    again = models.build(**options, pretrained=str(tmp_path / "ours.pth"))
    for name, tensor in whole.backbone.state_dict().items():
        assert torch.equal(tensor, model.backbone.state_dict()[name])
        assert torch.equal(tensor, again.backbone.state_dict()[name])
    assert "skipped: " in model.pretrained_note
    assert model.pretrained.labels is None
    with pytest.raises(UserError, match=r"set model.kwargs: \{eps: "):
        models.build(**options | {"eps": 0.1}, pretrained=str(folder))


def test_a_file_of_a_folder_needs_the_folder(tmp_path: Path) -> None:
    file = hf_folders.write(tmp_path / "f", "videomae") / "model.safetensors"
    with pytest.raises(UserError, match="name its folder, whose config.json does"):
        models.from_pretrained(file, heads=3)


def test_our_checkpoint_remembers_its_options(tmp_path: Path) -> None:
    model = models.from_pretrained(hf_folders.write(tmp_path / "f", "videomae"))
    kwargs = {"width": 24, "depth": 2, "heads": 3, "mlp_ratio": 2.5, "patch": 8, "eps": 1e-12, "head_eps": 1e-5}
    config = {"model": {"type": "videomae", "backbone": "vit3d", "num_class": 5, "num_segments": 4, "kwargs": kwargs}}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "ours.pth.tar")
    again = models.from_pretrained(tmp_path / "ours.pth.tar")
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())
    assert again.fc_norm.eps == 1e-5
    with pytest.raises(UserError, match=r"ours.pth.tar does not fit the model: .*set model.kwargs: \{eps: 1e-12\}"):
        models.from_pretrained(tmp_path / "ours.pth.tar", eps=1e-6)


class _Canary:
    """Makes a folder when its pickle is run."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_code_and_pickles_are_never_run(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "code", "videomae", auto_map={"AutoModel": "modeling.Evil"})
    with pytest.raises(UserError, match="code: auto_map in its config.json asks for code to be run"):
        models.from_pretrained(folder)
    folder = hf_folders.write(tmp_path / "brings", "videomae")
    (folder / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=r"it contains code \(modeling.py\)"):
        models.from_pretrained(folder)
    folder = hf_folders.write(tmp_path / "pickled", "videomae")
    canary = tmp_path / "CANARY"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": _Canary(canary)}))
    models.from_pretrained(folder)  # the safetensors file is read, the other is not looked at
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model.safetensors; pytorch_model.bin is not read"):
        models.from_pretrained(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("videomae", {"hidden_size": 10**9}, "hidden_size is 1000000000, and must be a whole number from 1 to 65,536"),
        ("videomae", {"hidden_size": 48}, r"has width 48, and the tensors of its folder show width 24"),
        ("videomae", {"num_hidden_layers": 9999}, r"has depth 9999, .* show depth 2"),
        ("videomae", {"num_attention_heads": 5}, "width 24 is not a multiple of the 5 heads"),
        ("videomae", {"layer_norm_eps": "0"}, "layer_norm_eps is '0', and must be a number above 0"),
        ("videomae", {"layer_norm_eps": float("nan")}, "layer_norm_eps is nan, and must be"),
        ("videomae", {"image_size": [32, 64]}, "the same for height and width"),
        ("videomae", {"qkv_bias": "yes"}, "must be true or false"),
        ("videomae", {"qkv_bias": False}, "q and v biases False, and the tensors"),
        ("videomae", {"hidden_act": "gelu_new"}, "only networks with 'gelu' are built here"),
        ("videomae", {"model_type": "timesformer"}, "model_type is 'timesformer', and folders of videomae, vjepa2"),
        ("videomae", {"id2label": {"0": "a"}}, "has classes 1, and the tensors of its folder show classes 5"),
        ("videomae", {"id2label": {"1": "a"}}, "id2label is .*must be an object of the names of the classes 0, 1, 2"),
        ("vjepa2", {"num_pooler_layers": 4}, "has num_pooler_layers 4, and .* show num_pooler_layers 2"),
        ("vjepa2", {"num_pooler_layers": 60}, "num_pooler_layers is 60, and must be a whole number from 0 to 4"),
        ("vjepa2", {"mlp_ratio": 4.0}, "has mlp 192, and the tensors of its folder show mlp 144"),
    ],
)
def test_configs_that_contradict_their_tensors(kind: str, changes: dict, message: str, tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "f", kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        models.from_pretrained(folder)


def test_a_deep_network_of_crumbs_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """A thousand blocks, of which the file holds one number each."""
    state = hf_folders.tensors("videomae")
    stem = "videomae.encoder.layer"
    state |= {f"{stem}.{number}.layernorm_before.bias": torch.zeros(1) for number in range(2, 1000)}
    folder = hf_folders.write(tmp_path / "f", "videomae", state=state)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1000}))
    with pytest.raises(UserError, match="it does not hold the network that it describes: missing: backbone.blocks.2"):
        models.from_pretrained(folder)


def test_damaged_folders(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "f", "videomae", shards=2)
    index = folder / hf.INDEX
    good = json.loads(index.read_text())
    for content, message in (
        ('{"weight_map": {"a": "../evil.safetensors"}}', "is not the name of a safetensors file next to it"),
        ('{"weight_map": {"a": "model-00001-of-00002.bin"}}', "is not the name of a safetensors file next to it"),
        ('{"weight_map": 3}', "it has no weight_map"),
        ("[" * 100_000, "not valid JSON"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "its tensors are not those that"),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors: no such file"),
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=message):
            models.from_pretrained(folder)
    index.write_text(json.dumps(good))
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="holds both model.safetensors and model.safetensors.index.json"):
        models.from_pretrained(folder)
    (folder / "config.json").write_bytes(b" " * (9 << 20))
    with pytest.raises(UserError, match=r"config.json: 9,437,184 bytes, and such a file has fewer"):
        models.from_pretrained(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(UserError, match="holds neither ckpt_best.pth.tar"):
        models.from_pretrained(folder)


def test_nan_is_refused(tmp_path: Path) -> None:
    state = hf_folders.tensors("vjepa2")
    state["pooler.query_tokens"][0, 0, 3] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity in: pooler.query_tokens"):
        models.from_pretrained(hf_folders.write(tmp_path / "f", "vjepa2", state=state))
