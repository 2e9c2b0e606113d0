"""Normalise over groups of shards, with running statistics that advance once per step.

Build order: model on its device -> `convert` -> `BnStats` -> `dist.data_parallel`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from utils.dist import World, collective_timeout
from utils.errors import UserError
from utils.shards import ShardPlan


class _Ranks:
    """The ranks that share one BN group. A copy of a model shares this object: process groups cannot be copied."""

    def __init__(self, process_group: dist.ProcessGroup, size: int) -> None:
        self.process_group = process_group
        self.size = size

    def __deepcopy__(self, memo: dict[int, object]) -> _Ranks:
        return self


class GroupBatchNorm(_BatchNorm):
    """Batch normalisation (Ioffe & Szegedy, ICML 2015) over a BN group.

    Parameters and buffers have the names and meaning of nn.BatchNorm1d/2d/3d; the input is (B, C), (B, C, T),
    (B, C, H, W) or (B, C, T, H, W). In training the statistics come from the group's whole batch, forward and backward,
    and the running statistics do not change: `BnStats` advances them from the batch mean and unbiased variance that
    the forward pass leaves in `batch_mean` and `batch_var`. Eval mode uses the running statistics. A layer that is used
    twice in one forward pass leaves the statistics of its last use.

    Weight and bias gradients cover this rank's rows only; utils/reduce.py adds those of the ranks.
    """

    ranks: _Ranks | None = None  # None: the whole group is on this rank
    sync_stats: bool = True
    ran: bool = False  # in training mode since the last BnStats.after_step
    batch_mean: torch.Tensor | None = None  # (C,) not buffers: they are scratch, never saved or broadcast
    batch_var: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise; keep shape, dtype and memory format."""
        if not self.training:
            return super().forward(input)

        self._check_input_dim(input)
        self.ran = True
        mean, var = self._scratch()

        if self.ranks is None:
            # With momentum 1 the "running" statistics become exactly this batch's mean and unbiased variance.
            return F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)

        group, size = self.ranks.process_group, self.ranks.size
        if input.is_cuda:
            return _GpuGroupNorm.apply(input, self.weight, self.bias, mean, var, self.eps, group, size)
        return _CpuGroupNorm.apply(input, self.weight, self.bias, mean, var, self.eps, group)

    def _scratch(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.batch_mean is None and self.running_mean is not None:  # no BnStats has been built (yet)
            self.batch_mean, self.batch_var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_mean)
        return self.batch_mean, self.batch_var

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if not 2 <= input.dim() <= 5 or input.shape[1] != self.num_features:
            raise ValueError(f"expected (B, {self.num_features}, ...) with 2 to 5 axes, got {tuple(input.shape)}")


