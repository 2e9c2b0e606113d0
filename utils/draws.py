"""Draw random numbers on the training device by (seed, step, shard), so that any number of ranks draws the same."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class _Shards:
    seed: int
    step: int
    shards: tuple[int, ...]
    rows_per_shard: int


# A context variable, not an attribute of the layers: the model need not be searched for them in each step.
_current: ContextVar[_Shards | None] = ContextVar("zoetrope_shards", default=None)


@contextlib.contextmanager
def rng_scope(seed: int, step: int, shards: tuple[int, ...], rows_per_shard: int) -> Iterator[None]:
    """Let `Dropout` draw for these shards of global batch `step`. Wrap the forward pass of one micro-batch in it.

    Args:
        seed: the run's seed.
        step: number of the global batch.
        shards: the shards whose clips follow each other in the micro-batch.
        rows_per_shard: clips per shard (`batch_size`).
    """
    token = _current.set(_Shards(seed, step, tuple(shards), rows_per_shard))
    try:
        yield
    finally:
        _current.reset(token)


class Dropout(nn.Module):
    """Dropout (Srivastava et al., JMLR 2014) whose mask depends on (seed, step, shard, layer), not on the rank.

    The first axis of the input holds the micro-batch's clips, or k rows of each clip next to each other (B*T frames).
    Inside `rng_scope` a separate generator draws the mask of each shard's rows. Outside it the layer is `F.dropout`, in
    eval mode the identity. `prepare(model)` must have given the layer its key. A layer that is used twice in a forward
    pass would draw the same mask twice: use two layers.

    Args:
        p: probability of a zero; the other elements are scaled by 1 / (1 - p).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability must be in [0, 1], not {p}")
        self.p = p
        self.key: int | None = None
        self._generator: torch.Generator | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero elements of x at random and scale the others; keep shape and dtype."""
        if not self.training or self.p == 0.0:
            return x

        shards = _current.get()
        if shards is None:
            return self._at_random(x)
        if self.p == 1.0:  # the scale below would be 0 / 0
            return x * 0.0
        return x * self._mask(x, shards).to(x.dtype).div_(1.0 - self.p)

    def _at_random(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.p, training=True)

    def _drawn(self, x: torch.Tensor) -> torch.Size:
        """Return the shape of the mask, which is broadcast over x."""
        return x.shape

    def _mask(self, x: torch.Tensor, draw: _Shards) -> torch.Tensor:
        if self.key is None:
            raise RuntimeError("a Dropout without a key: call utils.draws.prepare(model) once the model is built")

        rows, rest = divmod(x.shape[0], len(draw.shards))
        if rest or rows % draw.rows_per_shard:
            raise ValueError(
                f"dropout: {x.shape[0]} rows do not make {len(draw.shards)} shards of {draw.rows_per_shard} clips"
            )

        if self._generator is None or self._generator.device != x.device:
            self._generator = torch.Generator(x.device)
        # float32 for any input, so that the precision of a run does not change its masks.
        shape = self._drawn(x)
        # (shards, rows, ...): one piece per shard, so that a mask does not depend on the shards of this rank.
        mask = torch.empty((len(draw.shards), rows, *shape[1:]), dtype=torch.float32, device=x.device)
        for piece, shard in zip(mask, draw.shards, strict=True):
            self._generator.manual_seed(_mix(draw.seed, draw.step, shard, self.key))
            piece.bernoulli_(1.0 - self.p, generator=self._generator)

        return mask.view(shape)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_generator": None}  # generators cannot be copied; `_mask` creates one again

    def extra_repr(self) -> str:
        """Return what print(model) shows."""
        return f"p={self.p}"


class DropPath(Dropout):
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): drop a residual branch for whole rows of the batch.

    Masks and options as for `Dropout`; the branches of the other rows are scaled by 1 / (1 - p).
    """

    def _at_random(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.dropout(x.new_ones(self._drawn(x)), self.p, training=True)

    def _drawn(self, x: torch.Tensor) -> torch.Size:
        # One number per row: (B, ...) -> (B, 1, ..., 1).
        return torch.Size((x.shape[0], *[1] * (x.dim() - 1)))


def prepare(model: nn.Module) -> nn.Module:
    """Give each `Dropout` of the model its key, from its name in the model. Call this before DDP adds a prefix."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            # A key by name, not by order: a layer that is added elsewhere does not change the other masks.
            module.key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return model


def generator(seed: int, step: int, purpose: int) -> np.random.Generator:
    """Return a generator for what is drawn once for the whole global batch `step`.

    Args:
        seed: of the run.
        step: number of the global batch.
        purpose: keeps different draws of a seed and step apart.
    """
    # 128 bits of key: 64 of seed and purpose, 64 of the step, so that no two steps share a stream.
    key = (_mix(seed, purpose) << 64) | (step & _MASK)
    return np.random.Generator(np.random.Philox(key=key))


def _mix(*numbers: int) -> int:
    """Mix several integers into 64 bits (the finaliser of splitmix64: Steele et al., OOPSLA 2014, section 3)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
