"""Build a predictor: a network and everything that turns a video into its input, from a checkpoint or an export."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.lists.class_names import read_class_names
from datasets.loading.base import LoaderOptions
from datasets.loading.loader import loader_options
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec, eval_spec
from datasets.readers import ReaderSpec
from utils import files, renamed
from utils.config.schema import Data
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from anal_tools.evaluate.network import CheckpointContent
    from utils.config import Config
    from utils.dist import World

ModelMetadata = dict[str, Any]  # the JSON in an exported file; docs/predict.md has its keys
ONNX_KEY = "zoetrope"  # the key of an ONNX file's metadata under which anal_tools/export.py puts its metadata


@dataclass(frozen=True)
class Predictor:
    """Hold a network in evaluation mode, with its preprocessing.

    Attributes:
        net: (N, C, T, H, W) float -> logits (N, K).
        spec: the views of a video.
        normalise: uint8 (N, T, H, W, C) -> the input of `net`.
        autocast: returns the mixed-precision region of a forward pass.
        classes: names of the K classes.
        options: how media are read.
        clips: views that go through the network at once.
        about: describes the model in infer.json.
        cfg: the config of the model; None for an exported file.
        initial: origin of the weights that its training began with (methods/interop/provenance.py).
    """

    net: torch.nn.Module
    spec: EvalSpec
    normalise: functools.partial[torch.Tensor]
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    classes: list[str]
    options: LoaderOptions
    clips: int
    about: dict[str, str]
    cfg: Config | None = None
    initial: Mapping[str, str] = field(default_factory=dict)

    def logits(self, views: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Score uint8 views (V, T, h, w, C): (V, K) float32, `clips` views at a time."""
        import torch

        from utils import view_batches

        parts = []
        with torch.inference_mode(), view_batches.full_precision():
            for chunk in views.split(self.clips):
                with self.autocast():
                    parts.append(self.net(self.normalise(chunk.to(device))).float())
        return torch.cat(parts)


def from_experiment(
    target: Path, checkpoint_name: str | None, overrides: list[str], world: World, *, as_is: bool = False
) -> Predictor:
    """Return the model of an experiment folder, or of a checkpoint that holds its config.

    Args:
        target: an experiment folder, or a checkpoint file of a run.
        checkpoint_name: best, latest or a file (even of another project); used with a folder.
        overrides: `key=value` texts.
        world: the ranks, and the device to compute on.
        as_is: leave the network as trained, instead of the form that an evaluation uses.

    Raises:
        UserError: no such file, or weights that do not fit.
    """
    import methods
    from anal_tools.evaluate.network import build_for_evaluation, choose_weights, prepare, read_steady
    from anal_tools.evaluate.protocols import Protocol
    from methods import interop
    from methods.interop import hf, provenance
    from utils.engine import evaluate
    from utils.engine.network import autocast, model_arguments

    if hf.is_folder(target):
        raise UserError(
            f"{target}: a Hugging Face folder does not define how frames are sampled; name an experiment whose model "
            f"fits, and --checkpoint {target}"
        )

    # A folder or config: its checkpoint may be of another project. A checkpoint alone must hold its config.
    if target.is_dir() or target.suffix in (".yaml", ".yml"):
        cfg = _load_config(target, overrides)
        exp = target if target.is_dir() else target.parent
        weights = choose_weights(exp, checkpoint_name)
        build_plain = functools.partial(methods.build, **model_arguments(cfg, pretrained=False))
        read = functools.partial(interop.load_checkpoint, build=build_plain)
        state, weights_hash = read_steady(weights, read, world)
    else:
        weights = target
        state, weights_hash = read_steady(weights, _own_checkpoint, world)
        cfg = config_of(state, target, overrides)

    # Prefer the class names in the checkpoint: the file may have changed since the training.
    classes = state.get("classes")
    if not isinstance(classes, list) or len(classes) != cfg.model.num_class:
        classes = read_class_names(_class_file(cfg), cfg.model.num_class)

    spec = eval_spec(cfg)
    build = functools.partial(build_for_evaluation, cfg, state, weights, world)
    return Predictor(
        net=prepare(cfg, Protocol(spec), build, as_is=as_is)[0],
        spec=spec,
        normalise=evaluate.normaliser(cfg),
        autocast=lambda: autocast(cfg.precision, world.device),
        classes=list(classes),
        options=loader_options(cfg),
        clips=cfg.batch_size,
        about={
            "engine": "torch",
            "weights": str(weights),
            "weights_hash": weights_hash,
            "type": cfg.model.type,
            "backbone": cfg.model.backbone,
        },
        cfg=cfg,
        initial=provenance.earlier_of(state),
    )


def _own_checkpoint(file: Path) -> CheckpointContent:
    """Return a checkpoint of a run; refuse a file of another project with a message that names the project."""
    from methods import interop
    from utils import checkpoint, weights_file

    state = interop.content_of(file)
    if weights_file.is_checkpoint(state):
        # weights with NaN would only show as scores that are not finite
        interop.check_finite(checkpoint.evaluated_weights(state)[0], file)
        return state

    # The names show whether these are our bare weights or a file of another project.
    names = interop.tensors_of(state, file)
    ours = any(name.startswith("backbone.") for name in names) and not interop.family_of(names)
    whose = "" if ours else f"weights with names of {interop.what_is(file)[0]}: "
    raise UserError(
        f"{file}: {whose}it holds no config; name its experiment folder, or one whose model fits, and "
        f"--checkpoint {file}"
    )


