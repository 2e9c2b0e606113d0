"""The parts of a run that hold tensors: model, optimiser, statistics, and what stands beside the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from utils import checkpoint, dist, distill, draws, optim, sync_bn
from utils.ema import Ema
from utils.faults import UserError
from utils.run import autocast, compiled, model_arguments, place

if TYPE_CHECKING:
    from utils.config import Config
    from utils.dist import World
    from utils.shards import ShardPlan

Build = Callable[..., nn.Module]


def build(
    cfg: Config,
    world: World,
    shards: ShardPlan,
    found: checkpoint.Found | None,
    make: Build,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """The parts of a `Run`, built from the config and filled from a checkpoint's state if any.

    Args:
        found: the checkpoint to go on from.
        make: `methods.build`; utils imports no methods.
        say: writes a line of the log.

    Returns:
        Keyword arguments of `Run`: net, model, optimizer, scaler, statistics, ema, distill.

    Raises:
        UserError: the checkpoint does not fit the config.
    """
    state = found.state if found else None
    torch.manual_seed(cfg.seed)  # the initial weights are the same on every rank
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not cfg.deterministic  # clips have one size: the fastest kernel is looked for once
    net = make(**model_arguments(cfg, pretrained=False if state else cfg.model.pretrained))
    net = place(net, world.device, cfg.precision)
    second = _second(cfg, world, state, make)
    trained = distill.Pair(net, second.peer) if second and second.peer else net  # what the optimiser works on
    trained = sync_bn.convert(trained, shards, sync_stats=cfg.model.kwargs["bn_sync_stats"])
    ema = Ema(net, cfg.ema) if cfg.ema else None
    statistics = sync_bn.Statistics(trained, shards, world)
    policy = {name: getattr(cfg, name) for name in ("momentum", "weight_decay", "nesterov", "no_wd", "policy")}
    networks = [trained.student, trained.peer] if isinstance(trained, distill.Pair) else [net]
    optimizer = optim.build(*networks, lr=cfg.lr_scheduler.base_lr, **policy)
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "fp16")
    if found:
        checkpoint.load_model(net, found.state["model"], found.path)
        if second and second.peer:
            checkpoint.load_model(second.peer, found.state["peer"], f"{found.path}, second network")
        if ema:
            checkpoint.load_model(ema.net, found.state["ema"], f"{found.path}, average of the weights")
        statistics.load_group_state(found.state["group_statistics"])
        _fill(optimizer, scaler, found)
    model: Any = compiled(trained, cfg.compile, world.device, say)
    if world.size > 1:
        model = dist.data_parallel(model, world)
    made = {"net": net, "model": model, "optimizer": optimizer, "scaler": scaler, "statistics": statistics}
    return made | {"ema": ema, "distill": second}


def _fill(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, found: checkpoint.Found) -> None:
    """Take up what the optimiser knew; torch looks at the number of groups and of parameters, not at shapes."""
    try:
        optimizer.load_state_dict(found.state["optimizer"])
        scaler.load_state_dict(found.state["scaler"])
        wrong = [
            tuple(value.shape)
            for parameter, kept in optimizer.state.items()
            for value in kept.values()
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape
        ]
        names = ("lr", "momentum", "weight_decay", "nesterov")
        lacking = [name for name in names if any(name not in group for group in optimizer.param_groups)]
        reason = f"values of another shape, {wrong[0]}" if wrong else f"no {lacking[0]} in it" if lacking else ""
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = str(error)
    if reason:
        raise UserError(
            f"{found.path}: the optimiser's state is of another model or recipe ({reason}); put the run's own "
            "checkpoint back, or start over with --fresh, which moves the old run to old/"
        )


def _second(
    cfg: Config, world: World, state: dict[str, Any] | None, make: Build
) -> distill.Teacher | distill.Mutual | None:
    """The network that `distill` asks for, on the device."""
    plain = cfg.distill
    if plain.teacher is None:
        return None
    assert plain.weight is not None, "filled in when the config was loaded"
    on_device = functools.partial(place, device=world.device, precision=cfg.precision)
    if plain.kind == "dml" and state:  # the checkpoint has all of it: the named files are not needed any more
        arguments = state["distill"]["model"]
        return distill.Mutual(on_device(_named_draws(make(**arguments))), weight=plain.weight, arguments=arguments)
    source = distill.find(Path(plain.teacher), cfg)
    own = model_arguments(cfg, pretrained=False)
    arguments = model_arguments(source.cfg, pretrained=False) | {"num_segments": own["num_segments"]}
    if plain.kind == "dml":
        net = _filled(make, arguments, source)
        return distill.Mutual(on_device(_named_draws(net)), weight=plain.weight, arguments=arguments)
    with torch.random.fork_rng(devices=[]):  # whatever the teacher draws, the student's numbers stay as they are
        net = _trained(make, arguments, source)
    colours = [(pixels.mean, pixels.std) for pixels in (source.cfg.augmentation, cfg.augmentation)]
    return distill.Teacher(
        on_device(net),
        temperature=plain.temperature,
        weight=plain.weight,
        recolour=distill.recolour(colours[0], colours[1], world.device),
        autocast=lambda: autocast(cfg.precision, world.device),
        weights_hash=_same_file(source.file, state, world),
    )


def _filled(make: Build, arguments: dict[str, Any], source: distill.Source) -> nn.Module:
    """A network with the weights of its source; random ones where that has none."""
    if source.state is None:
        return make(**arguments | {"pretrained": source.cfg.model.pretrained})
    net = make(**arguments)
    weights, said = checkpoint.evaluated_weights(source.state)
    checkpoint.load_model(net, weights, source.file or "the checkpoint")
    net.pretrained_note = f"{said}, from {source.file}"  # pyright: ignore[reportArgumentType]
    return net


def _trained(make: Build, arguments: dict[str, Any], source: distill.Source) -> nn.Module:
    """The same, and its classifier must have come from a file: a network that knows nothing cannot teach."""
    torch.manual_seed(0)
    net = _filled(make, arguments, source)
    torch.manual_seed(0)
    fresh = {key: own for key, own in make(**arguments).named_parameters() if key.startswith("classifier.")}
    if all(torch.equal(net.get_parameter(key), own) for key, own in fresh.items()):
        raise UserError(
            f"common.distill.teacher: {source.file or 'the experiment'} holds no trained classifier for these classes: "
            "train the teacher first, or name its weights"
        )
    return net


def _named_draws(peer: nn.Module) -> nn.Module:
    """Dropout masks of its own: they follow from a layer's name, and the student has layers of the same names."""
    draws.prepare(nn.ModuleDict({"peer": peer}))
    return peer


def _same_file(file: Path | None, state: dict[str, Any] | None, world: World) -> str:
    """sha256 of the teacher's weights; a run that goes on with another file is refused."""
    digest = ""

    def check() -> None:
        nonlocal digest
        digest = checkpoint.file_hash(file) if file else ""
        kept = state["distill"]["weights_hash"] if state else digest
        if kept != digest:
            raise UserError(
                f"common.distill.teacher: {file} has changed since this run started with it; put the old file back, "
                "or start over with --fresh"
            )

    world.on_main(check)
    return digest
