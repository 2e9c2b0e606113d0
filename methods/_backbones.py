"""Build the backbone of a method by name, and fill it with the weights that `model.pretrained` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from methods import fetch, interop
from methods.interop import hf, provenance
from methods.interop._names import Options
from networks import BACKBONES, VIDEO
from networks.resnet3d import inflate
from utils import checkpoint, weights_file
from utils.errors import UserError, did_you_mean, listed

Model = TypeVar("Model", bound=nn.Module)

#: Name prefixes of the classifiers in the published image networks (1000 classes).
_IMAGE_CLASSIFIERS = ("fc.", "classifier.")
_KINDS = ("images", "clips")  # indexed by `video`
_OUR_CLASSIFIERS = ("classifier.", "aux_head.fc.")
_FRAMES = 16  # of a clip, if a file of a video transformer does not show it


def function(name: str) -> Callable[..., nn.Module]:
    """Return the function of `networks` that builds a backbone.

    Raises:
        UserError: no backbone has this name.
    """
    if name not in BACKBONES:
        there_are = f"{did_you_mean(name, BACKBONES)}; choose one of {', '.join(BACKBONES)}"
        raise UserError(f"model.backbone: no backbone called {name!r}{there_are}")
    return BACKBONES[name]


def make(name: str, options: Mapping[str, Any], *, video: bool = False) -> nn.Module:
    """Build a backbone without classifier: for images, (N, 3, H, W) -> (N, feature_dim), or one of `networks.VIDEO`.

    Raises:
        UserError: no backbone has this name, or it is of the other kind.
    """
    network = function(name)
    if (name in VIDEO) != video:
        fitting = ", ".join(known for known in BACKBONES if (known in VIDEO) == video)
        raise UserError(f"model.backbone: {name} is not a network for {_KINDS[video]}; use {fitting}")
    return network(**options)


def feature_dim(backbone: nn.Module) -> int:
    """Return the number of channels of a backbone's output."""
    return int(backbone.feature_dim)  # pyright: ignore[reportArgumentType]


def load(model: Model, pretrained: bool | str, backbone: str, *, encoder_only: bool = False) -> Model:
    """Fill `model.backbone`, and whatever else fits, with existing weights.

    A line about the weights remains in `model.pretrained_note`.

    Args:
        model: has `backbone` and `classifier`.
        pretrained: False: nothing. True: the published ImageNet weights in `pretrained/`. Else a path (relative to the
            working folder, else to the repository) of a state dict with torchvision's names, one of our checkpoints, an
            experiment folder (its best checkpoint, else its latest), a Hugging Face folder, or a file of another
            project (`methods.interop`). Weights of a 2D network are inflated for a 3D one.
        backbone: name of the backbone, for `pretrained=True`.
        encoder_only: fill `model.backbone` alone, and leave out everything else in the file.

    Returns:
        The same model.

    Raises:
        UserError: no such file, not a weights file, or keys that do not match; the model is then unchanged.
    """
    note = ""
    if pretrained:
        path = _published(backbone) if pretrained is True else _named(str(pretrained))
        try:
            note, start = _start(model, path, encoder_only=encoder_only)
        except UserError as error:
            raise UserError(f"model.pretrained: {error}") from error
        model.pretrained = start  # pyright: ignore[reportArgumentType]
    model.pretrained_note = note  # pyright: ignore[reportArgumentType]
    return model


def _start(model: nn.Module, path: Path, *, encoder_only: bool) -> tuple[str, provenance.Start]:
    """Fill a model from a file or folder; return the line for the log and the origin of the weights."""
    # Read: a Hugging Face folder, one of our checkpoints, bare tensors, or a file of another project (`opened`).
    if hf.is_folder(path):
        opened = interop.open_weights(path)
        state, content = opened.tensors, None
    else:
        content = interop.content_of(path)
        ours = weights_file.is_checkpoint(content)
        content = content if ours else {"state": content}
        state = checkpoint.evaluated_weights(content)[0] if ours else interop.tensors_of(content["state"], path)
        family = interop.family_of(state)
        opened = interop.Opened(state, family) if family else None

    # Fill. Class names are known to belong to the classifier only if that was filled.
    if opened:
        report = interop.load_tensors(
            model, state, path,
            family=opened.family, classifier=None, needs=opened.needs, encoder_only=encoder_only,
        )  # fmt: skip
        note, labels = f"weights from {path}: {report}", opened.folder.labels if opened.folder else None
        filled = "classifier.weight" in report.loaded
    else:
        interop.check_kept_options(model, content or {}, path, encoder_only=encoder_only)
        note = _fill(model, state, path, encoder_only=encoder_only)
        classes = (content or {}).get("classes")
        labels = list(classes) if isinstance(classes, list) and all(isinstance(name, str) for name in classes) else None
        filled = "left out" not in note

    # the lists that the weights were trained on, to warn of an evaluation on the same videos
    kept = (content or {}).get("lists")
    start = provenance.Start(
        path,
        provenance.of(path, opened.family if opened else "", opened, content),
        labels if filled else None,
        {str(key): str(value) for key, value in kept.items()} if isinstance(kept, dict) else {},
        opened.folder.side if opened and opened.folder else None,
    )

    licence = provenance.licence_line(start.initial)
    return note + (f"; {licence}" if licence else ""), start


