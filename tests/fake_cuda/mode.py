"""Run the GPU path of PyTorch code on a machine without a GPU, and write down each time the host would wait.

`load_guard` first, before torch is imported; then `FakeGpu` is a dispatch mode. Tensors on the device `cuda` are fake
(shape, dtype, strides, device; no values), all others are real, so that decisions made on the host are real decisions.
What it cannot show: values, races between streams, what a kernel does. Reading a value gives 0.

The host waits for: reading a number, a copy to the host or from memory that is not pinned, operators whose result has
as many elements as a mask has ones, and synchronising a stream, an event or the device.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def load_guard(library: str) -> None:
    """Install the guard that `build.py` has compiled. Only before torch is imported, and only beside a CPU build."""
    assert "torch" not in sys.modules, "hooks are looked up while torch is imported"
    loaded = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    if loaded.install_fake_cuda() != 1:
        raise RuntimeError("this build of PyTorch has CUDA itself")


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in the arguments of an operator; torch's own walk over them costs a fifth of a case."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something that the host did: `what`, the line of the project that asked for it, and bytes if it was a copy."""

    what: str
    where: str
    size: int = 0
    waits: bool = False


def place_in_project() -> str:
    """`file:line` of the innermost frame that belongs to the project and not to these tests."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if ROOT in path.parents and "site-packages" not in path.parts and "fake_cuda" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "a test"


def make() -> Any:
    """Patch `torch.cuda` and return the one `FakeGpu` of this process."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    moving = {aten._to_copy.default, aten.copy_.default}
    # Their results are as large as the values say, so the host has to read them.
    counting = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.is_nonzero, aten.equal}
    group_norm = {
        aten.batch_norm_stats: 2,
        aten.batch_norm_gather_stats_with_counts: 2,
        aten.batch_norm_backward_reduce: 4,
        aten.batch_norm_elemt: 0,
        aten.batch_norm_backward_elemt: 0,
    }
    scaling = {aten._amp_foreach_non_finite_check_and_unscale_, aten._amp_update_scale_}
    no_kernel = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.detach}
    no_kernel |= {aten.lift_fresh, aten._unsafe_view, aten.alias, aten._reshape_alias, torch.ops.prim.device}
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}

    class FakeGpu(TorchDispatchMode):
        """The mode; `log` and `kernels` are what happened since the last `forget`."""

        def __init__(self) -> None:
            super().__init__()
            self.fake = FakeTensorMode(allow_non_fake_inputs=True)
            self.pinned: dict[int, tuple[int, Any]] = {}  # address -> (bytes, owner)
            self.forget()

        def forget(self) -> None:
            self.log: list[Entry] = []
            self.kernels: Counter[str] = Counter()
            self.layouts: list[str] = []  # convolutions whose tensors are not channels-last
            self.strides: list[str] = []  # gradients or momenta that do not lie like their weights
            self.collectives: list[str] = []

        @property
        def waits(self) -> list[Entry]:
            return [entry for entry in self.log if entry.waits]

        def note(self, what: str, size: int = 0, *, waits: bool = True) -> None:
            self.log.append(Entry(what, place_in_project(), size, waits))

        def pin(self, address: int, size: int, owner: Any = None) -> None:
            self.pinned[address] = size, owner

        def is_pinned(self, tensor: torch.Tensor) -> bool:
            address = tensor.data_ptr()
            return any(start <= address < start + size for start, (size, _) in self.pinned.items())

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            leaves = list(_leaves((args, kwargs)))
            if kwargs.get("pin_memory") and not any(map(_is_gpu, leaves)):
                host = func(*args, **{**kwargs, "pin_memory": False})
                self.pin(host.data_ptr(), host.nbytes, host)
                return host
            if not any(map(_is_gpu, leaves)):
                return func(*args, **kwargs)
            if torch.is_inference_mode_enabled() and func.namespace == "aten":
                with self:  # operators that consist of others come whole in this mode
                    parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
            if func is aten._local_scalar_dense.default:
                self.note("a number is read")
                return 0.0 if args[0].is_floating_point() else 0
            if func in moving:
                return self._move(func, args, kwargs)
            return self._compute(func, args, kwargs)

        def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
            """A copy within the GPU, to it or from it."""
            non_blocking = kwargs.get("non_blocking", False) or (func is aten.copy_.default and (*args, False)[2])
            source = args[1] if func is aten.copy_.default else args[0]
            if func is aten._to_copy.default:
                target = torch.device(kwargs.get("device") or source.device)
            else:
                target = args[0].device
            if isinstance(source, FakeTensor) and target.type == "cpu":
                host = args[0] if func is aten.copy_.default else self._zeros_like(source, kwargs)
                waits = not (non_blocking and self.is_pinned(host))
                self.note("copy to the host", source.numel() * source.element_size(), waits=waits)
                return host.zero_()
            if not isinstance(source, FakeTensor) and target.type == "cuda":
                waits = not (non_blocking and self.is_pinned(source))
                self.note("copy to the GPU", source.nbytes, waits=waits)
                args = self._all_fake(args)
            return self._run(func, args, kwargs)

        def _zeros_like(self, source: Any, kwargs: Any) -> torch.Tensor:
            return torch.zeros(tuple(source.shape), dtype=kwargs.get("dtype") or source.dtype)

        def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
            packet = func.overloadpacket
            if packet in counting:
                self.note(f"{packet.__name__} reads how many")
                return True if packet in (aten.equal, aten.is_nonzero) else torch.zeros(0)
            indexes = packet in (aten.index, aten.index_put_, aten.index_put)
            if indexes and self._has_mask(args[1]) and packet is aten.index:
                # As many elements as the mask has ones: none.
                return self._run(aten.new_empty.default, (args[0], [0]), {})
            self._check_devices(func, args, kwargs)
            args, kwargs = self._all_fake((args, kwargs))
            if packet in group_norm:
                return self._group_norm(func, args)
            if packet is aten._fused_sgd_:
                self._check_strides(*args[:3])
                self.kernels[packet.__name__] += 1
                return None
            if packet in scaling:
                self.kernels[packet.__name__] += 1
                return args[0] if packet is aten._amp_update_scale_ else None
            if packet in (aten.convolution, aten.convolution_backward):
                self._check_layout(packet.__name__, args)
            return self._run(func, args, kwargs)

        def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
            name = func.overloadpacket.__name__
            if func.namespace == "c10d":
                self.collectives.append(name)
            elif not func.is_view and func.overloadpacket not in no_kernel:
                self.kernels[name] += 1
            with self.fake:
                return func(*args, **kwargs)

        def _has_mask(self, indices: Any) -> bool:
            has_mask = False
            for index in indices:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.note("a mask is counted")
                    has_mask = True
                elif index is not None and not _is_gpu(index):
                    self.note("copy to the GPU", index.nbytes)
            return has_mask

        def _check_devices(self, func: Any, args: Any, kwargs: Any) -> None:
            """A kernel takes tensors of the GPU and single numbers of the host."""
            if func.overloadpacket in (aten.index, aten.index_put_, aten.index_put) or func.namespace != "aten":
                return
            for tensor in _leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor) and tensor.dim():
                    raise RuntimeError(f"{func} mixes the devices cuda and cpu at {place_in_project()}")

        def _check_strides(self, weights: Any, gradients: Any, momenta: Any) -> None:
            """The fused kernel walks raw memory: all three must lie alike."""
            for weight, *others in zip(weights, gradients, *([momenta] if momenta else []), strict=True):
                for other in others:
                    axes = zip(weight.stride(), other.stride(), weight.shape, strict=False)
                    alike = [a == b for a, b, n in axes if n > 1]
                    if not all(alike) or weight.dtype != other.dtype or weight.shape != other.shape:
                        self.strides.append(f"{tuple(weight.shape)}: {weight.stride()} and {other.stride()}")

        def _check_layout(self, name: str, args: Any) -> None:
            """Activations stay channels-last; a tensor of a few channels may lie otherwise."""
            for tensor in args[: 2 if name == "convolution" else 3]:
                layout = layouts.get(tensor.dim())
                if layout and tensor.shape[1] > 4 and not tensor.is_contiguous(memory_format=layout):
                    self.layouts.append(f"{name} of {tuple(tensor.shape)}, strides {tensor.stride()}")

        def _group_norm(self, func: Any, args: Any) -> Any:
            """The operators of synchronised batch norm, which have no fake kernels."""
            self.kernels[func.overloadpacket.__name__] += 1
            x, count = args[0], group_norm[func.overloadpacket]
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            with self.fake:
                if not count:
                    return torch.empty_like(x)
                return tuple(torch.empty(x.shape[1], dtype=wide, device=x.device) for _ in range(count))

        def _all_fake(self, value: Any) -> Any:
            """The arguments of an operator with fake tensors only; they come in plain lists, tuples and tables."""
            if isinstance(value, torch.Tensor):
                return self._as_fake(value)
            if type(value) in (list, tuple):
                return type(value)(self._all_fake(item) for item in value)
            return {key: self._all_fake(item) for key, item in value.items()} if type(value) is dict else value

        def _as_fake(self, tensor: torch.Tensor) -> Any:
            if isinstance(tensor, FakeTensor):
                return tensor
            if tensor.dim():
                with self.fake:
                    return torch.empty_strided(
                        tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda", requires_grad=False
                    )
            return self.fake.from_tensor(tensor)

    def _is_gpu(leaf: Any) -> bool:
        if isinstance(leaf, torch.device):
            return leaf.type == "cuda"
        return isinstance(leaf, FakeTensor) and leaf.device.type == "cuda"

    gpu = FakeGpu()
    _patch(torch, gpu)
    return gpu


