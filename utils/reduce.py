"""Average the gradients over the ranks, in an order of addition that never changes.

A ring all-reduce adds the ranks' numbers in an order that depends on a number's place in the message. So two runs agree
bit for bit only if every gradient always has the same place. `torch.nn.parallel.DistributedDataParallel` arranges its
messages a second time after the first backward pass of each process. With three or more ranks, a run that stopped and
resumed would then end with different bits from one that did not stop. Here the places follow from the model alone.

Uses public torch only: hooks on the parameters and asynchronous all-reduces.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError

if TYPE_CHECKING:
    from utils.dist import World

FIRST_BUCKET = 2**20  # bytes; small, so that the first message leaves early in the backward pass
BUCKET = 25 * 2**20  # bytes, as in DDP; a parameter is never split, so a bucket may be larger


class AveragedGradients(nn.Module):
    """A model whose parameters have, after `backward()`, the mean of all ranks' gradients.

    Buckets of parameters are sent while the backward pass still runs, in a fixed order: parameters from last to first
    as the model lists them, cut by size. Each rank must run the same backward passes. When `backward()` returns, the
    means are ready (on CUDA: for work queued on the current stream). `grad` of each parameter is then a view of its
    bucket with the parameter's strides.

    Args:
        module: on its final device, of the same architecture on every rank; all ranks get rank 0's parameters.
        world: two or more ranks.

    Attributes:
        module: the model itself.

    Raises:
        UserError: the ranks have different models.
        ValueError: no parameter requires a gradient.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        super().__init__()
        self.module = module
        self._share = 1 / world.size
        self._is_on = True
        self._works: list[dist.Work] = []  # of the buckets that were sent in this backward pass

        trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("the model has no parameter that requires a gradient")
        _check_same_model(trained, world)

        # Backward passes finish the last layers first, so their gradients can leave first.
        self._buckets = [_Bucket(members) for members in _cut(reversed(trained))]
        for bucket in self._buckets:
            bucket.send_parameters(world)
            for index, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, bucket, index))

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the model.

        Raises:
            RuntimeError: some parameters got no gradient in the last backward pass.
        """
        if self.training and torch.is_grad_enabled():
            self._check_complete()
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward passes add to this rank's gradients only; the next one outside averages their sum."""
        before, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = before

    def _arrived(self, bucket: _Bucket, index: int, parameter: Tensor) -> None:
        """Move a parameter's finished gradient into its bucket; send all buckets that are due.

        This runs once for each parameter in each step, during the backward pass: keep it short.
        """
        gradient = parameter.grad
        if not self._is_on or gradient is None:
            return

        view = bucket.views[index]
        torch.mul(gradient, self._share, out=view)  # autograd records nothing: a gradient requires no gradient
        parameter.grad = view

        bucket.missing.discard(index)
        if not bucket.missing:
            self._send()

    def _send(self) -> None:
        """Send full buckets, on every rank in the same order, even if they fill in a different order."""
        while len(self._works) < len(self._buckets) and not self._buckets[len(self._works)].missing:
            work = dist.all_reduce(self._buckets[len(self._works)].flat, async_op=True)
            assert work is not None
            self._works.append(work)

        # The last bucket: wait here, so that `backward()` returns with the means in place.
        if len(self._works) == len(self._buckets):
            for work in self._works:
                work.wait()
            self._start_over()

    def _start_over(self) -> None:
        self._works = []
        for bucket in self._buckets:
            bucket.missing = set(range(len(bucket.parameters)))

    def _check_complete(self) -> None:
        if not self._works and all(len(bucket.missing) == len(bucket.parameters) for bucket in self._buckets):
            return

        names = [bucket.names[index] for bucket in self._buckets for index in sorted(bucket.missing)]
        raise RuntimeError(
            f"no gradient came for {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}: with several ranks every "
            "parameter that requires a gradient must take part in the loss of every batch, on every rank"
        )


class _Bucket:
    """Parameters whose gradients travel in one message."""

    def __init__(self, members: list[tuple[str, nn.Parameter]]) -> None:
        self.names = [name for name, _ in members]
        self.parameters = [parameter for _, parameter in members]

        first = self.parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=first.dtype, device=first.device)

        parts = self.flat.split([parameter.numel() for parameter in self.parameters])
        self.views = [_like(part, parameter) for part, parameter in zip(parts, self.parameters, strict=True)]
        self.missing = set(range(len(members)))  # whose gradients have not arrived in this backward pass

    @torch.no_grad()
    def send_parameters(self, world: World) -> None:
        """Copy rank 0's parameters to the other ranks."""
        # Through the bucket that exists anyway: one broadcast, not one per parameter.
        for view, parameter in zip(self.views, self.parameters, strict=True):
            view.copy_(parameter)
        world.broadcast_(self.flat)
        for view, parameter in zip(self.views, self.parameters, strict=True):
            parameter.copy_(view)


def _like(part: Tensor, parameter: Tensor) -> Tensor:
    """Return a part of a flat tensor in a parameter's shape, with its strides if they leave no gaps."""
    if torch.empty_like(parameter).stride() == parameter.stride():  # empty_like closes gaps and overlaps
        return part.as_strided(parameter.size(), parameter.stride(), part.storage_offset())
    return part.view(parameter.size())


def _cut(members: Iterable[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Yield neighbouring parameters of one dtype and device, up to the size of a bucket."""
    bucket: list[tuple[str, nn.Parameter]] = []
    size, limit = 0, FIRST_BUCKET

    for name, parameter in members:
        other = bucket and (bucket[0][1].dtype, bucket[0][1].device) != (parameter.dtype, parameter.device)
        if bucket and (other or size >= limit):
            yield bucket
            bucket, size, limit = [], 0, BUCKET

        bucket.append((name, parameter))
        size += parameter.numel() * parameter.element_size()
    yield bucket


def _check_same_model(members: list[tuple[str, nn.Parameter]], world: World) -> None:
    """Raise a UserError on every rank if names, shapes or dtypes differ: sums of such models would mean nothing."""
    text = "\n".join(f"{name} {tuple(weight.shape)} {weight.stride()} {weight.dtype}" for name, weight in members)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")  # 7 bytes fit into an int64
    first = world.broadcast_(torch.tensor([digest], dtype=torch.int64, device=world.device))

    if world.any(int(first.item()) != digest):
        raise UserError(
            "the ranks have built different models: use the same code, config and version of torch on all nodes"
        )
