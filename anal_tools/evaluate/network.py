"""Prepare the network of an evaluation: its weights, its fastest form, and the cost of a view."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import AgreedError, UserError

if TYPE_CHECKING:
    from torch import nn

    from anal_tools.evaluate.protocols import Protocol
    from anal_tools.evaluate.results import Cost
    from utils.config import Config
    from utils.dist import World

CheckpointContent = dict[str, object]  # of a checkpoint

_SAME = 1e-5  # largest difference of a class probability that counts as the same score
_TRIES = 3  # how often the weights are read, if their file is replaced in the meantime
_PROBE_SIDE = 64  # pixels; side of the clip on which `fold_bn` compares the two forms of a network


def choose_weights(exp: Path, chosen: str | None) -> Path:
    """Return the checkpoint file meant by `best`, `latest`, a path, or nothing (best, else latest).

    If a run changed hands, this is the newest file of the kind under any name (`checkpoint.newest`).

    Raises:
        UserError: there is no such file.
    """
    from utils import checkpoint

    names = {"best": [checkpoint.BEST], "latest": [checkpoint.LATEST], None: [checkpoint.BEST, checkpoint.LATEST]}

    if chosen in names:
        paths = [path for name in names[chosen] if (path := checkpoint.newest(exp, name))]
        first = exp / names[chosen][0]
    else:
        first = Path(str(chosen))
        paths = [first] if os.path.lexists(first) else []

    if paths:
        return paths[0]  # a damaged best checkpoint is an error, not a reason to use the latest one
    folds = sorted((exp / "folds").glob("*/config.yaml"))
    if folds:
        raise UserError(f"{exp}: each fold has a model of its own; name one of them, such as {folds[0].parent}")
    raise UserError(f"{first}: no such checkpoint; train first, or name one with --checkpoint best|latest|FILE")


def read_steady(
    weights: Path, read: Callable[[Path], CheckpointContent], world: World
) -> tuple[CheckpointContent, str]:
    """Return the weights and the hash of the very file they come from, the same on all ranks.

    A training run may replace the file at any moment; then it is read again.

    Args:
        weights: the file.
        read: returns the content of the file; called on every rank.
        world: the ranks.

    Returns:
        The result of `read`; sha256 of the file, in hex.

    Raises:
        UserError: `read` raises it, or the file changes all the time, or the ranks see different files.
    """
    for _ in range(_TRIES):
        failure, state, digest, steady = None, {}, "", False
        try:
            state, digest, steady = _read_once(weights, read)
        except UserError as error:
            failure = error

        # Every rank takes part in both calls of `any`, so that none waits for one that has raised.
        failed = world.any(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise AgreedError(f"{weights}: another rank could not read it")

        if not world.any(not (_same_on_all_ranks(digest, world) and steady)):
            return state, digest
    raise AgreedError(
        f"{weights}: the file was replaced each time it was read, or the ranks see different files of this name; "
        "copy it to a place that all machines see and no program writes to, and name the copy with --checkpoint"
    )


def _read_once(weights: Path, read: Callable[[Path], CheckpointContent]) -> tuple[CheckpointContent, str, bool]:
    """Return the content of the file, its hash, and whether it was the same file all the time."""
    from methods.interop import hf

    def stamp() -> list[tuple[int, ...]]:
        # A folder of Hugging Face has several files; a replaced file has another inode, size or time.
        statuses = [file.stat() for file in (hf.files_of(weights) if weights.is_dir() else [weights])]
        return [(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) for status in statuses]

    try:
        before = stamp()
        state = read(weights)
        digest = hf.digest(weights)
        return state, digest, stamp() == before
    except OSError as error:
        raise UserError(f"{weights}: cannot be read ({error.strerror}); is it being moved?") from error


def _same_on_all_ranks(digest: str, world: World) -> bool:
    """Return True if this rank's hash is that of rank 0; all ranks must call it."""
    import torch

    # (32,), a value for each byte
    own_digest = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.int64, device=world.device)
    return torch.equal(world.broadcast_(own_digest.clone()), own_digest)  # broadcast_ overwrites its argument