def _patch(torch: Any, gpu: Any) -> None:
    """Replace what talks to the driver. Streams and events do nothing; waiting for one is written down."""

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            pass

        def wait_event(self, event: Any) -> None:
            pass

        def synchronize(self) -> None:
            gpu.note("a stream is waited for")

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def record(self, stream: Any = None) -> None:
            pass

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: Any) -> float:
            return 1.0

        def synchronize(self) -> None:
            gpu.note("an event is waited for")

    class InStream:
        def __init__(self, stream: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    def register(address: int, size: int, flags: int) -> int:
        gpu.pin(address, size)
        return 0

    def pin_memory(tensor: Any, device: Any = None) -> Any:
        copy = tensor.clone()
        gpu.pin(copy.data_ptr(), copy.nbytes, copy)
        gpu.note("the main thread copies into pinned memory", tensor.nbytes, waits=False)
        return copy

    stream = Stream()
    cuda = torch.cuda
    cuda.Stream, cuda.Event, cuda.stream = Stream, Event, InStream
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.synchronize = lambda *_: gpu.note("the device is waited for")
    cuda.cudart = lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=gpu.pinned.pop)
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 1, lambda: 0
    cuda._lazy_init, cuda.is_initialized = lambda: None, lambda: False
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.get_device_capability = lambda *_: (9, 0)  # broadcast reads it
    cuda.reset_peak_memory_stats = cuda.empty_cache = lambda *_: None
    cuda.memory_allocated, cuda.max_memory_allocated = lambda *_: 10**9, lambda *_: 2 * 10**9
    cuda.memory_reserved, cuda.mem_get_info = lambda *_: 2 * 10**9, lambda *_: (8 * 10**10, 8 * 10**10)
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = pin_memory, lambda tensor, device=None: gpu.is_pinned(tensor)
    torch.Tensor.record_stream = lambda tensor, stream: None
    to_list = torch.Tensor.tolist

    def tolist(tensor: Any) -> Any:
        """One copy to the host, where a fake tensor would read number by number."""
        if tensor.device.type != "cuda":
            return to_list(tensor)
        gpu.note("copy to the host", tensor.numel() * tensor.element_size())
        return to_list(torch.zeros(tuple(tensor.shape), dtype=tensor.dtype))

    from torch._subclasses.fake_tensor import FakeTensor

    tensors: Any = (torch.Tensor, FakeTensor)
    for kind in tensors:
        kind.tolist = tolist
    import torch.cuda.amp.common as amp

    amp.amp_definitely_not_available = lambda: False
    # A list that becomes a tensor of the GPU is a tensor of the host first, whose copy then shows.
    torch._C._set_only_lift_cpu_tensors(True)
    torch._C._conv_determine_backend_memory_format = _memory_format_of_cudnn


def _memory_format_of_cudnn(x: Any, weight: Any, backend: Any) -> Any:
    """The layout of a convolution's result: channels-last if one of its inputs is; float64 never is."""
    import torch

    if x.dtype == torch.float64:
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if last and any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight)):
        return last
    return torch.contiguous_format