@dataclass(frozen=True)
class Described:
    """The network of a weights file or folder.

    Attributes:
        path: the file or folder.
        arguments: those of `methods.build`, as far as the file shows them.
        state: its tensors under our names.
        carried: see `methods.interop.Report`.
    """

    path: Path
    arguments: Options
    state: Mapping[str, Tensor]
    carried: dict[str, Tensor] = field(default_factory=dict)

    def check(self, shapes: Mapping[str, Tensor]) -> None:
        """Refuse a file that does not fill the network's encoder, before the network is allocated.

        Args:
            shapes: a state dict on the meta device.

        Raises:
            UserError: tensors are missing or have a different shape.
        """
        if wrong := hf.misfits(self.state, shapes):
            raise UserError(f"{self.path}: it does not hold the network that it describes: {wrong}")


def described(path: Path) -> Described:
    """Read the network of a weights file or folder.

    Raises:
        UserError: it cannot be read, or contradicts itself.
    """
    path = _named(str(path))
    if hf.is_folder(path):
        folder = hf.read_folder(path)
        return Described(path, dict(folder.model), folder.converted.state, folder.converted.carried)

    content = interop.content_of(path)
    if weights_file.is_checkpoint(content):
        return Described(path, _built_with(content["config"]), checkpoint.evaluated_weights(content)[0])

    name, result, arguments = interop.look(interop.tensors_of(content, path), path)
    if name in hf.FAMILIES.values():
        arguments.setdefault("num_segments", _FRAMES)
    return Described(path, arguments, result.state, result.carried)


def _built_with(config: Options) -> Options:
    """Return the arguments of `methods.build` in the config of a checkpoint."""
    model, data = config.get("model"), config.get("data")
    model, data = (part if isinstance(part, Mapping) else {} for part in (model, data))
    arguments = {key: model[key] for key in ("type", "backbone", "num_class", "dropout") if key in model}

    # T of the network is segments x frames per segment
    counts = model.get("num_segments"), data.get("clip_len", 1)
    if all(type(count) is int for count in counts):
        arguments["num_segments"] = counts[0] * counts[1]

    kwargs = model.get("kwargs")
    options = kwargs.items() if isinstance(kwargs, Mapping) else ()
    # `bn_` options belong to a training run, not to the network
    return arguments | {str(key): value for key, value in options if not str(key).startswith("bn_")}


def _published(backbone: str) -> Path:
    """Return the path of the ImageNet weights of a backbone."""
    if backbone not in fetch.FILES:
        raise UserError(f"model.pretrained: no published weights are known for {backbone}; name a file instead of true")

    path = fetch.FOLDER / fetch.FILES[backbone]
    if not path.is_file():
        raise UserError(
            f"model.pretrained: {path} is missing; put the file there or run `python main.py fetch {backbone}`, "
            "or set model.pretrained: false"
        )
    return path


def _named(text: str) -> Path:
    """Return the weights file that a user's path refers to."""
    path = Path(text).expanduser()
    if not path.is_absolute() and not path.exists():
        path = fetch.ROOT / path
    if not path.exists():
        raise UserError(f"model.pretrained: {text}: no such file or folder")

    if not path.is_dir() or hf.is_folder(path):
        return path
    for name in (checkpoint.BEST, checkpoint.LATEST):
        if newest := checkpoint.newest(path, name):
            return newest  # even if it is damaged: reading it is then an error, and the latest is not a replacement
    raise UserError(
        f"model.pretrained: {path} holds neither {checkpoint.BEST} nor {checkpoint.LATEST}, and no {hf.CONFIG} of a "
        "Hugging Face folder"
    )


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path, *, encoder_only: bool = False) -> str:
    """Put the tensors into the model, all that must fit or none, and return the line for the log."""
    ours = model.state_dict()

    # `new` maps our names to the tensors to load; `needed` holds the names that must be among them.
    if encoder_only and any(key.startswith("backbone.") for key in state):
        without = getattr(model, "weights_without", ())
        new = {
            key: value for key, value in state.items() if key.startswith("backbone.") and not key.startswith(without)
        }
        left_out, needed = (
            "; layers after the encoder are left out",
            {key for key in ours if key.startswith("backbone.")},
        )
    elif any(key.startswith("backbone.") for key in state):  # one of our models: its classifier fits or is left out
        num_class = len((state if "classifier.weight" in state else ours)["classifier.weight"])
        foreign = num_class != len(ours["classifier.weight"])
        left_out = f"; its classifier of {num_class} classes is left out" if foreign else ""
        new = {key: value for key, value in state.items() if not (foreign and key.startswith(_OUR_CLASSIFIERS))}
        needed = {key for key in ours if not (foreign and key.startswith(_OUR_CLASSIFIERS))}
    else:
        new = {f"backbone.{key}": value for key, value in state.items() if not key.startswith(_IMAGE_CLASSIFIERS)}
        new = inflate(new, {key: tensor.shape for key, tensor in ours.items()})
        left_out = "; its classifier is left out" if len(new) < len(state) else ""
        needed = {key for key in ours if key.startswith("backbone.") and "_non_local." not in key}  # images have none

    # Files from before 2018 have no count of batches, and the count changes nothing.
    needed = {key for key in needed if not key.endswith("num_batches_tracked")}

    # Nothing is loaded unless everything fits.
    faults = [
        listed("missing in the file", [key for key in ours if key in needed and key not in new]),
        listed("not in the model", [key for key in new if key not in ours]),
        listed("a different shape", [key for key in ours if key in new and new[key].shape != ours[key].shape]),
    ]
    if any(faults):
        faults = [interop.other_network(state, model), *faults]
        raise UserError(f"{path} does not fit: {'; '.join(fault for fault in faults if fault)}")

    interop.check_finite(new, path)
    model.load_state_dict(new, strict=False)
    return f"weights from {path}: {len(new)} tensors{left_out}"
