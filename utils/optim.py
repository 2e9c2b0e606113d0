"""SGD with the parameter groups that video recipes ask for, and the step itself (unscale, clip, step).

Every group carries `lr_mult`; `set_lr` sets lr * lr_mult, so the multipliers act at every iteration.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import SGD, Optimizer

# Name of the group: (multiplier of the learning rate, multiplier of the weight decay), for RGB input.
# Wang et al.'s and Lin et al.'s published code (tsn-pytorch, temporal-shift-module: get_optim_policies).
POLICY = {
    "first conv weight": (1.0, 1.0),
    "first conv bias": (2.0, 0.0),
    "weight": (1.0, 1.0),
    "bias": (2.0, 0.0),
    "bn": (1.0, 0.0),
    "classifier weight": (5.0, 1.0),
    "classifier bias": (10.0, 0.0),
}
NO_WD = {"weight": (1.0, 1.0), "bias and bn": (1.0, 0.0)}
NO_WD_BN = {"weight and bias": (1.0, 1.0), "bn": (1.0, 0.0)}  # PySlowFast
PLAIN = {"all": (1.0, 1.0)}


class _SGD(SGD):
    """SGD without the decorators that import torch._dynamo, a quarter of the CPU time of starting a small run.

    They keep `torch.compile` out of the optimiser, and only models are compiled here. The arithmetic is torch's.
    """

    add_param_group = inspect.unwrap(SGD.add_param_group)
    load_state_dict = inspect.unwrap(SGD.load_state_dict)
    state_dict = inspect.unwrap(SGD.state_dict)
    step = torch.no_grad()(inspect.unwrap(SGD.step))  # pyright: ignore[reportAssignmentType]
    zero_grad = inspect.unwrap(SGD.zero_grad)


def build(
    *models: nn.Module,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    no_wd: bool | str = False,
    policy: bool = False,
    fc_lr5: bool | None = None,
) -> SGD:
    """SGD over the parameters of one or more models that require a gradient.

    Args:
        models: the models themselves, on their final device, not wrapped by DDP.
        lr: learning rate before multipliers.
        momentum, weight_decay, nesterov: as torch.optim.SGD.
        no_wd: no weight decay for the biases of convolutions and linear layers and for BN's weight and bias; "bn": for
            BN's only.
        policy: the groups of `POLICY`; has no effect beside no_wd.
        fc_lr5: with policy, give the classifier groups of its own; None asks the model's attribute `fc_lr5`, which is
            true for TSM and false for TSN. Without it the classifier belongs to "weight" and "bias".

    Returns:
        The optimiser; its groups have `name`, `lr_mult` and `decay_mult`.

    Raises:
        ValueError: nothing to train.
    """
    table = NO_WD_BN if no_wd == "bn" else NO_WD if no_wd else POLICY if policy else PLAIN
    members: dict[str, list[nn.Parameter]] = {name: [] for name in table}
    for parameter, kind in (pair for model in models for pair in _kinds(model, table, fc_lr5)):
        if parameter.requires_grad:
            members[kind].append(parameter)
    groups = [
        {
            "params": parameters,
            "name": name,
            "lr": lr * table[name][0],
            "weight_decay": weight_decay * table[name][1],
            "lr_mult": table[name][0],
            "decay_mult": table[name][1],
        }
        for name, parameters in members.items()
        if parameters
    ]
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    # Fused on CUDA: one kernel. Not on the CPU, though it is twice as fast there (15 against 35 ms for 26 M parameters,
    # under 1 % of a step): the CPU kernel walks raw memory and gives wrong weights, without an error, where a
    # gradient or a momentum has another memory format than its parameter (torch 2.13).
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    optimizer = _SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused or None)
    optimizer.register_load_state_dict_post_hook(_match_memory_format)
    return optimizer


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group `lr` times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def clip(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most max_norm; returns the norm before, on the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, max_norm)


def apply(
    optimizer: Optimizer, scaler: torch.amp.GradScaler, *, max_norm: float | None = None, measure: bool = False
) -> Tensor | None:
    """One optimiser step: clip if wanted, undo the fp16 loss scale, step.

    Args:
        scaler: disabled where the precision is not fp16. When enabled it skips a step whose gradients overflowed.
        max_norm: limit of the norm of all gradients together; None for no limit.
        measure: return the norm also without a limit.

    Returns:
        The 2-norm of all gradients together, before clipping, on the device; None if nothing asked for it.
    """
    norm = None
    if max_norm is not None or measure:
        scaler.unscale_(optimizer)  # the true gradients are meant
        norm = _norm(optimizer) if max_norm is None else clip(optimizer, max_norm)
    scaler.step(optimizer)
    scaler.update()
    return norm


def _norm(optimizer: Optimizer) -> Tensor:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _kinds(
    model: nn.Module, table: dict[str, tuple[float, float]], fc_lr5: bool | None
) -> Iterator[tuple[nn.Parameter, str]]:
    """Every parameter of a model with its group in the table."""
    if table is POLICY:
        yield from _policy_kinds(model, bool(getattr(model, "fc_lr5", False)) if fc_lr5 is None else fc_lr5)
        return
    for module, name, parameter in _own_parameters(model):
        is_bn = isinstance(module, _BatchNorm)
        if table is NO_WD_BN:
            yield parameter, "bn" if is_bn else "weight and bias"
        elif table is NO_WD:
            exempt = is_bn or (isinstance(module, _ConvNd | nn.Linear) and name == "bias")
            yield parameter, "bias and bn" if exempt else "weight"
        else:
            yield parameter, "all"


def _policy_kinds(model: nn.Module, own_fc: bool) -> Iterator[tuple[nn.Parameter, str]]:
    first = next((module for module in model.modules() if isinstance(module, _ConvNd)), None)
    classifier = getattr(model, "classifier", None) if own_fc else None
    for module, name, parameter in _own_parameters(model):
        if isinstance(module, _BatchNorm):
            yield parameter, "bn"
            continue
        layer = "first conv " if module is first else "classifier " if module is classifier else ""
        yield parameter, layer + ("bias" if name == "bias" else "weight")


def _own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name in it, parameter) for every parameter, each once, in the order of `model.parameters()`."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield module, name, parameter


def _match_memory_format(optimizer: Optimizer) -> None:
    """Momentum from a checkpoint gets the strides of its parameter; fused kernels need them equal."""
    for parameter, state in optimizer.state.items():
        buffer = state.get("momentum_buffer")
        # Another shape is left alone: a copy would broadcast it, and hide that the checkpoint is of another model.
        if buffer is not None and buffer.shape == parameter.shape and buffer.stride() != parameter.stride():
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
