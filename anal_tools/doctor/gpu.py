"""Check the GPUs: driver, arithmetic, memory, NCCL, and the codecs that NVDEC decodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from anal_tools.doctor.finding import NONE, Finding, Subject, ok, size, warning
from anal_tools.doctor.finding import error as bad

DRIVER = Path("/proc/driver/nvidia/version")
OTHER_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))  # in containers, of Windows, of AMD
BUSY = 0.2  # share of a GPU's memory that others may use


def gpu(subject: Subject, driver: Path = DRIVER) -> Iterator[Finding]:
    """Multiply two matrices on each GPU, and compare the result with the product on the CPU."""
    if not driver.is_file() and not any(place.exists() for place in OTHER_DRIVERS):
        yield ok(NONE)  # without torch, whose import takes seconds
        return
    import torch

    if not torch.cuda.is_available():
        if driver.is_file():
            build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
            text = f"NVIDIA driver {driver_version(driver)} found, but torch {torch.__version__} ({build}) sees no GPU"
            yield bad(text, "install a torch for the driver's CUDA; look at CUDA_VISIBLE_DEVICES and `nvidia-smi`")
        else:
            yield ok(NONE)
        return

    for index in range(torch.cuda.device_count()):
        device, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
        # float64, for which no GPU uses TF32 or another shortcut
        matrix = torch.arange(256 * 256, dtype=torch.float64).reshape(256, 256).sin()
        try:
            wrong = (matrix.to(device) @ matrix.to(device)).cpu().sub(matrix @ matrix).abs().max().item()
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError as error:
            yield bad(f"GPU {index} ({name}): {str(error).splitlines()[0]}", "look at `nvidia-smi` and `dmesg`")
            continue

        if wrong > 1e-9:
            yield bad(f"GPU {index} ({name}) multiplies wrongly (error {wrong:.3g})", "do not use it; have it repaired")
        elif free < (1 - BUSY) * total:
            text = f"GPU {index} ({name}): other processes use {size(total - free)} of {size(total)}"
            yield warning(text, "`nvidia-smi` lists them; choose another with CUDA_VISIBLE_DEVICES")
        else:
            yield ok(f"GPU {index}: {name}, {size(free)} of {size(total)} free, driver {driver_version(driver)}")


def driver_version(file: Path) -> str:
    """Return the version of the NVIDIA driver; "?" if it is not known."""
    try:
        match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", file.read_text("utf-8"))
    except OSError:
        return "?"
    return match[1] if match else "?"


def nccl(subject: Subject) -> Iterator[Finding]:
    """Sum a tensor over all GPUs of this machine with NCCL, and check the sum."""
    import torch

    if not torch.cuda.is_available():
        yield ok(NONE)
        return
    from torch.cuda import nccl as library

    count = torch.cuda.device_count()
    tensors = [torch.full((1024,), index + 1.0, device=torch.device("cuda", index)) for index in range(count)]
    try:
        library.all_reduce(tensors)
        sums = [tensor[0].item() for tensor in tensors]
    except RuntimeError as error:
        advice = "set NCCL_DEBUG=INFO and look at docs/cluster.md, NCCL settings"
        yield bad(f"NCCL on {count} GPUs: {str(error).splitlines()[0]}", advice)
        return

    # 1 + 2 + ... + count
    version = ".".join(map(str, library.version()))
    if sums != [count * (count + 1) / 2] * count:
        yield bad(f"NCCL {version} sums to {sums} over {count} GPUs", "set NCCL_P2P_DISABLE=1, and look at `dmesg`")
    else:
        yield ok(f"NCCL {version}, {count} GPU(s)")


def nvdec(subject: Subject) -> Iterator[Finding]:
    """List the codecs that the GPU decodes, as the driver reports them."""
    import torch

    if not torch.cuda.is_available():
        yield ok(NONE)
        return
    from datasets.dali import capability

    codecs = capability.limits(torch.device("cuda", 0))
    uses_dali = subject.cfg is not None and subject.cfg.data.reader == "dali"

    if codecs:
        yield ok(f"NVDEC: {', '.join(f'{codec} up to {largest} pixels' for codec, (_, largest) in codecs.items())}")
    elif uses_dali:
        text = "NVDEC does not answer, so the reader dali decodes on the CPU"
        yield warning(text, "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video")
    else:
        yield ok(NONE)
