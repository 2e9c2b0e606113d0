"""export: every method as ONNX and as torch.export file gives the same logits for any batch; predict runs the ONNX."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import main
from anal_tools import export
from anal_tools.predict import predictor
from tests import models, weights
from tests.datasets.videos import write_video
from utils.dist import World
from utils.errors import UserError

METHODS = {
    "tsn": {},
    "tsm": {},
    "slowonly": {},
    "slowfast": {"num_segments": 8, "alpha": 4},
    "tpn": {},
    "pptsn": {},
    "pptsm": {},
    "tpn-tsm": {"type": "tpn", "base": "tsm"},
    "tpn-fcn": {"type": "tpn", "fcn_pool": 1, "scales": (2, 4)},
    "tsm-mobilenet": {"type": "tsm", "backbone": "mobilenetv2"},
    "tsm-non-local": {"type": "tsm", "non_local": "embedded_gaussian"},
    "tsm-pool": {"type": "tsm", "temporal_pool": True},
}
SIDE = 46  # odd maps on the way: padding, and the pooling shortcuts of ResNet-vd


def small(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model whose branches all count, and three clips."""
    torch.manual_seed(2)
    options = {"type": name, "backbone": "resnet18", "num_class": 5, "num_segments": 4} | METHODS[name]
    model = models.build(**options)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and not norm.weight.any():
            nn.init.ones_(norm.weight)
    nn.init.normal_(model.classifier.weight, std=0.5)
    return export.export_form(model), torch.randn(3, 3, options["num_segments"], SIDE, SIDE)


def same(net: nn.Module, exported: nn.Module, clips: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = net(clips)
        for batch in (clips, clips[:1]):
            torch.testing.assert_close(exported(batch), expected[: len(batch)], rtol=1e-4, atol=1e-5)


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """Tracing is slow: one method of images and one of clips in `make test`, the others in the night."""
    return [pytest.mark.slow, *([] if name in ("tsm", "slowfast") else [pytest.mark.nightly])]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=marks_of(name)) for name in METHODS])
def program(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor, dict, torch.export.ExportedProgram]:
    """A method's network, clips, metadata and the graph that both files are made of: tracing is slow, so once each."""
    net, clips = small(request.param)
    metadata = {"input": ["batch", *clips.shape[1:]]}
    with export.quiet():
        return net, clips, metadata, export.traced(net, metadata)


def test_torch_file(program: tuple, tmp_path: Path) -> None:
    net, clips, metadata, graph = program
    with export.quiet():
        export.write_torch(graph, metadata, tmp_path / "m.pt2")
        extra = {"zoetrope.json": ""}
        read = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    same(net, read.module(), clips)
    assert json.loads(extra["zoetrope.json"]) == metadata


@pytest.fixture(scope="module")
def onnx_extra() -> None:
    """What writes and runs ONNX files."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="ONNX is not installed (pip install '.[export]')")


def test_onnx_file(onnx_extra: None, program: tuple, tmp_path: Path) -> None:
    net, clips, metadata, graph = program
    with export.quiet():
        export.write_onnx(graph, metadata, tmp_path / "m.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]  # weights inside
    session, text = predictor.session(tmp_path / "m.onnx")
    same(net, session, clips)
    assert json.loads(text) == metadata


@pytest.fixture(scope="module")
def exported(onnx_extra: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An experiment, its ONNX file, and a folder with two videos and a broken one."""
    root = tmp_path_factory.mktemp("exported")
    (root / "lists").mkdir()
    write_video(root / "a.mp4", "libx264", 20)
    write_video(root / "b.mp4", "mpeg4", 16)
    (root / "broken.mp4").write_bytes(b"no video")
    for name in ("train", "val"):
        (root / "lists" / f"{name}.txt").write_text("a.mp4 3\nbroken.mp4 0\n")
    exp = weights.make(root / "exp", root)
    assert main.main(["export", str(exp), "--to", "onnx"]) == 0
    return exp, exp / "results" / "tsn_resnet18.onnx", root


def test_clips_of_a_list_with_several_labels(exported: tuple[Path, Path, Path], tmp_path: Path) -> None:
    exp, _, root = exported
    (tmp_path / "several.txt").write_text("a.mp4\t20\t3\t1\nb.mp4\t16\t2\n")
    sets = ["loss=bce", "data.list_layout=path_frames_labels", f"val_source={tmp_path / 'several.txt'}"]
    args = argparse.Namespace(check=[], target=exp, set=sets)
    predictor: Any = None  # it is not asked
    sources = export.clips_to_check(args, predictor)
    assert [Path(source.path) for source in sources] == [root / "a.mp4", root / "b.mp4"]


