"""Train with a second network: a frozen teacher (KD), or two networks that learn from each other (DML).

* KD (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2): ``(1 - w) hard + w T^2 KL(p_t || p_s)``, with p the
  softmax of logits / T; T^2 keeps the gradient's size when T changes.
* DML (Zhang et al. 2018, arXiv:1706.00384) as PaddleVideo trains PP-TSMv2: ``hard_s + hard_p + w (KL(p_p || p_s) +
  KL(p_s || p_p)) / 2``, no temperature, and the gradient of the mutual term goes into both networks.

`hard` is the training loss of one network alone, with its label smoothing, mixup and auxiliary heads. The sources of
the defaults are in docs/training.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from utils import checkpoint, config, weights_file
from utils.errors import UserError
from utils.loss import training_loss, weighted_mean

if TYPE_CHECKING:
    from utils.config import Config

Colour = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of RGB, on 0..1


def kd_per_clip(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``: logits (B, K) -> (B,), at least float32."""
    return temperature**2 * _kl(_log_softmax(teacher, temperature), _log_softmax(student, temperature))


def mutual_per_clip(one: Tensor, other: Tensor) -> Tensor:
    """Return ``(KL(p_one || p_other) + KL(p_other || p_one)) / 2``: logits (B, K) -> (B,), at least float32."""
    first, second = _log_softmax(one), _log_softmax(other)
    return (_kl(first, second) + _kl(second, first)) / 2


def _log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    # Half precision would round small probabilities to 0, and the divergence with them
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim=1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # No 0 * inf: log-softmax is finite, so p = 0 gives 0
    return (log_p.exp() * (log_p - log_q)).sum(1)