def config_of(state: Mapping[str, object], file: Path, overrides: list[str]) -> Config:
    """Return the config that a checkpoint was written with.

    Raises:
        UserError: the checkpoint holds none, or the config of a different version that is no longer valid.
    """
    from utils import config
    from utils.config.schema import PAIRS

    if not isinstance(state.get("config"), dict):
        raise UserError(f"{file}: this checkpoint holds no config; name its experiment folder and --checkpoint {file}")

    try:
        # through JSON, so that a value of a foreign type is an error here
        tree = json.loads(json.dumps(state["config"]))
        # A run adds the lengths in iterations to those that were given in epochs; both together are refused.
        for computed, given, _ in PAIRS:
            *sections, key = computed.split(".")
            # the section of the computed key, and the value of the key that was given
            place = functools.reduce(lambda inner, name: inner.get(name, {}), sections, tree)
            other = functools.reduce(lambda inner, name: (inner or {}).get(name), given.split("."), tree)
            if other is not None:
                place.pop(key, None)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: its config is not one that a run wrote ({error})") from error

    # `config.load` takes a file, with all its checks and overrides
    with tempfile.TemporaryDirectory(prefix="zoetrope-config-") as folder:
        copy = Path(folder) / "config.yaml"
        copy.write_text(json.dumps({"common": tree}), encoding="utf-8")  # JSON is YAML
        try:
            return config.load(copy, overrides)
        except UserError as error:
            raise UserError(f"{file}: its config is no longer valid: {str(error).replace(str(copy), '')}") from error


def _load_config(target: Path, overrides: list[str]) -> Config:
    from utils import config

    return config.load(target, overrides)


def _class_file(cfg: Config) -> Path | None:
    from utils import config

    return config.class_names_file(cfg)


def from_onnx(file: Path, world: World, *, like: Predictor | None = None) -> Predictor:
    """Return an exported model that onnxruntime runs on the CPU, with the preprocessing that the file describes.

    Args:
        file: written by `python main.py export --to onnx`.
        world: the ranks; the input comes from its device.
        like: the experiment that the user named with it. Media are read as in its config, and both must agree on
            views and classes.

    Raises:
        UserError: the file was not written by `export`, or it is of another experiment.
    """
    import torch

    from utils import transforms

    net, text = session(file)
    metadata = read_metadata(text, file)
    spec = EvalSpec(**{**metadata["views"], "sampling": Sampling(**metadata["views"]["sampling"])})
    if like is not None and (spec != like.spec or metadata["classes"] != like.classes):
        what = "views" if spec != like.spec else "class names"
        raise UserError(f"{file}: its {what} are not those of the experiment; export it again, or name the file alone")

    colour = {"mean": tuple(metadata["mean"]), "std": tuple(metadata["std"])}
    video = ReaderSpec("video", missing_share=Data().missing_share)
    return Predictor(
        net=net,
        spec=spec,
        normalise=functools.partial(transforms.normalise, **colour, dtype=torch.float32),
        autocast=contextlib.nullcontext,
        classes=list(metadata["classes"]),
        options=like.options if like else LoaderOptions(video, workers=1, on_bad="substitute"),
        # 8 views at once, because the file has no batch size
        clips=like.clips if like else 8,
        about={
            "engine": "onnx",
            "weights": str(file),
            "weights_hash": files.sha256(file),
            "type": metadata["type"],
            "backbone": metadata["backbone"],
        },
    )


def session(file: Path) -> tuple[torch.nn.Module, str]:
    """Return an ONNX file as a module that onnxruntime runs, and the text of its metadata ("" if it has none).

    Raises:
        UserError: no onnxruntime, no such file, or not an ONNX file.
    """
    import torch

    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"an ONNX file needs onnxruntime (extra: export): {sys.executable} -m pip install 'onnxruntime>=1.22'"
        ) from error

    if not file.is_file():
        raise UserError(f"{file}: there is no such file")

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        runtime = onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  onnxruntime raises classes of its own that have no common public base
        raise UserError(f"{file}: onnxruntime cannot load it ({str(error).splitlines()[0]})") from error

    class Session(torch.nn.Module):
        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            feed = {runtime.get_inputs()[0].name: clips.float().contiguous().cpu().numpy()}
            return torch.from_numpy(runtime.run(None, feed)[0]).to(clips.device)

    return Session(), runtime.get_modelmeta().custom_metadata_map.get(ONNX_KEY, "")


def read_metadata(text: str, file: Path) -> ModelMetadata:
    """Return the preprocessing metadata of an exported file after a check.

    Raises:
        UserError: there are none, or some are missing.
    """
    try:
        metadata = json.loads(text)
        whole = all(key in metadata for key in ("views", "mean", "std", "classes", "type", "backbone", "input"))
    except (ValueError, TypeError):
        metadata, whole = {}, False

    if not whole:
        raise UserError(f"{file}: it holds no metadata about its input; make it with `python main.py export`")
    return metadata | {"views": renamed.protocol(metadata["views"])}