class _CpuGroupNorm(torch.autograd.Function):
    """Batch norm over the rows of all ranks of a process group, where torch has no kernel (CPU).

    The variance is computed in two passes: E[x^2] - E[x]^2 would lose all digits for inputs with a large mean. The
    arithmetic is in float32 or wider, whatever dtype autocast chose for the input; the ranks' sums are in float64.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, batch_mean, batch_var, eps, group):  # noqa: ANN001, ANN205
        wide = torch.promote_types(x.dtype, torch.float32)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        rows = x.to(wide)

        # First pass: sum and number of values over the ranks, in one message -> mean (C,).
        local = torch.cat([rows.sum(axes).double(), torch.tensor([rows.numel() / rows.shape[1]], dtype=torch.float64)])
        dist.all_reduce(local, group=group)
        count = local[-1].item()
        if count < 2:
            raise ValueError("batch norm in training needs more than 1 value per channel in a BN group")
        mean = (local[:-1] / count).to(wide)

        # Second pass: sum of squared distances -> variance.
        centred = rows - _wide(mean, x)
        squares = centred.square().sum(axes).double()
        dist.all_reduce(squares, group=group)
        inv_std = (squares / count + eps).rsqrt().to(wide)
        if batch_mean is not None:
            batch_mean.copy_(mean)
            batch_var.copy_(squares / (count - 1))

        # x is kept, not the centred rows: it is in memory anyway as the output of the layer before.
        ctx.save_for_backward(x, weight, mean, inv_std)
        ctx.count, ctx.group = count, group
        scale = inv_std if weight is None else inv_std * weight
        out = centred.mul_(_wide(scale, x))
        if bias is not None:
            out = out.add_(_wide(bias, x))
        return out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, inv_std = ctx.saved_tensors
        axes = [axis for axis in range(x.dim()) if axis != 1]

        # The two sums over the group's rows that the gradient of the statistics needs (paper, section 3).
        grad = grad.to(mean.dtype)
        normed = (x.to(mean.dtype) - _wide(mean, x)).mul_(_wide(inv_std, x))
        sum_grad, sum_grad_normed = grad.sum(axes), (grad * normed).sum(axes)

        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([sum_grad, sum_grad_normed]).double()
            dist.all_reduce(sums, group=ctx.group)
            mean_grad, mean_grad_normed = (sums / ctx.count).to(mean.dtype)
            scale = inv_std if weight is None else inv_std * weight
            grad_x = grad - normed.mul_(_wide(mean_grad_normed, x)) - _wide(mean_grad, x)
            grad_x = grad_x.mul_(_wide(scale, x)).to(x.dtype)

        # Of this rank's rows; utils/reduce.py adds those of the ranks. Autograd casts them to the parameters' dtype.
        grad_weight = sum_grad_normed if ctx.needs_input_grad[1] else None
        grad_bias = sum_grad if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


class _GpuGroupNorm(torch.autograd.Function):
    """Batch norm over the rows of all ranks of a process group, with torch's CUDA kernels.

    `torch.nn.SyncBatchNorm` allows for ranks without rows: it selects the others with a boolean mask, for which the
    host waits three times in each layer. Here all ranks have the same number of rows (`ShardPlan`), so nothing is
    selected and the host never waits.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, batch_mean, batch_var, eps, group, size):  # noqa: ANN001, ANN205
        x = _dense(x)
        channels = x.shape[1]
        rows = x.numel() // channels
        if rows * size < 2:
            raise ValueError("batch norm in training needs more than 1 value per channel in a BN group")

        statistics = torch.cat(torch.batch_norm_stats(x, eps))  # (2 C,) mean and inverse standard deviation
        means, inv_stds = _from_all_ranks(statistics, group, size).split(channels, 1)  # (size, C) each

        counts = torch.full((size,), float(rows), dtype=statistics.dtype, device=x.device)
        # With momentum 1 the "running" statistics become exactly this batch's mean and unbiased variance.
        mean, inv_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inv_stds, batch_mean, batch_var, 1.0, eps, counts
        )

        ctx.save_for_backward(x, weight, mean, inv_std)
        ctx.group, ctx.rows, ctx.size = group, rows, size
        return torch.batch_norm_elemt(x, weight, bias, mean, inv_std, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, inv_std = ctx.saved_tensors
        grad = _dense(grad)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]

        sum_grad, sum_grad_centred, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, inv_std, weight, needs_x, needs_weight, needs_bias
        )

        grad_x = None
        if needs_x:
            sums = torch.cat([sum_grad, sum_grad_centred])
            dist.all_reduce(sums, group=ctx.group)
            sum_grad, sum_grad_centred = sums.split(len(mean))
            counts = torch.full((ctx.size,), ctx.rows, dtype=torch.int32, device=x.device)
            grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inv_std, weight, sum_grad, sum_grad_centred, counts)

        # Of this rank's rows; the gradients are averaged over the ranks later.
        return grad_x, grad_weight if needs_weight else None, grad_bias if needs_bias else None, *[None] * 5


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor in a layout that the kernels accept: channels last, or the default."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in layouts and x.is_contiguous(memory_format=layouts[x.dim()]):
        return x
    return x.contiguous()


