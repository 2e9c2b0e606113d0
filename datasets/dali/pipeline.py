"""The only importer of nvidia.dali: one pipeline that decodes, crops and resizes clips, on a GPU or on the CPU.

DALI gets the bytes, the frames and the boxes that plans ask for, and draws nothing itself. Cropping and scaling are
those of datasets/readers/resize.py: the box is cut out first, so that nothing outside of it is seen, then scaled
linearly without antialiasing; on the same decoded frame the result is at most 1 of 255 away (cv2 rounds in fixed
point).
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from datasets.dali import bitstream
from datasets.readers.resize import Box
from utils import transfer
from utils.faults import UserError

#: Of DALI's own. On a GPU each feeds one NVDEC engine at a time and mostly waits for it: an H100 has seven. On the CPU
#: they decode.
THREADS = {"mixed": 8, "cpu": 1}
#: How DALI says that a run went wrong.
FAILURES = (RuntimeError, IndexError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Clip:
    """What one clip is decoded from.

    Attributes:
        form: "video" or "images"; see encoded.Encoded.
        files: (n,) uint8 each.
        rows: (T,) int32: ordinals in the video, or which file each frame is.
        box: x1, y1, x2, y2 in pixels of the stored frame.
        size: (h, w) of the result.
        codec: "jpeg", or the codec of the video.
        matrix: name of the colour matrix in `bitstream.MATRICES`; None for BT.601, which is what DALI takes all for.
        frame: (height, width) of a stored frame.
    """

    form: str
    files: list[np.ndarray]
    rows: np.ndarray
    box: Box
    size: tuple[int, int]
    codec: str = ""
    matrix: str | None = None
    frame: tuple[int, int] = (0, 0)


def require_dali() -> ModuleType:
    """The module nvidia.dali; UserError that names the extra if it is not installed."""
    try:
        return importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise UserError(
            "data.reader: dali needs NVIDIA DALI, which is not installed here: pip install '.[dali]' "
            f"('.[dali-cuda12]' beside a torch for CUDA 12), or set data.reader to video or frames ({error})"
        ) from error


def mode(device: torch.device) -> str:
    """DALI's name for where it decodes: "mixed" on a GPU, else "cpu"."""
    return "mixed" if device.type == "cuda" else "cpu"


def build(form: str, device: torch.device, *, batch: int, threads: int) -> Any:
    """The pipeline of one form: encoded bytes -> uint8 (T, h, w, C) per sample, or (h, w, C) per image.

    Args:
        form: "video" or "images".
        device: where frames are decoded and delivered.
        batch: most samples of a run.
        threads: of DALI's own on the CPU.

    Raises:
        UserError: DALI is not installed, or cannot start there.
    """
    dali = require_dali()
    fn, types = dali.fn, dali.types
    where, on_gpu = mode(device), device.type == "cuda"

    @dali.pipeline_def
    def definition() -> object:
        """The graph that DALI runs: stored bytes and boxes in, clips out."""
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)  # y, x
        shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)  # h, w
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)  # h, w
        if form == "video":
            rows = fn.external_source(name="rows", dtype=types.INT32, ndim=1)
            more = {"affine": False} if on_gpu else {}
            # A cut is decoded once: an index of it would cost more than it saves.
            frames = fn.decoders.video(data, frames=rows, device=where, pad_mode="none", build_index=False, **more)
        else:
            frames = fn.decoders.image(data, device=where, output_type=types.RGB, adjust_orientation=False)
        inside = fn.slice(frames, start=start, shape=shape, axis_names="HW")
        return fn.resize(inside, size=size, interp_type=types.INTERP_LINEAR, antialias=False)

    number = (device.index or 0) if on_gpu else None
    try:
        # A depth above 1 would make the first schedule_run start several runs, before their inputs are there.
        # Several runs may be scheduled all the same; they are done one after the other, beside this process's work.
        pipeline: Any = definition(
            batch_size=batch, num_threads=threads, device_id=number, prefetch_queue_depth=1, seed=0
        )
        pipeline.build()
    except FAILURES as error:
        raise UserError(f"data.reader: dali does not start on {device}: {_first_line(error)}") from error
    return pipeline