def infer(out: Path) -> dict:
    return json.loads((out / "infer.json").read_text())


def test_predict_runs_it_and_sees_the_same(exported: tuple[Path, Path, Path], tmp_path: Path) -> None:
    exp, file, root = exported
    runs = {
        "torch": [exp],
        "onnx": [exp, "--engine", "onnx", "--model", file],
        "alone": [file],
    }
    for name, words in runs.items():
        argv = ["predict", *words, root / "a.mp4", root / "b.mp4", "--logits", "--out", tmp_path / name]
        assert main.main([str(word) for word in argv]) == 0
    expected = infer(tmp_path / "torch")["videos"]
    for name in ("onnx", "alone"):
        predictions = infer(tmp_path / name)
        assert predictions["model"]["engine"] == "onnx"
        assert predictions["classes"] == weights.NAMES
        for one, two in zip(expected, predictions["videos"], strict=True):
            assert [top["label"] for top in one["top"]] == [top["label"] for top in two["top"]]
            assert np.abs(np.array(one["logits"]) - np.array(two["logits"])).max() <= 1e-4


def test_the_file_carries_its_preprocessing(exported: tuple[Path, Path, Path]) -> None:
    _, file, _ = exported
    _, text = predictor.session(file)
    metadata = json.loads(text)
    assert metadata["input"] == ["batch", 3, 2, 32, 32]
    assert metadata["views"]["sampling"]["preset"] == "tsn"
    assert metadata["views"]["scale"] == 36
    assert metadata["mean"] == [0.485, 0.456, 0.406]
    assert metadata["classes"] == weights.NAMES


def test_it_gets_its_name_only_when_it_agrees(
    exported: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exp, _, root = exported
    out = tmp_path / "m.pt2"
    arguments = ["export", str(exp), "--to", "torch", "--out", str(out)]
    assert main.main([*arguments, "--check", str(root / "broken.mp4")]) == 2
    assert "none of the videos to check could be read" in capsys.readouterr().err
    monkeypatch.setattr(export, "TOLERANCE", 0.0)  # nothing can hold this: the path of a refusal
    monkeypatch.setattr(export, "traced", spoiled(export.traced))
    assert main.main(arguments) == 2
    assert "the exported file's logits differ by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert main.main([*arguments, "--check", str(root / "a.mp4")]) == 0
    assert "1 of 1 videos: largest difference" in capsys.readouterr().out
    assert out.is_file()


def spoiled(traced):
    """Traces a model whose classifier was changed a little."""

    def wrong(net: nn.Module, metadata: dict) -> torch.export.ExportedProgram:
        return traced(net_with_another_bias(net), metadata)

    return wrong


def net_with_another_bias(net: nn.Module) -> nn.Module:
    other = copy.deepcopy(net)
    classifier = other.get_submodule("classifier")
    assert isinstance(classifier, nn.Linear)
    classifier.bias.data += 0.01
    return other


def test_other_files_are_refused(exported: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import onnx

    exp, file, root = exported
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match=r"text.onnx: onnxruntime cannot load it"):
        predictor.from_onnx(tmp_path / "text.onnx", World())
    model = onnx.load(str(file))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))
    with pytest.raises(UserError, match=r"bare.onnx: it holds no metadata about its input"):
        predictor.from_onnx(tmp_path / "bare.onnx", World())
    argv = ["predict", exp, root / "a.mp4", "--engine", "onnx", "--model", file, "--out", tmp_path]
    assert main.main([str(word) for word in [*argv, "--set", "augmentation.test_resize=40"]]) == 2


def test_a_folder_in_the_way_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "dir.onnx").mkdir()
    with pytest.raises(UserError, match=r"dir\.onnx is a folder; give the name of a file as --out"):
        main_export(tmp_path / "no_experiment", tmp_path / "dir.onnx")
    with pytest.raises(UserError, match=r"must end in \.onnx"):
        main_export(tmp_path / "no_experiment", tmp_path / "x.pt2")


def main_export(exp: Path, out: Path) -> int:
    return export.main([str(exp), "--to", "onnx", "--out", str(out)])
