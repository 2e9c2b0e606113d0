"""Build SGD and AdamW with the parameter groups of video recipes, and run the step itself (unscale, clip, step).

Every group carries `lr_mult`; `set_lr` sets lr * lr_mult, so the multipliers apply in every iteration.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import SGD, AdamW, Optimizer

from utils.errors import UserError

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
ALL = {"all": (1.0, 1.0)}
ADAMW = {"weight": (1.0, 1.0), "bias and norm": (1.0, 0.0)}  # VideoMAE, BEiT
_NOT_DECAYED = ("bias", "pos_embed", "cls_token")  # by AdamW, for any shape
_OF_STATE = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # tensors that an optimiser keeps for a parameter


class _SGD(SGD):
    """SGD without decorators that import torch._dynamo, which takes a quarter of the CPU time of a small run's start.

    The decorators keep `torch.compile` out of the optimiser, but here only models are compiled. The arithmetic is
    torch's.
    """

    add_param_group = inspect.unwrap(SGD.add_param_group)
    load_state_dict = inspect.unwrap(SGD.load_state_dict)
    state_dict = inspect.unwrap(SGD.state_dict)
    step = torch.no_grad()(inspect.unwrap(SGD.step))  # pyright: ignore[reportAssignmentType]
    zero_grad = inspect.unwrap(SGD.zero_grad)


class _AdamW(AdamW):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2) without the decorators, like `_SGD`."""

    add_param_group = inspect.unwrap(AdamW.add_param_group)
    load_state_dict = inspect.unwrap(AdamW.load_state_dict)
    state_dict = inspect.unwrap(AdamW.state_dict)
    zero_grad = inspect.unwrap(AdamW.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step all parameters with one kernel. It walks raw memory, so gradients get the strides of their parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and gradient.stride() != parameter.stride():
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)

        inspect.unwrap(AdamW.step)(self, closure)


def build(
    *models: nn.Module,
    lr: float,
    type: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    no_wd: bool | str = False,
    policy: bool = False,
    fc_lr5: bool | None = None,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    layer_decay: float | None = None,
) -> Optimizer:
    """Return an optimiser over the parameters of one or more models that require a gradient.

    Args:
        models: the models, on their final device, not wrapped by DDP.
        lr: learning rate before multipliers.
        type: "sgd" or "adamw".
        weight_decay: as in torch.optim; AdamW's never applies to 1-D parameters, biases, positions and class tokens.
        momentum, nesterov: SGD, as in torch.optim.
        no_wd: SGD: no weight decay for the biases of convolutions and linear layers and for BN's weight and bias;
            "bn": for BN's only.
        policy: SGD: the groups of `POLICY`; no effect together with no_wd.
        fc_lr5: with policy, put the classifier into separate groups. None takes the model's attribute `fc_lr5`, which
            is true for TSM and false for TSN. Otherwise the classifier belongs to "weight" and "bias".
        betas, eps: AdamW, as in torch.optim.
        layer_decay: factor of the rate from each layer of a transformer to the one below it; see `layer_ids`.

    Returns:
        The optimiser; its groups have `name`, `lr_mult` and `decay_mult`. For a model with `own_rates`
        (methods/probe.py) each head has groups with a separate rate and decay.

    Raises:
        ValueError: nothing to train.
        UserError: layer_decay for a network without blocks.
    """
    table = ADAMW if type == "adamw" else NO_WD_BN if no_wd == "bn" else NO_WD if no_wd else POLICY if policy else ALL

    # Sort the parameters by (group, layer, layers above it, head of a probe or -1). Of each head: (number, factor,
    # decay).
    members: dict[tuple[str, int, int, int], list[nn.Parameter]] = {}
    heads: dict[int, tuple[int, float, float | None]] = {}
    for model in models:
        layers = layer_ids(model) if layer_decay else {}
        top = max(layers.values(), default=0)
        own_rates = getattr(model, "own_rates", dict)()
        for parameter, kind in _kinds(model, table, fc_lr5):
            if parameter.requires_grad:
                layer = layers.get(parameter, top)
                head = own_rates.get(parameter, (-1, 1.0, None))
                heads[head[0]] = head
                members.setdefault((kind, layer, top - layer, head[0]), []).append(parameter)

    # One group each, in the order of the table, so that checkpoints and logs do not depend on the order of modules.
    groups = []
    for kind, layer, above, head in sorted(members, key=lambda member: (list(table).index(member[0]), *member[1:])):
        lr_mult, decay_mult = table[kind]

        _, factor, own_decay = heads[head]
        lr_mult *= factor * (layer_decay or 1.0) ** above
        name = f"{kind}, layer {layer}" if layer_decay else kind
        groups.append(
            {
                "params": members[kind, layer, above, head],
                "name": name if head < 0 else f"{name}, head {head}",
                "head": head,
                "lr": lr * lr_mult,
                "weight_decay": (weight_decay if own_decay is None else own_decay) * decay_mult,
                "lr_mult": lr_mult,
                "decay_mult": decay_mult,
            }
        )
    # A model whose weights are all frozen is a mistake of the caller.
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")

    # Fused kernels step all parameters at once. SGD's is correct on CUDA only, see `_all_on_cuda`.
    if type == "adamw":
        optimizer: Optimizer = _AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
    else:
        fused = _all_on_cuda(group["params"] for group in groups)
        optimizer = _SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused or None)

    # A checkpoint brings the state of the machine that wrote it; the hooks fit it to this one.
    optimizer.register_load_state_dict_post_hook(_match_device)
    optimizer.register_load_state_dict_post_hook(_match_memory_format)
    return optimizer