class Decoder:
    """Runs of one pipeline, oldest first. After a failure `restart` drops all that is under way.

    Args:
        form, device: see `build`.
        clips: most clips of a run.
        frames: most frames of a clip.
        stream: on which the caller copies decoded clips out; None on the CPU.
    """

    def __init__(
        self, form: str, device: torch.device, *, clips: int, frames: int, stream: torch.cuda.Stream | None = None
    ) -> None:
        self.form, self.device, self.stream = form, device, stream
        self._batch = clips if form == "video" else clips * frames
        self._threads = THREADS[mode(device)]
        self._runs: collections.deque[list[Clip]] = collections.deque()
        self._pipeline: Any = build(self.form, self.device, batch=self._batch, threads=self._threads)

    def restart(self) -> None:
        """Drop the pipeline, which is of no use after an error. The next `submit` builds another one."""
        self._runs.clear()
        self._pipeline = None

    def submit(self, clips: list[Clip]) -> None:
        """Start to decode clips. The files are copied, so they may change afterwards. Each frame is decoded once."""
        if self._pipeline is None:
            self._pipeline = build(self.form, self.device, batch=self._batch, threads=self._threads)
        fed: dict[str, list[np.ndarray]] = {"data": [], "start": [], "shape": [], "size": []}
        for clip in clips:
            x1, y1, x2, y2 = clip.box
            for file in clip.files if self.form == "video" else [clip.files[row] for row in np.unique(clip.rows)]:
                fed["data"].append(file)
                fed["start"].append(np.array([y1, x1], np.int32))
                fed["shape"].append(np.array([y2 - y1, x2 - x1], np.int32))
                fed["size"].append(np.array(clip.size, np.float32))
        if self.form == "video":
            fed["rows"] = [np.unique(clip.rows).astype(np.int32) for clip in clips]
        for name, arrays in fed.items():
            self._pipeline.feed_input(name, arrays)
        self._runs.append(list(clips))
        self._pipeline.schedule_run()

    def deliver(self, outs: list[torch.Tensor]) -> None:
        """Wait for the oldest run and write its clips, each (T, h, w, 3) uint8, into `outs` on the device.

        Raises:
            FAILURES: the run failed, or gave other frames than those that were asked for.
        """
        clips = self._runs.popleft()
        (samples,) = self._pipeline.share_outputs(cuda_stream=self.stream)
        with torch.cuda.stream(self.stream):  # type: ignore[arg-type]
            for clip, pixels, out in zip(clips, self._frames(samples, clips), outs, strict=True):
                distinct, row_of = np.unique(clip.rows, return_inverse=True)
                expected = (len(distinct), *clip.size, 3)
                if tuple(pixels.shape) != expected:
                    raise RuntimeError(f"DALI gave {tuple(pixels.shape)} instead of {expected}")
                if clip.matrix is not None:
                    pixels = recoloured(pixels, clip.matrix)
                if not np.array_equal(row_of.reshape(-1), np.arange(len(clip.rows))):
                    rows = torch.from_numpy(row_of.reshape(-1).astype(np.int64))
                    pixels = pixels.index_select(0, transfer.to_device(rows, self.device))
                out.copy_(pixels)
        if self.stream is not None:
            self.stream.synchronize()  # of the copies alone
        self._pipeline.release_outputs()

    def _frames(self, samples: Sequence[object], clips: list[Clip]) -> Iterator[torch.Tensor]:
        """The distinct frames of each clip."""
        if self.form == "video":
            yield from (torch.from_dlpack(sample) for sample in samples)
            return
        first = 0
        for clip in clips:
            last = first + len(np.unique(clip.rows))
            yield torch.stack([torch.from_dlpack(samples[number]) for number in range(first, last)])
            first = last

    def close(self) -> None:
        """End the pipeline and its threads. After an error leave it: its end would wait for the GPU."""
        self._runs.clear()
        if sys.exc_info()[0] is not None and self.device.type == "cuda":
            _left_to_the_end.append(self._pipeline)
        self._pipeline = None


_left_to_the_end: list[object] = []


def recoloured(pixels: torch.Tensor, matrix: str) -> torch.Tensor:
    """Give RGB that was decoded as BT.601 the colours of its own matrix; (..., 3) uint8 in and out."""
    values = tuple(map(tuple, bitstream.correction(matrix).T.tolist()))
    product = pixels.float() @ transfer.constant(values, torch.float32, pixels.device)
    return product.round_().clamp_(0, 255).to(torch.uint8)


def reason_of(error: BaseException) -> str:
    """Why DALI could not decode something, in one line."""
    return f"DALI: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """What happened, without the story around it: the line after "encountered:", where DALI says one."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    if not lines:
        lines = [line for line in str(error).splitlines() if "ritical error" not in line and "to peek" not in line]
    text = (lines or ["it cannot be decoded"])[0]
    return text if len(text) <= 200 else text[:197] + "..."