def build_for_evaluation(cfg: Config, state: CheckpointContent, weights: Path, world: World) -> nn.Module:
    """Return the model of the config with a checkpoint's weights, in eval mode on the device."""
    import methods
    from utils import checkpoint
    from utils.engine.network import model_arguments, place

    net = methods.build(**model_arguments(cfg, pretrained=False))
    checkpoint.load_model(net, checkpoint.evaluated_weights(state)[0], weights)
    return place(net, world.device, cfg.precision).eval()


def prepare(cfg: Config, protocol: Protocol, build: Callable[[], nn.Module], *, as_is: bool) -> tuple[nn.Module, Cost]:
    """Return the network that scores the views of a protocol, and what a view costs.

    Args:
        cfg: a loaded configuration.
        protocol: the views that there will be.
        build: returns the network, in evaluation mode on its device.
        as_is: leave the network as trained, instead of bringing it into a faster form (`fold_bn`).

    Returns:
        The network; {gmacs_per_view, gmacs_per_video, parameters}.

    Raises:
        UserError: the network does not take clips of this many frames, or cannot be tested per position.
    """
    from methods import macs
    from methods.positions import PositionScores

    # Count on the network as built: `fold_bn` removes layers, so the figure would depend on the form.
    net = build()
    spec = protocol.spec
    shape = (1, 3, spec.sampling.frames_per_clip, spec.crop_size, spec.crop_size)  # (B, C, T, H, W)
    try:
        gmacs = macs.count_macs(net, shape) / 1e9
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{cfg.model.type} cannot be shown these views ({protocol.text}): {error}") from error

    cost: Cost = {
        "gmacs_per_view": round(gmacs, 4),
        "gmacs_per_video": round(gmacs * spec.views, 4),
        "parameters": macs.count_parameters(net),
    }

    # In half precision rounding alone may exceed `_SAME`.
    if not as_is and cfg.precision in ("fp32", "fp64"):
        net = fold_bn(net, shape, build)
    if protocol.window:
        if not hasattr(net, "window_logits"):
            raise UserError(f"--per-position: {cfg.model.type} has no classifier on windows of its map")
        net = PositionScores(net, protocol.window).eval()
    return net, cost


def fold_bn(net: nn.Module, shape: tuple[int, ...], again: Callable[[], nn.Module]) -> nn.Module:
    """Return the network in its fastest form for evaluation, or as trained (`again`) if that changes its scores.

    Batch norm becomes part of the convolutions before it (methods/folding.py).
    """
    import torch

    from methods import folding
    from utils import view_batches

    # A small clip is enough: it passes through every layer.
    weight = next(net.parameters())
    side = min(shape[-1], _PROBE_SIDE)
    noise = torch.Generator().manual_seed(0)
    clip = torch.randn((1, shape[2], side, side, 3), generator=noise, dtype=weight.dtype).permute(0, 4, 1, 2, 3)
    clip = clip.to(weight.device)  # (1, T, H, W, C) -> (1, C, T, H, W), with the strides of a clip from the loader

    # `fold` changes the network in place, so `before` comes first and `again` builds a new one.
    with torch.inference_mode(), view_batches.full_precision():
        before = net(clip)
        folding.fold(net)
        after = net(clip)

    error = (before.softmax(1) - after.softmax(1)).abs().max().item()
    if error <= _SAME:
        return net
    print(f"the network stays as it was trained: its faster form would change scores by {error:.1e}", flush=True)
    return again()


def scorer(
    net: nn.Module, cfg: Config, world: World, protocol: Protocol, clips_per_forward: int | None
) -> Callable[..., list[dict[str, float]] | None]:
    """Return `utils.engine.evaluate.evaluate` with all arguments that follow from network, config and protocol."""
    from utils.engine.evaluate import evaluate, of_config

    return functools.partial(
        evaluate, net, **of_config(cfg, world), clips_per_forward=clips_per_forward, average=protocol.average
    )
