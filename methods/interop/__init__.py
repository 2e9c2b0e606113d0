"""Load weights that others have published into our models: `load_weights(model, "file.pyth")`.

There is one file per family of names. A method describes its weights with the attributes in `methods/_traits.py`. The
model must be built with the options that the weights were trained with. Options that no tensor shows (the frames of the
Slow pathway, the direction of the shift) are compared with the family's rule.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from methods._traits import ClassifierColumns
from methods.interop import hf, provenance, vjepa2
from methods.interop._files import content_of, read, tensors_of
from methods.interop._implied import implied
from methods.interop._names import Converted
from networks.resnet3d import inflate
from utils import checkpoint, weights_file
from utils.errors import UserError, did_you_mean, listed

_PROJECTS = {
    "mmaction": "MMAction2",
    "pyslowfast": "PySlowFast",
    "pytorchvideo": "pytorchvideo",
    "tsn_tsm": "the TSN and TSM repositories",
    "tpn_original": "the TPN repository",
    "paddle": "PaddleVideo",
    "videomae": "VideoMAE",
    "vjepa2": "V-JEPA 2",
    "torchvision_timm": "torchvision and timm, image networks",
}
FAMILIES = tuple(_PROJECTS)
_LISTED = 6  # names that a message shows
#: {attribute of `Report`: heading in its texts}
_KINDS = {
    "reshaped": "reshaped",
    "missing": "missing",
    "unexpected": "unexpected",
    "skipped": "skipped",
    "carried": "carried for export",
    "fresh": "newly initialised",
}
_CLASSIFIERS = ("classifier.", "aux_head.fc.")
_ENCODER = "backbone."
_OF_HEADS = ("head_eps", "pooler_heads", "pooling")  # options of the layers after the encoder
_OURS = ("backbone.", "classifier.", "neck.", "aux_head.", "fc_norm.", "pooler.")  # beginnings of our names


@dataclass(frozen=True)
class Report:
    """Describe tensor by tensor what `load_weights` did.

    Attributes:
        family: the family of the file's names.
        loaded: our names of the tensors that were filled.
        reshaped: {our name: how} of those that were changed on the way.
        missing: our names that the file does not fill; counts of batches do not count.
        unexpected: names that the model has no place for.
        skipped: names in the file that were left out on purpose.
        carried: names of tensors that change no logit and belong to an export.
        fresh: our names of classifiers that keep their new, random values.
        implied: the options of the model that the file shows, as keys of `model` and `model.kwargs`.
    """

    family: str
    loaded: list[str] = field(default_factory=list)
    reshaped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    implied: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors from {self.family}"]
        for name in _KINDS:
            if getattr(self, name):
                parts.append(listed(_KINDS[name], getattr(self, name)))
        return "; ".join(parts)

    def table(self) -> str:
        """Return the report as lines of text: kind, number, and the first names."""
        rows = [("loaded", len(self.loaded), "")]
        for name, text in _KINDS.items():
            held = getattr(self, name)
            notes = [f"{key} ({how})" for key, how in held.items()] if isinstance(held, dict) else list(held)
            more = ", ..." if len(notes) > _LISTED else ""
            rows.append((text, len(held), ", ".join(notes[:_LISTED]) + more))
        return "\n".join(f"{text:<18}  {count:>4}  {names}".rstrip() for text, count, names in rows)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    family: str = "auto",
    strict: bool = True,
    classifier: bool | None = True,
    accept: Collection[str] = (),
) -> Report:
    """Fill a model with published weights.

    Args:
        model: from `methods.build`; changed only if everything fits (or strict is false).
        path: a `.pth`, `.pth.tar`, `.pyth`, `.pdparams` or Caffe2 `.pkl` file. It is read without running code.
        family: one of `FAMILIES`, or "auto" to recognise it by the names.
        strict: every parameter must be filled, every tensor of the file used, and the model's options must be the
            family's. Otherwise only what fits is loaded, and the report lists the rest.
        classifier: False leaves the classifiers alone, for fine-tuning on other classes; None does so if the number of
            classes differs.
        accept: options that are right although the family's rule differs ("slow_index", "shift_direction",
            "shift_shortcut", "flow"), for a file with a family's names that was trained in a different way.

    Raises:
        UserError: the file cannot be read, no family has its names, a tensor that the model takes holds NaN or
            infinity, or (strict) something does not fit.
    """
    opened = open_weights(Path(path), family)
    return load_tensors(
        model, opened.tensors, Path(path),
        family=opened.family, strict=strict, classifier=classifier, accept=accept, needs=opened.needs,
    )  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """Hold published weights that were read, and not converted yet.

    Attributes:
        tensors: under their names.
        family: the family of these names.
        needs: options that the model must have, as text; None: those of the family's rule.
        folder: the Hugging Face folder that they come from.
    """

    tensors: dict[str, Tensor]
    family: str
    needs: dict[str, str] | None = None
    folder: hf.HfFolder | None = None


def open_weights(path: Path, family: str = "auto") -> Opened:
    """Read a published weights file or a Hugging Face folder.

    Raises:
        UserError: it cannot be read, or no family has its names.
    """
    if hf.is_folder(path):
        folder = hf.read_folder(path)
        return Opened(folder.tensors, folder.family, folder.needs, folder)
    state = read(path)
    return Opened(state, _family(state, family, path)[0])


def converted(state: Mapping[str, Tensor], module: ModuleType, path: Path) -> Converted:
    """Return tensors under our names, converted by a family's module.

    Raises:
        UserError: the family refuses the file.
    """
    try:
        return module.to_ours(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_tensors(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    *,
    family: str = "auto",
    strict: bool = True,
    classifier: bool | None = True,
    accept: Collection[str] = (),
    needs: Mapping[str, str] | None = None,
    encoder_only: bool = False,
) -> Report:
    """Fill a model with the tensors of a published file that is read already; see `load_weights`.

    Args:
        needs: options that the model must have; None: those of the family's rule, which is an error for names of a
            Hugging Face folder.
        encoder_only: fill `model.backbone` and leave everything else new, as a probe needs it.

    Raises:
        UserError: as in `load_weights`.
    """
    name, module = _family(state, family, path)
    if needs is None and hasattr(module, "is_hf") and module.is_hf(state):
        raise UserError(
            f"{path}: no tensor shows the epsilons and heads of this network; name its folder, whose config.json does"
        )

    result = converted(state, module, path)

    # A probe takes the encoder alone, so the options of the file's head do not matter.
    if encoder_only:
        result.skipped += [key for key in result.state if not key.startswith(_ENCODER)]
        result.state = {key: value for key, value in result.state.items() if key.startswith(_ENCODER)}
        accept, classifier = (*accept, *_OF_HEADS), False

    # Compare the options that no tensor shows, then the tensors.
    needed_options = {**module.NEEDS, **result.needs, **(needs or {})}
    shown = implied(result.state, state, name, needed_options)
    problems = _wrong_options(model, {key: text for key, text in needed_options.items() if key not in accept})
    ours = model.state_dict()
    if classifier is None:
        # tensors that are not matrices are reported as misfits below
        classes = result.state.get("classifier.weight")
        classifier = classes is not None and (classes.dim() == 0 or len(classes) == len(ours["classifier.weight"]))
    result.state = _fitted(model, result, slow_first=module.SLOW_FIRST, classifier=bool(classifier))

    good = {key: value for key, value in result.state.items() if key in ours and ours[key].shape == value.shape}
    shapes = [
        f"{key} {tuple(value.shape)} for {tuple(ours[key].shape)}"
        for key, value in result.state.items()
        if key in ours and key not in good
    ]
    # parts of a head that this file does not have may stay new
    absent = [part for part in getattr(module, "HEADS", ()) if not any(key.startswith(part) for key in result.state)]
    optional = () if classifier else (*_CLASSIFIERS, *absent)
    if encoder_only:
        optional = tuple(key for key in ours if not key.startswith(_ENCODER))
    # counts of batches change nothing, and old files lack them
    needed = [key for key in ours if not key.endswith("num_batches_tracked") and not key.startswith(optional)]

    report = Report(
        family=name,
        loaded=list(good),
        reshaped={key: how for key, how in result.changed.items() if key in good},
        missing=[key for key in needed if key not in good],
        unexpected=[*result.unknown, *(key for key in result.state if key not in ours), *shapes],
        skipped=result.skipped,
        carried=list(result.carried),
        fresh=[key for key in ours if key not in good and key.startswith(optional)] if optional else [],
        implied=shown,
    )

    # With strict, nothing is loaded unless everything fits.
    if strict and (report.missing or report.unexpected or problems):
        raise _misfit(path, report, [*_other_network(shown, model), *problems])

    check_finite(good, path)
    model.load_state_dict(good, strict=False)
    return report


def check_finite(state: Mapping[str, Any], path: str | Path) -> None:
    """Refuse weights with which a model cannot compute a score.

    Raises:
        UserError: tensors hold NaN or infinity.
    """
    bad = [
        name
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not _finite(tensor)
    ]
    if bad:
        raise UserError(
            f"{path}: {listed('NaN or infinity in', bad)}; the training that wrote them diverged, or the file is "
            "damaged: use an earlier checkpoint or another copy"
        )


def _finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinity; torch cannot test types of 8 bits, so these are widened first."""
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())


