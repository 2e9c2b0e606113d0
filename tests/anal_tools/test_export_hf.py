"""From a Hugging Face folder through training, eval, predict and convert to a folder that is the same network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import main
import methods
from tests import hf_folders
from tests.datasets.videos import write_video
from utils import checkpoint

pytestmark = pytest.mark.system
NAMES = ["run", "jump", "sit", "stand", "fall"]
OPTIONS = {
    "videomae": "width: 24, depth: 2, heads: 3, mlp_ratio: 2.5, patch: 8, eps: 1.0e-12, head_eps: 1.0e-05",
    "vjepa2": "width: 48, depth: 2, heads: 4, mlp_ratio: 3.0, patch: 8, pooler_layers: 2",
    "probe": "width: 48, depth: 2, heads: 4, mlp_ratio: 3.0, patch: 8, pooler_layers: 1, lr_mults: [1, 0.1]",
}
CONFIG = """\
common:
    model: {{type: {kind}, backbone: vit3d, num_segments: 4, num_class: 5, dropout: 0, kwargs: {{{options}}}}}
    augmentation: {{input_size: 32, test_resize: 36}}
    data: {{reader: video, sampling: tsn, class_names: {data}/classes.txt}}
    workers: 0
    batch_size: 2
    lr_scheduler: {{type: COSINE, base_lr: 0.001, max_iter: 1}}
    val_freq: 1
    train_root: {data}
    train_source: {data}/k400/train.txt
    val_root: {data}
    val_source: {data}/k400/val.txt
    published: {{top1: 81.5, protocol: 5 clips x 3 crops, source: a paper}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_video(root / "a.mp4", "libx264", 20)
    write_video(root / "b.mp4", "mpeg4", 16)
    (root / "k400").mkdir()
    (root / "classes.txt").write_text("\n".join(NAMES))
    (root / "k400" / "train.txt").write_text("a.mp4 3\nb.mp4 1\n")
    (root / "k400" / "val.txt").write_text("b.mp4 1\na.mp4 3\n")
    return root


def experiment(folder: Path, data: Path, kind: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.format(kind=kind, options=OPTIONS[kind], data=data))
    return folder


def run(*argv: object) -> int:
    return main.main([str(word) for word in argv])


@pytest.mark.parametrize("kind", ["videomae", "vjepa2"])
def test_round_trip(kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = "---\nlicense: cc-by-nc-4.0\n---\n# weights of Kinetics-710\n"
    folder = hf_folders.write(tmp_path / "given", kind, labels=NAMES, card=card)
    exp = experiment(tmp_path / "exp", data, kind)

    # Evaluated, used and trained as it is
    assert run("eval", exp, "--checkpoint", folder, "--crop-size", "64", "--scale", "64") == 0
    shown = capsys.readouterr().out
    assert "WARNING: the initial weights given name Kinetics-710" in shown
    assert "REMARK: frames of 64 pixels are 2 times the 32 pixels that training clips have" in shown
    assert "1 clip(s) x 1 crop(s) of 64; published: 81.5 with 5 clips x 3 crops (a paper); different views" in shown
    assert run("predict", exp, data / "a.mp4", "--checkpoint", folder, "--out", tmp_path / "p") == 0
    assert json.loads((tmp_path / "p" / "infer.json").read_text())["classes"] == NAMES
    assert main.train(exp, overrides=[f"common.model.pretrained={folder}"]) == 0
    log = (exp / "log.txt").read_text()
    assert "licence of the initial weights given: CC-BY-NC 4.0, which forbids commercial use" in log
    assert 'WARNING start: remark message="the initial weights given name Kinetics-710 as training data' in log
    assert checkpoint.load(exp / checkpoint.BEST)["initial"]["licence"] == "cc-by-nc-4.0"

    # Exported
    assert run("eval", exp, "--checkpoint", "best") == 0
    capsys.readouterr()
    sets = ["--set", f"common.model.pretrained={folder}"]
    out = tmp_path / "out"
    assert run("export", exp, "--to", "hf", out, *sets) == 0
    shown = capsys.readouterr().out
    assert "bit-equal" in shown
    assert "2 of 2 videos: largest difference of a logit 0 " in shown
    assert "which forbids commercial use" in shown
    assert ("predictor is not in the folder" in shown) is False
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    given, written = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert given.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in given.items() if ".predictor." in name)
    trained = checkpoint.load(exp / checkpoint.BEST)["model"]
    again = methods.from_pretrained(out)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in trained.items())
    config, before = (json.loads((place / "config.json").read_text()) for place in (out, folder))
    assert {key: config[key] for key in before} == before
    text = (out / "README.md").read_text()
    assert text.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: video-classification\nlicense: cc-by-nc-4.0\n"
    )
    for part in ("| best | val.txt", "1 view(s) of 4 frames", "% interval", "base_lr", "sha256", "CC-BY-NC 4.0"):
        assert part in text
    assert str(tmp_path) not in text
    assert str(data) not in text

    # Converted, from the folder that was exported
    assert run("convert", out, "--config", exp, "--out", tmp_path / "ours.pth.tar") == 0
    converted = checkpoint.load(tmp_path / "ours.pth.tar")["model"]
    assert all(torch.equal(tensor, converted[name]) for name, tensor in trained.items())