def _from_all_ranks(vector: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
    """Gather the vectors of all ranks of a group: (n,) -> (size, n)."""
    everyone = vector.new_empty(size, len(vector))
    if dist.get_backend(group) == "gloo":
        dist.all_gather(list(everyone.unbind()), vector, group=group)
    else:
        # The function's name before torch 2.13, where the old one warns.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(everyone, vector, group=group)
    return everyone


def _wide(per_channel: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape (C,) to (1, C, 1, ...) with as many axes as x."""
    return per_channel.view(1, -1, *[1] * (x.dim() - 2))


def convert(model: nn.Module, shards: ShardPlan, *, sync_stats: bool) -> nn.Module:
    """Replace every BatchNorm1d/2d/3d (and SyncBatchNorm) with a GroupBatchNorm over `shards.group_size` shards.

    The model is changed in place; if the model is itself one batch norm, the returned module is new. Parameters and
    buffers stay the same tensors under the same names. Every rank must call this, because it creates process groups.

    Args:
        model: on any device.
        shards: defines the BN groups and the ranks that share one.
        sync_stats: `bn_sync_stats`: True: one set of running statistics, from all groups; False: one per group.

    Raises:
        UserError: a layer with momentum None (cumulative averages).
    """
    ranks = _group_ranks(shards)
    replacements: dict[nn.Module, GroupBatchNorm] = {}  # a layer that occurs in two places stays one layer
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() omits the second place
            if isinstance(child, _BatchNorm):
                if child not in replacements:
                    replacements[child] = _as_group_norm(child, ranks, sync_stats)
                parent._modules[name] = replacements[child]
    return _as_group_norm(model, ranks, sync_stats) if isinstance(model, _BatchNorm) else model


def _as_group_norm(layer: _BatchNorm, ranks: _Ranks | None, sync_stats: bool) -> GroupBatchNorm:
    if layer.momentum is None:
        raise UserError("batch norm with momentum None (cumulative averages) is not supported: give it one, e.g. 0.1")

    # On "meta": the new layer allocates nothing, as it takes over all tensors of the old one.
    new = GroupBatchNorm(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, device="meta"
    )

    new.weight, new.bias = layer.weight, layer.bias
    new.running_mean, new.running_var = layer.running_mean, layer.running_var
    new.num_batches_tracked = layer.num_batches_tracked
    new.ranks, new.sync_stats = ranks, sync_stats
    return new.train(layer.training)


def _group_ranks(shards: ShardPlan) -> _Ranks | None:
    """Return the ranks that share BN groups with this one, in each of its micro-batches. Collective."""
    span = min(shards.group_size, shards.world)  # a group with more shards than there are ranks is on all ranks
    if span == 1:
        return None

    assert dist.group.WORLD is not None, "join() the other ranks first"
    on_gpus = dist.get_backend() == "nccl"
    if span == shards.world and not on_gpus:
        return _Ranks(dist.group.WORLD, span)

    options = None
    if on_gpus:
        # A separate communicator even if it spans all ranks: in WORLD's queue the few bytes of a layer would wait
        # behind 25 MB of gradients, and the backward pass with them.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)

    mine = None
    for first in range(0, shards.world, span):  # every rank creates every group, in the same order
        ranks = list(range(first, first + span))
        group = dist.new_group(ranks, timeout=collective_timeout(), pg_options=options)
        if first <= shards.rank < first + span:
            mine = group
    assert isinstance(mine, dist.ProcessGroup)
    return _Ranks(mine, span)


class BnStats:
    """The running statistics of all GroupBatchNorm layers as one flat vector (means of all layers, then variances).

    The layers' running buffers become views of it, so a load_state_dict changes it. Moving the model to another device
    or dtype afterwards breaks the link (RuntimeError at the next step). All ranks must call its methods at the same
    points.

    With `bn_sync_stats` a step moves the running statistics towards the mean of the batch statistics of all groups,
    the same on all ranks. Without it each group of the global batch has separate running statistics, and the model's
    buffers hold those of group 0 as of the last `for_evaluation`. Layers in eval mode during the step (partial BN) do
    not move.
    """

    def __init__(self, model: nn.Module, shards: ShardPlan, world: World) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, GroupBatchNorm) and m.track_running_stats]
        self.shards, self.world = shards, world
        self.sync_stats = all(layer.sync_stats for layer in self.layers)
        self.total = 2 * sum(layer.num_features for layer in self.layers)

        first = next(iter(self.layers), None)
        like = torch.zeros(0) if first is None or first.running_mean is None else first.running_mean
        # One vector: a single all-reduce and a single lerp per step, not two per layer.
        self.running = like.new_zeros(self.total)
        self._batch = like.new_zeros(self.total)
        self._tracked = torch.zeros(len(self.layers), dtype=torch.int64, device=like.device)
        self._attach()

        self._factors: dict[tuple[bool, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._groups = [shards.group_of(mine[0]) for mine in shards.micro_batches]
        sets = 1 if self.sync_stats else len(self._groups)
        self._sums = like.new_zeros(sets, self.total)  # batch statistics of this step
        # The running statistics of this rank's groups.
        self._group_running = None if self.sync_stats else self.running.repeat(sets, 1)

    def _slices(self) -> Iterator[tuple[GroupBatchNorm, slice, slice]]:
        start, half = 0, self.total // 2
        for layer in self.layers:
            stop = start + layer.num_features
            yield layer, slice(start, stop), slice(half + start, half + stop)
            start = stop

    def _attach(self) -> None:
        for index, (layer, mean, var) in enumerate(self._slices()):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            if layer.running_mean.dtype != self.running.dtype or layer.running_mean.device != self.running.device:
                raise RuntimeError("batch-norm layers of several dtypes or devices: move the model before BnStats")

            self.running[mean].copy_(layer.running_mean)
            self.running[var].copy_(layer.running_var)

            layer.running_mean, layer.running_var = self.running[mean], self.running[var]
            layer.batch_mean, layer.batch_var = self._batch[mean], self._batch[var]

            if layer.num_batches_tracked is not None:
                self._tracked[index] = layer.num_batches_tracked
            layer.num_batches_tracked = self._tracked[index]

    def after_micro_batch(self, index: int) -> None:
        """Add the batch statistics that the forward pass of this rank's micro-batch `index` left."""
        self._sums[0 if self.sync_stats else index] += self._batch
        self._batch.zero_()

    def after_step(self) -> None:
        """Advance the running statistics by the micro-batches since the last call. Collective if `bn_sync_stats`."""
        if not self.layers:
            return
        self._check_views()

        ran = tuple(layer.ran for layer in self.layers)
        if ran not in self._factors:  # built once per set of active layers: it copies from the host
            self._factors[ran] = self._step_factors(ran)

        momentum, counted = self._factors[ran]
        if self._group_running is None:
            # Each rank of a group holds the group's statistics, so every group has equal weight in the sum.
            batch = self.world.sum_(self._sums).div_(self.world.size * len(self._groups))
            self.running.lerp_(batch[0], momentum)
        else:
            self._group_running.lerp_(self._sums, momentum.expand_as(self._group_running))

        self._tracked += counted
        self._sums.zero_()
        for layer in self.layers:
            layer.ran = False

    def _step_factors(self, ran: tuple[bool, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each element's momentum, 0 if the layer was in eval mode, and the steps to count (layers,)."""
        momentum = torch.zeros_like(self.running)
        for (layer, mean, var), active in zip(self._slices(), ran, strict=True):
            momentum[mean] = momentum[var] = float(layer.momentum or 0.0) if active else 0.0
        return momentum, torch.tensor(ran, dtype=torch.int64, device=self.running.device)

    def _check_views(self) -> None:
        last = self.layers[-1].running_mean  # .to() and .double() move all layers or none
        if last is None or last.untyped_storage().data_ptr() != self.running.untyped_storage().data_ptr():
            raise RuntimeError("the model was moved to another device or dtype after BnStats was built: build it later")

    def for_evaluation(self) -> None:
        """Put group 0's statistics into the model's buffers on all ranks, to evaluate or save. Collective."""
        if self._group_running is not None:
            self.running.copy_(self._gather(1)[0])

    def group_state(self) -> torch.Tensor | None:
        """Return all groups' running statistics (num_groups, total), or None with `bn_sync_stats`. Collective."""
        return None if self._group_running is None else self._gather(self.shards.num_groups)

    def _gather(self, groups: int) -> torch.Tensor:
        """Return the first `groups` rows on every rank. The rank that runs a group's first shard writes its row."""
        assert self._group_running is not None

        rows = self.running.new_zeros(groups, self.total)
        for row, mine, group in zip(self._group_running, self.shards.micro_batches, self._groups, strict=True):
            # The other ranks of a group hold the same values: the sum over the ranks must count them once.
            if group < groups and mine[0] == group * self.shards.group_size:
                rows[group] = row

        return self.world.sum_(rows)

    def load_group_state(self, state: torch.Tensor | None) -> None:
        """Restore a checkpoint's `group_state()`, written by any number of ranks; None: start from the buffers.

        Call this after the model's load_state_dict.

        Raises:
            UserError: the state is from a different model, number of groups or `bn_sync_stats`.
        """
        if self._group_running is None:
            if state is not None:
                raise UserError(
                    "the checkpoint was written with bn_sync_stats off and this run has it on: use the same setting"
                )
            return

        if state is None:
            self._group_running.copy_(self.running.expand_as(self._group_running))
            return

        expected = (self.shards.num_groups, self.total)
        if tuple(state.shape) != expected:
            raise UserError(
                f"the checkpoint's batch-norm statistics are {tuple(state.shape)} (groups, values) and this run needs "
                f"{expected}: model, bn_group_size or the shards of the global batch differ"
            )
        self._group_running.copy_(state.to(self._group_running.device)[self._groups])