def layer_ids(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return the layer of each parameter of a transformer with L blocks, numbered as in VideoMAE and BEiT.

    Patches, positions and tokens are layer 0, block i is layer i + 1, the rest (last norm, pooler, classifier) L + 1.
    The modules `backbone.patch_embed` and `backbone.blocks` decide, not the names of parameters.

    Raises:
        UserError: the network has no blocks.
    """
    backbone = getattr(model, "backbone", None)
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(backbone, nn.Module) or not isinstance(blocks, nn.ModuleList):
        raise UserError(
            "common.optimizer.layer_decay: this network is not a transformer with blocks, so it has no layers to decay "
            "over; remove the key"
        )

    # Start with the top layer for everything, then overwrite from the outside in.
    ids = dict.fromkeys(model.parameters(), len(blocks) + 1)
    ids |= dict.fromkeys(backbone.parameters(recurse=False), 0)
    ids |= dict.fromkeys(backbone.get_submodule("patch_embed").parameters(), 0)
    for number, block in enumerate(blocks, start=1):
        ids |= dict.fromkeys(block.parameters(), number)

    return ids


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set every group's rate to `lr` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def clip(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most max_norm; each head of a probe separately.

    Returns:
        The norm before scaling, on the device; for several heads the largest.
    """
    # Heads train independently: the gradient of one must not scale that of another.
    parts: dict[int, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        parts.setdefault(group.get("head", -1), []).extend(group["params"])
    return torch.stack([nn.utils.clip_grad_norm_(parameters, max_norm) for parameters in parts.values()]).max()


def apply(
    optimizer: Optimizer, scaler: torch.amp.GradScaler, *, max_norm: float | None = None, measure: bool = False
) -> Tensor | None:
    """Take one optimiser step: clip if requested, undo the fp16 loss scale, step.

    Args:
        scaler: disabled unless the precision is fp16. An enabled one skips a step whose gradients overflowed.
        max_norm: limit of the norm of all gradients together; None for no limit.
        measure: return the norm even without a limit.

    Returns:
        The 2-norm of all gradients together, before clipping, on the device; None if it was not requested.
    """
    norm = None
    if max_norm is not None or measure:
        scaler.unscale_(optimizer)  # limit and norm refer to the true gradients
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
    """Yield every parameter of a model with its group in the table."""
    if table is POLICY:
        yield from _policy_kinds(model, bool(getattr(model, "fc_lr5", False)) if fc_lr5 is None else fc_lr5)
        return

    for module, name, parameter in _own_parameters(model):
        is_bn = isinstance(module, _BatchNorm)
        if table is ADAMW:
            yield parameter, "bias and norm" if parameter.dim() == 1 or name in _NOT_DECAYED else "weight"
        elif table is NO_WD_BN:
            yield parameter, "bn" if is_bn else "weight and bias"
        elif table is NO_WD:
            exempt = is_bn or (isinstance(module, _ConvNd | nn.Linear) and name == "bias")
            yield parameter, "bias and bn" if exempt else "weight"
        else:
            yield parameter, "all"


def _policy_kinds(model: nn.Module, own_fc: bool) -> Iterator[tuple[nn.Parameter, str]]:
    # The first convolution in the order of modules is the one that sees the pixels.
    first = next((module for module in model.modules() if isinstance(module, _ConvNd)), None)
    classifier = getattr(model, "classifier", None) if own_fc else None

    for module, name, parameter in _own_parameters(model):
        if isinstance(module, _BatchNorm):
            yield parameter, "bn"
            continue

        layer = "first conv " if module is first else "classifier " if module is classifier else ""
        yield parameter, layer + ("bias" if name == "bias" else "weight")


def _own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield (module, name in it, parameter) of every parameter, each once, in the order of `model.parameters()`."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:  # a shared parameter belongs to the module that comes first
                seen.add(parameter)
                yield module, name, parameter


def _all_on_cuda(groups: Iterable[Iterable[nn.Parameter]]) -> bool:
    """Return True if SGD's fused kernel is used: on CUDA.

    On the CPU it is twice as fast (15 against 35 ms for 26 M parameters, under 1 % of a step), but it walks raw memory.
    It silently gives wrong weights if a gradient or a momentum has a different memory format than its parameter
    (torch 2.13), as for convolutions. AdamW aligns the gradients itself, because its loop would cost 6 % of a step of a
    ViT-S.
    """
    return all(parameter.is_cuda for parameters in groups for parameter in parameters)


def _match_device(optimizer: Optimizer) -> None:
    """Fit the state of a run on a different kind of device to this one: its kernel and AdamW's step counters."""
    fused = isinstance(optimizer, _AdamW) or _all_on_cuda(group["params"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = fused or None

    for parameter, state in optimizer.state.items():
        # Fused kernels read the step counter on the device, torch's loop reads it on the CPU.
        if isinstance(step := state.get("step"), Tensor):
            state["step"] = step.to(parameter.device if fused else "cpu")


def _match_memory_format(optimizer: Optimizer) -> None:
    """Give averages from a checkpoint the strides of their parameter; fused kernels need them equal."""
    for parameter, state in optimizer.state.items():
        for name in _OF_STATE:
            buffer = state.get(name)
            # A different shape is kept: a copy would broadcast it and hide that the checkpoint has a different model.
            if buffer is not None and buffer.shape == parameter.shape and buffer.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(buffer)