def test_label_order(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turned = [*NAMES[1:], NAMES[0]]
    folder = hf_folders.write(tmp_path / "turned", "videomae", labels=turned)
    exp = experiment(tmp_path / "exp", data, "videomae")
    for argv in (["eval", exp, "--checkpoint", folder], ["train", exp, "--set", f"common.model.pretrained={folder}"]):
        assert run(*argv) == 2
        assert "its classes are not in the order of the list: 5 of 5" in capsys.readouterr().err
    assert run("convert", folder, "--config", exp, "--out", tmp_path / "ours.pth.tar") == 0
    assert "5 rows are now in the order of the list's class names" in capsys.readouterr().out
    state = checkpoint.load(tmp_path / "ours.pth.tar")
    bias = hf_folders.tensors("videomae")["classifier.bias"]
    assert torch.equal(state["model"]["classifier.bias"], bias[[4, 0, 1, 2, 3]])
    assert run("eval", exp, "--checkpoint", tmp_path / "ours.pth.tar") == 0


def test_original_encoder_and_probe_are_joined(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = experiment(tmp_path / "exp", data, "vjepa2")
    encoder, probe = hf_folders.original_vjepa2(hf_folders.tensors("vjepa2"))
    files = tmp_path / "encoder.pt", tmp_path / "probe.pt"
    torch.save(encoder, files[0])
    torch.save(probe, files[1])
    words = ["convert", files[0], "--probe", files[1], "--config", exp, "--out", tmp_path / "ours.pth.tar"]
    assert run(*words) == 2
    assert "set model.kwargs: {head_eps: 1e-05, pooler_heads: 16}" in capsys.readouterr().err
    sets = ["--set", "common.model.kwargs.head_eps=1e-5", "--set", "common.model.kwargs.pooler_heads=16"]
    assert run(*words, *sets) == 0
    assert "carried for export" in capsys.readouterr().out
    model = checkpoint.load(tmp_path / "ours.pth.tar")["model"]
    expected = methods.from_pretrained(hf_folders.write(tmp_path / "hf", "vjepa2")).state_dict()
    assert all(torch.equal(tensor, model[name]) for name, tensor in expected.items())
    # The predictor comes from the encoder's file, and transformers has no pooler with other heads.
    assert run("export", tmp_path / "ours.pth.tar", "--to", "hf", tmp_path / "out") == 2
    assert "transformers gives the pooler the 4 heads of the encoder" in capsys.readouterr().err
    folder = hf_folders.write(tmp_path / "same", "vjepa2")
    assert run("convert", folder, "--config", exp, "--out", tmp_path / "b.pth.tar") == 0
    words = ["export", tmp_path / "b.pth.tar", "--to", "hf", tmp_path / "out", "--predictor", files[0]]
    assert run(*words) == 0
    written, given = (load_file(place / "model.safetensors") for place in (tmp_path / "out", folder))
    assert given.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in given.items())


def test_what_cannot_be_exported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests import weights

    (data / "lists").mkdir(exist_ok=True)
    for name in ("train", "val"):
        (data / "lists" / f"{name}.txt").write_text("a.mp4 3\n")
    tsn = weights.make(tmp_path / "tsn", data)
    assert run("export", tsn, "--to", "hf", tmp_path / "out") == 2
    assert "transformers has no network for tsn; it has those of videomae, vjepa2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    folder = hf_folders.write(tmp_path / "f", "videomae")
    assert run("predict", folder, data / "a.mp4", "--out", tmp_path / "p") == 2
    assert "a Hugging Face folder does not define how frames are sampled" in capsys.readouterr().err
    assert run("export", folder, "--to", "hf", tmp_path, "--out", tmp_path) == 2
    assert "give the target only once" in capsys.readouterr().err


def test_an_epsilon_that_transformers_does_not_have(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = experiment(tmp_path / "exp", data, "videomae")
    text = (exp / "config.yaml").read_text().replace("head_eps: 1.0e-05", "head_eps: 0.1")
    (exp / "config.yaml").write_text(text)
    assert main.train(exp) == 0
    assert run("export", exp, "--to", "hf", tmp_path / "out") == 2
    assert "nothing was written. transformers' norm after the mean has head_eps: 1e-5" in capsys.readouterr().err
    assert [place.name for place in tmp_path.iterdir()] == ["exp"]


def test_a_probe_is_exported_with_its_best_head(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hf_folders.write(tmp_path / "given", "vjepa2")
    exp = experiment(tmp_path / "exp", data, "probe")
    assert main.train(exp, overrides=[f"common.model.pretrained={folder}"]) == 0
    sets = ["--set", f"common.model.pretrained={folder}"]
    assert run("export", exp, "--to", "hf", tmp_path / "out", *sets) == 0
    assert "2 of 2 videos: largest difference of a logit 0 " in capsys.readouterr().out
    state = checkpoint.load(exp / checkpoint.BEST)["model"]
    again = methods.from_pretrained(tmp_path / "out")
    head = f"heads.{int(state['best'])}"
    for name, tensor in again.state_dict().items():
        theirs = {"pooler.": f"{head}.features.", "classifier.": f"{head}.classifier."}
        part = next((part for part in theirs if name.startswith(part)), "")
        assert torch.equal(tensor, state[theirs[part] + name.removeprefix(part) if part else name])
    assert again.carried