class Teacher:
    """A frozen network in evaluation mode that sees the student's clips, augmented and mixed.

    Args:
        net: on its device.
        temperature: T.
        weight: w, the share of the soft term in the loss.
        recolour: (B, C, T, H, W) normalised for the student -> normalised as the teacher was trained.
        autocast: the mixed-precision region of the run.
        weights_hash: sha256 of the weights file; a resume with another file is refused.
    """

    peer: nn.Module | None = None

    def __init__(
        self,
        net: nn.Module,
        *,
        temperature: float,
        weight: float,
        recolour: Callable[[Tensor], Tensor] | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        weights_hash: str = "",
    ) -> None:
        self.net = net.requires_grad_(False).eval()
        self.temperature, self.weight = temperature, weight
        self.recolour, self.autocast, self.weights_hash = recolour, autocast, weights_hash

    def loss(
        self, answer: object, clips: Tensor, labels: Tensor, *, weights: Tensor | None = None, **targets: object
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, the student's logits); arguments as in `utils.loss.training_loss`, plus the student's clips."""
        hard, logits = training_loss(answer, labels, weights=weights, **targets)

        with torch.no_grad(), self.autocast():
            teacher_logits = self.net(clips if self.recolour is None else self.recolour(clips))  # (B, K)

        soft = weighted_mean(kd_per_clip(logits, teacher_logits, self.temperature), weights)
        # `kd_per_clip` has the factor T^2
        return (1 - self.weight) * hard + self.weight * soft, logits

    def state(self) -> dict[str, object]:
        """Return the entries of a checkpoint."""
        return {"distill": {"kind": "kd", "weights_hash": self.weights_hash}}


class Pair(nn.Module):
    """Student and peer as one module, so that DDP, the optimiser and the BN statistics cover both.

    Args:
        student: the network that is validated and saved as `model`.
        peer: the second network; it sees the same clips.
    """

    def __init__(self, student: nn.Module, peer: nn.Module) -> None:
        super().__init__()
        self.student, self.peer = student, peer

    def forward(self, clips: Tensor) -> tuple[object, object]:
        """Return the answers of student and peer to clips (B, C, T, H, W)."""
        return self.student(clips), self.peer(clips)


class Mutual:
    """Two networks that train together; only the student is validated.

    Args:
        peer: the second network.
        weight: w, factor of the mutual term.
        arguments: the arguments of `methods.build` for the peer, kept in the checkpoint.
    """

    def __init__(self, peer: nn.Module, *, weight: float, arguments: dict[str, object]) -> None:
        self.peer, self.weight, self.arguments = peer, weight, arguments

    def loss(
        self,
        answers: tuple[object, object],
        clips: Tensor,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        **targets: object,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss of both, the student's logits); `answers` come from `Pair`."""
        hard, logits = training_loss(answers[0], labels, weights=weights, **targets)
        hard_peer, peer_logits = training_loss(answers[1], labels, weights=weights, **targets)
        # No detach: the gradient of this term goes into both networks
        mutual = weighted_mean(mutual_per_clip(logits, peer_logits), weights)
        return hard + hard_peer + self.weight * mutual, logits

    def state(self) -> dict[str, object]:
        """Return the entries of a checkpoint: `model` is the student there, `peer` the second network."""
        return {"peer": self.peer.state_dict(), "distill": {"kind": "dml", "model": self.arguments}}


@dataclass(frozen=True)
class TeacherSource:
    """The network that `distill.teacher` names.

    Attributes:
        cfg: config that defines how the network is built and how its clips are normalised.
        file: file with its weights; None if no file is named (`pretrained: true`).
        state: the checkpoint in that file, if it is ours; None: `cfg.model.pretrained` fills the network.
    """

    cfg: Config
    file: Path | None
    state: checkpoint.CheckpointContent | None


def find(teacher: Path, student: Config) -> TeacherSource:
    """Resolve `distill.teacher`: an experiment folder, one of our checkpoints, or another weights file.

    A folder's config defines the network. Its best checkpoint fills it, else its latest, else its `model.pretrained`.
    A checkpoint contains its config. Every other file must fit the student's own architecture.

    Raises:
        UserError: no such file, or a network with other classes.
    """
    if teacher.is_dir():
        cfg = config.load(teacher)
        paths = [path for name in (checkpoint.BEST, checkpoint.LATEST) if (path := checkpoint.newest(teacher, name))]
        other = Path(cfg.model.pretrained) if isinstance(cfg.model.pretrained, str) else None
        source = TeacherSource(cfg, paths[0], _state_in(paths[0])) if paths else TeacherSource(cfg, other, None)
    elif teacher.is_file():
        source = _of_file(teacher, student)
    else:
        raise UserError(f"common.distill.teacher: there is no {teacher}; name an experiment folder or a weights file")

    # The divergence compares the networks class by class
    classes = source.cfg.model.num_class, student.model.num_class
    if classes[0] != classes[1]:
        raise UserError(f"common.distill.teacher: {teacher} has {classes[0]} classes, this experiment {classes[1]}")
    return source


def _state_in(file: Path) -> checkpoint.CheckpointContent:
    """Return the checkpoint in an experiment folder."""
    state = checkpoint.load(file)
    if not weights_file.is_checkpoint(state):
        raise UserError(f"common.distill.teacher: {file} is not a checkpoint of a run; name the file itself to use it")
    return state


def _of_file(file: Path, student: Config) -> TeacherSource:
    """Return the source for a weights file; refuse a damaged one. `methods.build` reads files of other projects."""
    try:
        state = weights_file.read(file)
    except UserError as error:
        raise UserError(f"common.distill.teacher: {error}") from error
    # Not one of our checkpoints: build the student's architecture and let it load the file
    if not weights_file.is_checkpoint(state):
        model = student.model.model_copy(update={"pretrained": str(file)})
        return TeacherSource(student.model_copy(update={"model": model}), file, None)

    try:
        return TeacherSource(config.from_dict(state["config"]), file, state)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"common.distill.teacher: the config in {file} is from a different version; name its experiment folder"
        ) from error


def recolour(theirs: Colour, ours: Colour, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return the function from a clip normalised with our mean and deviation to one with theirs.

    None if the two are equal. The function applies one factor and one shift per channel, so it may follow mixup.
    """
    if [list(part) for part in theirs] == [list(part) for part in ours]:
        return None

    # (x * own_std + own_mean - mean) / std, in float64 so that the two constants are rounded once
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(part, dtype=torch.float64, device=device) for part in colour] for colour in (theirs, ours)
    )
    factor, shift = own_std / std, (own_mean - mean) / std

    def change(clips: Tensor) -> Tensor:
        # (1, C, 1, 1, 1) for clips (B, C, T, H, W)
        wide = (1, -1, *[1] * (clips.dim() - 2))
        return clips * factor.to(clips.dtype).view(wide) + shift.to(clips.dtype).view(wide)

    return change
