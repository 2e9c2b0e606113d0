"""Turn a config into a network on its device: arguments, precision, memory layout, compilation."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import sysconfig
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from utils import optim

if TYPE_CHECKING:
    from utils.config import Config


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of weights and clips; bf16 and fp16 train float32 weights under autocast."""
    return torch.float64 if precision == "fp64" else torch.float32


def optimizer_of(cfg: Config, *models: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return the optimiser of a config, over models that are on their device."""
    names = ("momentum", "weight_decay", "nesterov", "no_wd", "policy")
    settings = {name: getattr(cfg, name) for name in names} | cfg.optimizer.model_dump()
    return optim.build(*models, lr=lr, **settings)


def place(net: torch.nn.Module, device: torch.device, precision: str) -> torch.nn.Module:
    """Move a model to its device and dtype, with weights in channels_last(_3d), the layout of the clips."""
    net = net.to(device, dtype_of(precision))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in net.parameters():
        if parameter.dim() in formats:
            # Clone: `contiguous` leaves a 1 x 1 kernel alone, with strides that differ from those of its gradient
            parameter.data = parameter.data.clone(memory_format=formats[parameter.dim()])
    return net


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the mixed-precision region of `precision`; for fp32 and fp64 it does nothing."""
    if precision in ("fp32", "fp64"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def model_arguments(cfg: Config, *, pretrained: bool | str) -> dict[str, Any]:
    """Return the keyword arguments of `methods.build` for a config; `bn_*` options belong to utils/sync_bn.py."""
    model = cfg.model
    return {
        "type": model.type,
        "backbone": model.backbone,
        "num_class": model.num_class,
        "num_segments": model.num_segments * cfg.data.clip_len,  # T, the frames that enter the network
        "dropout": model.dropout,
        "pretrained": pretrained,
        **{key: value for key, value in model.kwargs.items() if not key.startswith("bn_")},
    }


def compiled(
    net: torch.nn.Module, setting: bool | str, device: torch.device, say: Callable[[str], object]
) -> torch.nn.Module:
    """Return the model compiled by `torch.compile`. If that is impossible, `say` why and return the model itself.

    Args:
        net: on its device.
        setting: false, true, or the name of a mode of torch.compile.
        device: a CPU needs a C++ compiler; a GPU needs triton, a C compiler and Python's headers.
        say: receives the reason.
    """
    if not setting:
        return net

    # torch.compile is lazy: without this check the first forward pass would fail
    missing = _missing_on_cpu() if device.type == "cpu" else _missing_for_triton()
    if missing:
        say(f"compile: the model is not compiled, {missing}")
        return net
    return torch.compile(net, mode=setting if isinstance(setting, str) else None)  # pyright: ignore[reportReturnType]


def _missing_on_cpu() -> str | None:
    """Return what torch.compile needs on a CPU but cannot find."""
    compiler = os.environ.get("CXX", "g++")
    program = (shlex.split(compiler) or ["g++"])[0]  # $CXX may name options too, as in `ccache g++`
    return None if shutil.which(program) else f"there is no C++ compiler ({compiler}; set $CXX)"


def _missing_for_triton() -> str | None:
    """Return what torch.compile needs on a GPU but cannot find. Triton builds a launcher in C for each kernel."""
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"

    # Triton tries $CC, else these compilers in turn
    named = os.environ.get("CC")
    programs = [(shlex.split(named) or ["cc"])[0]] if named else ["gcc", "clang", "cc"]
    if not any(shutil.which(program) for program in programs):
        return f"there is no C compiler ({named or 'gcc, clang'}; set $CC)"

    headers = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(headers, "Python.h")):
        return f"Python's headers are not in {headers} (Debian: the package python3-dev)"
    return None