def network_of(model: nn.Module) -> dict[str, Any]:
    """Return type and backbone of a model as far as its tensors show them, to compare with those of a file."""
    shown = implied(model.state_dict(), [], "", {})
    return {key: shown[key] for key in ("type", "backbone") if key in shown}


def _other_network(shown: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return a sentence if the file is for a different network than the model."""
    mine = network_of(model)
    # only what both show is compared
    theirs = {key: shown[key] for key in mine if shown.get(key, mine[key]) != mine[key]}
    if not theirs:
        return []
    names = [" ".join(str(value) for value in side.values()) for side in (theirs, {key: mine[key] for key in theirs})]
    return [f"the file holds weights of {names[0]}, the model is {names[1]}"]


def other_network(state: Mapping[str, Tensor], model: nn.Module) -> str:
    """Return a sentence if tensors are of a different network than the model; "" if not, or if they do not show it.

    Args:
        state: under our names, or those of torchvision and timm.
        model: from `methods.build`.
    """
    ours = any(name.startswith("backbone.") for name in state)
    named = state if ours else importlib.import_module(f"{__name__}.torchvision_timm").to_ours(state).state
    return "".join(_other_network(implied(named, [], "", {}), model))


def _misfit(path: Path, report: Report, problems: Sequence[str]) -> UserError:
    """Return the error for a file that does not fill the model, with the model that would fit it."""
    misfits = [listed(kind, getattr(report, kind)) for kind in ("missing", "unexpected") if getattr(report, kind)]
    hint = f"the file shows {', '.join(f'{key}: {value}' for key, value in report.implied.items())}"
    return UserError(f"{path} ({report.family}) does not fit the model: {'; '.join([*problems, *misfits, hint])}")


def what_is(path: str | Path, *, family: str = "auto") -> tuple[str, dict[str, Any]]:
    """Return the family of a weights file and the options of the model that it shows (see `Report.implied`).

    Raises:
        UserError: the file cannot be read, or no family has its names.
    """
    opened = open_weights(Path(path), family)
    name, _, options = look(opened.tensors, Path(path), family=opened.family, needs=opened.needs)
    return name, options


def look(
    state: Mapping[str, Tensor], path: Path, *, family: str = "auto", needs: Mapping[str, str] | None = None
) -> tuple[str, Converted, dict[str, Any]]:
    """Return the family of tensors, the tensors under our names and the options of the model that they show.

    Raises:
        UserError: no family has their names.
    """
    name, module = _family(state, family, path)
    result = converted(state, module, path)
    return name, result, implied(result.state, state, name, {**module.NEEDS, **result.needs, **(needs or {})})


def load_checkpoint(path: str | Path, build: Callable[[], nn.Module]) -> dict[str, Any]:
    """Return what an evaluation starts from: one of our checkpoints unchanged, or one made from published weights.

    Args:
        path: a checkpoint, one of our state dicts, or a file or folder that `load_weights` takes.
        build: returns the model that foreign weights must fit, classifier included.

    Returns:
        The checkpoint; for a foreign file a dict with `model` (one of our state dicts), `report` and `initial` (see
        `provenance.of`), and for a folder also `classes`, if it names them.

    Raises:
        UserError: the file cannot be read, or it does not fit.
    """
    path = Path(path)
    if hf.is_folder(path):
        opened = open_weights(path)
    else:
        content = content_of(path)
        if weights_file.is_checkpoint(content):
            check_finite(checkpoint.evaluated_weights(content)[0], path)
            return content
        state = tensors_of(content, path)
        # a bare state dict under our names: the caller checks its shapes
        if "classifier.weight" in state and all(name.startswith(_OURS) for name in state):
            check_finite(state, path)
            return {"model": state}
        opened = Opened(state, "auto")

    model = build()
    report = load_tensors(model, opened.tensors, path, family=opened.family, needs=opened.needs)
    labels = opened.folder.labels if opened.folder else None
    values = {"model": model.state_dict(), "report": str(report), "initial": provenance.of(path, report.family, opened)}
    return values | ({"classes": labels} if labels else {})


def family_of(state: Mapping[str, Tensor]) -> str | None:
    """Return the family whose names tensors have; None for ours, torchvision's, timm's and unknown ones."""
    try:
        name, _ = _family(state, "auto", Path())
    except UserError:
        return None
    return None if name == "torchvision_timm" else name


def _family(state: Mapping[str, Tensor], family: str, path: Path) -> tuple[str, ModuleType]:
    if family != "auto" and family not in FAMILIES:
        raise UserError(
            f"no family called {family!r}{did_you_mean(family, FAMILIES)}; use one of {', '.join(FAMILIES)}"
        )

    # the order of `_PROJECTS` decides if two families recognise the names
    for name in FAMILIES if family == "auto" else (family,):
        module = importlib.import_module(f"{__name__}.{name}")
        if family != "auto" or module.recognises(state):
            return name, module

    names, more = list(state), ", ..." if len(state) > _LISTED else ""
    projects = "; ".join(f"{text} ({name})" for name, text in _PROJECTS.items())
    raise UserError(
        f"{path}: its tensors ({', '.join(names[:_LISTED])}{more}) have neither the names of our models nor "
        f"those of a project whose weights can be read: {projects}. "
        "Name a checkpoint that training wrote or a file of one of these projects. Weights of a different network, or "
        "with names of their own, cannot be used before their tensors are renamed (docs/weights.md)"
    )


def _wrong_options(model: nn.Module, needs: Mapping[str, str]) -> list[str]:
    """Return sentences about options that change the result but no tensor, and are not those of the family."""
    # Several modules may have the same option, perhaps with different values.
    have: dict[str, set[str]] = {}
    for module in model.modules():
        for option, value in getattr(module, "weight_options", {}).items():
            have.setdefault(option, set()).add(value)

    left = getattr(model, "options_left_open", ())

    wrong = [
        f"the weights need {option}: {value}, the model has {actual}"
        for option, value in needs.items()
        for actual in sorted(have.get(option, set()))
        if value != vjepa2.AMBIGUOUS and not _equal(actual, value)
    ]

    if wrong:
        # one line that can be copied into the config
        keys = [key for key in needs if key in have and not all(_equal(actual, needs[key]) for actual in have[key])]
        settings = ", ".join(f"{key}: {needs[key]}" for key in keys if needs[key] != vjepa2.AMBIGUOUS)
        wrong.append(f"set model.kwargs: {{{settings}}}")
    # an option that nothing shows is refused only if the user left it open
    wrong += [
        f"neither the file nor a rule decides {option} ({vjepa2.CHOICES[option]}): set it in model.kwargs and see "
        "which value gives the published accuracy"
        for option, value in needs.items()
        if value == vjepa2.AMBIGUOUS and option in left
    ]
    return wrong


def check_kept_options(model: nn.Module, content: Mapping[str, Any], path: Path, *, encoder_only: bool = False) -> None:
    """Refuse one of our checkpoints if its video transformer had other options that no tensor shows.

    Raises:
        UserError: lists the options to set.
    """
    config = content.get("config")
    kept = config.get("model") if isinstance(config, Mapping) else None
    # only transformers have such options among our methods
    if not isinstance(kept, Mapping) or kept.get("type") not in ("videomae", "vjepa2", "probe"):
        return

    method = importlib.import_module(f"methods.{kept['type']}")
    options = kept.get("kwargs")
    # defaults of the method, replaced by the options in the checkpoint
    settings = {key: value.default for key, value in inspect.signature(method.build).parameters.items()}
    settings |= dict(options) if isinstance(options, Mapping) else {}
    keys = ("eps", "heads", *(() if encoder_only else _OF_HEADS))
    needs = {key: str(settings[key]) for key in keys if settings.get(key)}
    if wrong := _wrong_options(model, needs):
        raise UserError(f"{path} does not fit the model: {'; '.join(wrong)}")


def _equal(one: str, other: str) -> bool:
    """Return True for equal texts or equal numbers, such as 1e-6 and 0.000001."""
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


def _fitted(model: nn.Module, result: Converted, *, slow_first: bool | None, classifier: bool) -> dict[str, Tensor]:
    """Return the state with the changes that this model needs; notes go to `result.changed` and `result.skipped`."""
    ours = model.state_dict()
    state = dict(result.state)
    without = getattr(model, "weights_without", ())

    for name in list(state):
        if name.startswith((*without, *(() if classifier else _CLASSIFIERS))):
            result.skipped.append(name)
            del state[name]
        elif name.endswith("_non_local.out.bias"):  # in our block the BN after it, which subtracts a mean, contains it
            mean = name.replace("out.bias", "bn.running_mean")
            if mean not in state or state[mean].shape != state[name].shape:
                continue  # both are then reported as a misfit
            state[mean] = state[mean] - state.pop(name)
            result.changed[mean] = "bias of the convolution before it subtracted"

    inflated = inflate(state, {name: tensor.shape for name, tensor in ours.items()})
    result.changed.update({name: "inflated" for name in state if inflated[name] is not state[name]})

    # the two pathways of SlowFast meet in the classifier, and projects concatenate them in different orders
    columns = inflated.get("classifier.weight")
    pathways: ClassifierColumns | None = getattr(model, "classifier_columns", None)
    in_another_order = pathways is not None and slow_first not in (None, pathways.slow_first)
    if pathways is not None and in_another_order and columns is not None and columns.dim() == 2:
        fast = pathways.fast
        first = fast if pathways.slow_first else columns.shape[1] - fast  # columns that move to the end
        inflated["classifier.weight"] = columns.roll(-first, 1)
        result.changed["classifier.weight"] = "columns of the two pathways exchanged"
    return inflated
