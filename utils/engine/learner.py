"""The parts of a training step: networks, optimiser, batch-norm statistics, teacher and weight average."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import methods
from utils import checkpoint, dist, draws, files, mixup, optim, stragglers, sync_bn, transforms
from utils.engine import distill, probes
from utils.engine.ema import Ema
from utils.engine.network import autocast, compiled, dtype_of, model_arguments, optimizer_of, place
from utils.errors import AgreedError, UserError
from utils.loss import training_loss

if TYPE_CHECKING:
    from datasets.loading.train import Batch
    from utils.config import Config
    from utils.dist import World
    from utils.shards import ShardPlan

_NAMED = 16  # videos that an error names


@dataclass
class Learner:
    """The parts of a training step, built from a config by `build`.

    Attributes:
        cfg, world, shards: the experiment, the ranks, this rank's share of the global batch.
        net: the network that is validated and saved.
        model: `net` as training calls it: paired with the second network of mutual learning, compiled, and wrapped to
            average its gradients over the ranks.
        optimizer, scaler: the optimiser and the loss scale of fp16.
        bn_stats: running statistics of the batch-norm groups.
        ema: moving average of the weights, if any.
        distill: teacher or second network, if any.
        mirrored: (K,) class of each class's mirror image, if `data.flip_labels` names some.
        path_at: global position -> path of the clip, for messages.
        grad_norm: 2-norm of all gradients before clipping, of the last step with a progress line; on the device.
        on_phase: called with (name, step) when a part of the step begins; the watchdog sets it.
    """

    cfg: Config
    world: World
    shards: ShardPlan
    net: nn.Module
    model: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    bn_stats: sync_bn.BnStats
    ema: Ema | None
    distill: distill.Teacher | distill.Mutual | None
    mirrored: torch.Tensor | None = None
    path_at: Callable[[int], str] = str
    grad_norm: torch.Tensor | None = None
    on_phase: Callable[[str, int], object] = lambda name, step: None
    stragglers: stragglers.StragglerMonitor = field(init=False)

    def __post_init__(self) -> None:
        self.stragglers = stragglers.StragglerMonitor(self.world, self.shards)

    def begin(self, step: int) -> mixup.Mix:
        """Switch to training mode and drop the gradients; return how this step mixes neighbouring clips."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        settings = self.cfg.augmentation
        alphas = {"mix_up": settings.mix_up, "cutmix": settings.cutmix}
        return mixup.draw(self.cfg.seed, step, **alphas, switch=settings.mix_up_switch, side=settings.input_size)

    @contextlib.contextmanager
    def micro_batch(self, step: int, batch: Batch, *, is_last: bool) -> Iterator[None]:
        """Key the dropout masks by (step, shards); average gradients over the ranks after the last micro-batch only."""
        # `no_sync` of DDP adds gradients up locally, so that one all-reduce serves the whole step
        waits = contextlib.nullcontext() if is_last or self.world.size == 1 else self.model.no_sync()
        with waits, draws.rng_scope(self.cfg.seed, step, batch.shards, self.shards.batch_size):
            yield

    def augment(self, batch: Batch, mix: mixup.Mix | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply what the plans of a batch drew, and mix neighbouring clips.

        Returns:
            clips (B, C, T, H, W), normalised; labels, replaced as `data.flip_labels` requires for mirrored clips.
        """
        settings, dtype = self.cfg.augmentation, dtype_of(self.cfg.precision)
        # (B, T, H, W, C) -> (B, C, T, H, W)
        clips = transforms.augment(batch.clips, batch.drawn, mean=settings.mean, std=settings.std, dtype=dtype)
        if mix is not None:
            clips = mixup.apply(clips, mix)

        # "left" mirrored is "right": such classes change their label with the flip
        if self.mirrored is None:
            return clips, batch.labels
        return clips, transforms.mirrored_labels(batch.labels, batch.flip, self.mirrored)

    def forward(self, clips: torch.Tensor) -> Any:
        """Return the model's answer to (B, C, T, H, W): (B, K), or an object with logits and aux of that shape."""
        with autocast(self.cfg.precision, self.world.device):
            return self.stragglers.forward(self.model, clips)

    def loss(
        self, answer: Any, clips: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, mix: mixup.Mix
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (loss, logits (B, K)) of an answer to clips that were mixed by `mix`."""
        targets = {"kind": self.cfg.loss, "label_smooth": self.cfg.label_smooth, "weights": weights, "lam": mix.lam}
        if self.distill is None:
            return training_loss(answer, labels, **targets)
        return self.distill.loss(answer, clips, labels, **targets)

    def share(self, batch: Batch) -> float:
        """Return the share of a micro-batch in the global batch."""
        return len(batch.shards) / self.shards.total

    def backward(self, loss: torch.Tensor, share: float) -> None:
        """Add the gradients of a micro-batch to those of the step.

        The step needs the sum over the ranks, but DDP averages: the factor world size makes up for it. The losses of
        several heads are summed. Heads share no parameter, so each gets the gradients of its own loss.
        """
        self.scaler.scale(loss.sum() * (share * self.world.size)).backward()

    def update(self, step: int) -> None:
        """Step the optimiser, then the running statistics and the moving average of the weights. Collective."""
        self.on_phase("optimiser step", step)

        # The norm costs time, so it is measured only for a progress line
        due = self.is_due(step + 1)
        norm = optim.apply(self.optimizer, self.scaler, max_norm=self.cfg.clip_grad, measure=due)
        if due:
            self.grad_norm = norm

        self.bn_stats.after_step()
        if self.ema:
            self.bn_stats.for_evaluation()  # the average follows group 0 where each BN group has its own statistics
            self.ema.update(self.net, step)

    def is_due(self, step: int) -> bool:
        """Return True if a progress line is due after `step` finished steps."""
        return step == 1 or step % self.cfg.print_freq == 0

    def non_finite(self, step: int, losses: Mapping[tuple[int, ...], torch.Tensor]) -> AgreedError:
        """Return the error that every rank raises together; it names the videos whose loss is not finite.

        Args:
            step: the iteration.
            losses: mean loss of each of this rank's micro-batches, by its shards.
        """
        # One flag per shard, filled in by the rank that has the shard
        bad = torch.zeros(self.shards.total, dtype=torch.float64, device=self.world.device)
        for shards, value in losses.items():
            bad[list(shards)] = float(not all(map(math.isfinite, value.reshape(-1).tolist())))
        self.world.sum_(bad)

        # From shards to positions in the order of training, and from those to paths
        positions = [p for shard in bad.nonzero().flatten().tolist() for p in self.shards.positions(step, shard)]
        names = ", ".join(self.path_at(position) for position in positions[:_NAMED])
        return AgreedError(
            f"the loss of iteration {step + 1} is not finite; all ranks stopped before the optimiser step and the last "
            f"checkpoint is unchanged. Videos in the batch: {names}{', ...' if len(positions) > _NAMED else ''}. "
            "Lower the learning rate, set common.clip_grad, or look at these videos"
        )


def build(
    cfg: Config,
    world: World,
    shards: ShardPlan,
    saved: Mapping[str, Any] | None,
    say: Callable[[str], object],
) -> Learner:
    """Build the parts of a training step from a config.

    Args:
        saved: the checkpoint from which the run resumes, if any; `state.load` fills the parts from it.
        say: writes a line of the log.

    Raises:
        UserError: the config names weights that do not fit.
    """
    # The order matters for the random numbers: every rank draws the same initial weights, the student's first
    torch.manual_seed(cfg.seed)
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not cfg.deterministic  # clips have one size: one search finds the fastest kernel

    # Networks: the student, and for mutual learning a peer. A checkpoint replaces pretrained weights
    net = methods.build(**model_arguments(cfg, pretrained=False if saved else cfg.model.pretrained))
    probes.check(net, precision=cfg.precision, distills=cfg.distill.teacher is not None)
    net = place(net, world.device, cfg.precision)
    second = _second(cfg, world, saved)
    trained = distill.Pair(net, second.peer) if second and second.peer else net  # what the optimiser updates
    trained = sync_bn.convert(trained, shards, sync_stats=cfg.model.kwargs["bn_sync_stats"])

    # The average copies the network, before `BnStats` moves the running buffers into one tensor
    ema = Ema(net, cfg.ema) if cfg.ema else None
    bn_stats = sync_bn.BnStats(trained, shards, world)

    # Optimiser
    networks = [trained.student, trained.peer] if isinstance(trained, distill.Pair) else [net]
    optimizer = optimizer_of(cfg, *networks, lr=cfg.lr_scheduler.base_lr)
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "fp16")

    # Compile first: DDP wraps the compiled module
    model: Any = compiled(trained, cfg.compile, world.device, say)
    if world.size > 1:
        model = dist.data_parallel(model, world)

    return Learner(cfg, world, shards, net, model, optimizer, scaler, bn_stats, ema, second)


def _second(cfg: Config, world: World, saved: Mapping[str, Any] | None) -> distill.Teacher | distill.Mutual | None:
    """Build the second network that `distill` names, on the device; None without one."""
    settings = cfg.distill
    if settings.teacher is None:
        return None
    assert settings.weight is not None, "filled in when the config was loaded"

    on_device = functools.partial(place, device=world.device, precision=cfg.precision)
    # A resumed pair: the checkpoint holds both networks, and the named files are not needed any more
    if settings.kind == "dml" and saved:
        arguments = saved["distill"]["model"]
        return distill.Mutual(
            on_device(_named_draws(methods.build(**arguments))), weight=settings.weight, arguments=arguments
        )

    # The second network sees the student's clips, so it takes their number of frames
    source = distill.find(Path(settings.teacher), cfg)
    student_arguments = model_arguments(cfg, pretrained=False)
    arguments = model_arguments(source.cfg, pretrained=False) | {"num_segments": student_arguments["num_segments"]}
    if settings.kind == "dml":
        net = _filled(arguments, source)
        return distill.Mutual(on_device(_named_draws(net)), weight=settings.weight, arguments=arguments)
    # A fork of the generator: whatever the teacher draws, the student's random numbers stay the same
    with torch.random.fork_rng(devices=[]):
        net = _trained(arguments, source)
    colours = [(pixels.mean, pixels.std) for pixels in (source.cfg.augmentation, cfg.augmentation)]
    return distill.Teacher(
        on_device(net),
        temperature=settings.temperature,
        weight=settings.weight,
        recolour=distill.recolour(colours[0], colours[1], world.device),
        autocast=lambda: autocast(cfg.precision, world.device),
        weights_hash=_same_file(source.file, saved, world),
    )


def _filled(arguments: dict[str, Any], source: distill.TeacherSource) -> nn.Module:
    """Return a network with the weights of its source, or with random ones if the source has none."""
    if source.state is None:
        pretrained_arguments: dict[str, Any] = {**arguments, "pretrained": source.cfg.model.pretrained}
        return methods.build(**pretrained_arguments)

    net = methods.build(**arguments)
    weights, phrase = checkpoint.evaluated_weights(source.state)
    checkpoint.load_model(net, weights, source.file or "the checkpoint")
    net.pretrained_note = f"{phrase}, from {source.file}"  # pyright: ignore[reportArgumentType]
    return net


def _trained(arguments: dict[str, Any], source: distill.TeacherSource) -> nn.Module:
    """Build the teacher. Refuse one whose classifier still has its random initial weights."""
    # The same seed twice: a classifier that equals a fresh one came from no file
    torch.manual_seed(0)
    net = _filled(arguments, source)

    torch.manual_seed(0)
    fresh = {key: init for key, init in methods.build(**arguments).named_parameters() if key.startswith("classifier.")}
    if all(torch.equal(net.get_parameter(key), init) for key, init in fresh.items()):
        raise UserError(
            f"common.distill.teacher: {source.file or 'the experiment'} holds no trained classifier for these classes: "
            "train the teacher first, or name its weights"
        )
    return net


def _named_draws(peer: nn.Module) -> nn.Module:
    """Rename the peer's layers, so that their dropout masks differ from the student's."""
    draws.prepare(nn.ModuleDict({"peer": peer}))
    return peer


def _same_file(file: Path | None, saved: Mapping[str, Any] | None, world: World) -> str:
    """Return the sha256 of the teacher's weights; refuse to resume with another file."""
    digest = ""

    def check() -> None:
        nonlocal digest
        digest = files.sha256(file) if file else ""
        kept = saved["distill"]["weights_hash"] if saved else digest
        if kept != digest:
            raise UserError(
                f"common.distill.teacher: {file} has changed since this run started with it; put the old file back, "
                "or start over with --fresh"
            )

    # One rank reads the file: hundreds may share the file system
    world.on_main(check)
    return digest
