"""Build DALI pipelines that decode, crop and resize clips, on a GPU or on the CPU. Only this file imports nvidia.dali.

DALI gets the bytes, the frames and the boxes of the plans, and draws nothing itself. It crops and scales as
datasets/readers/resize.py does: it cuts the box out first, so that no pixel outside of it has an influence, then scales
linearly without antialiasing. On the same decoded frame the result differs by at most 1 of 255, because cv2 rounds in
fixed point.
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
from utils.errors import UserError

#: DALI's threads. On a GPU each thread feeds one NVDEC engine and mostly waits for it; an H100 has seven engines.
#: On the CPU the threads decode.
THREADS = {"mixed": 8, "cpu": 1}
#: What DALI raises when a run fails.
FAILURES = (RuntimeError, IndexError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Clip:
    """The source of one clip.

    Attributes:
        form: "video" or "images"; see encoded.Encoded.
        files: the stored files, (n,) uint8 each.
        rows: (T,) int32: for each frame, its ordinal in the video or the number of its file.
        box: x1, y1, x2, y2 in pixels of the stored frame.
        size: (h, w) of the result.
        codec: "jpeg", or the codec of the video.
        matrix: name of the colour matrix in `bitstream.MATRICES`; None for BT.601, which DALI always assumes.
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
    """Return the module nvidia.dali. Raise UserError that names the extra if it is not installed."""
    try:
        return importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise UserError(
            "data.reader: dali needs NVIDIA DALI, which is not installed here: pip install '.[dali]' "
            f"('.[dali-cuda12]' with a torch for CUDA 12), or set data.reader to video or frames ({error})"
        ) from error


def mode(device: torch.device) -> str:
    """Return DALI's name for where it decodes: "mixed" on a GPU, else "cpu"."""
    return "mixed" if device.type == "cuda" else "cpu"


def build(form: str, device: torch.device, *, batch: int, threads: int) -> Any:
    """Build the pipeline of one form: encoded bytes -> uint8 (T, h, w, C) per video, or (h, w, C) per image.

    Args:
        form: "video" or "images".
        device: where frames are decoded and delivered.
        batch: most samples of a run.
        threads: number of DALI's threads.

    Raises:
        UserError: DALI is not installed, or cannot start on the device.
    """
    dali = require_dali()
    fn, types = dali.fn, dali.types
    where, on_gpu = mode(device), device.type == "cuda"

    @dali.pipeline_def
    def definition() -> object:
        """Describe the graph that DALI runs: stored bytes and boxes in, clips out."""
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)  # y, x
        shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)  # h, w
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)  # h, w

        if form == "video":
            rows = fn.external_source(name="rows", dtype=types.INT32, ndim=1)
            more = {"affine": False} if on_gpu else {}
            # A cut is decoded only once: building an index of it would cost more than it saves.
            frames = fn.decoders.video(data, frames=rows, device=where, pad_mode="none", build_index=False, **more)
        else:
            frames = fn.decoders.image(data, device=where, output_type=types.RGB, adjust_orientation=False)

        # Crop before scaling, so that the result depends on no pixel outside of the box.
        inside = fn.slice(frames, start=start, shape=shape, axis_names="HW")
        return fn.resize(inside, size=size, interp_type=types.INTERP_LINEAR, antialias=False)

    number = (device.index or 0) if on_gpu else None

    try:
        # With a depth above 1, the first schedule_run would start several runs before their inputs are fed. Several
        # runs can be scheduled all the same: they run one after the other, concurrently with this process's work.
        pipeline: Any = definition(
            batch_size=batch, num_threads=threads, device_id=number, prefetch_queue_depth=1, seed=0
        )
        pipeline.build()
    except FAILURES as error:
        raise UserError(f"data.reader: dali does not start on {device}: {_first_line(error)}") from error

    return pipeline


class Decoder:
    """Runs of one pipeline, oldest first. After a failure, `restart` drops all runs under way.

    Args:
        form, device: see `build`.
        clips: most clips of a run.
        frames: most frames of a clip.
        stream: the stream on which decoded clips are copied out; None on the CPU.
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
        """Drop the pipeline, which cannot be used after an error. The next `submit` builds another one."""
        self._runs.clear()
        self._pipeline = None

    def submit(self, clips: list[Clip]) -> None:
        """Start to decode clips. Each frame is decoded once. The files are copied, so they may change afterwards."""
        if self._pipeline is None:
            self._pipeline = build(self.form, self.device, batch=self._batch, threads=self._threads)

        fed: dict[str, list[np.ndarray]] = {"data": [], "start": [], "shape": [], "size": []}
        for clip in clips:
            x1, y1, x2, y2 = clip.box
            # A sample of DALI is a whole video, or one image: then a clip is as many samples as it has distinct frames.
            for file in clip.files if self.form == "video" else [clip.files[row] for row in np.unique(clip.rows)]:
                fed["data"].append(file)
                fed["start"].append(np.array([y1, x1], np.int32))
                fed["shape"].append(np.array([y2 - y1, x2 - x1], np.int32))
                fed["size"].append(np.array(clip.size, np.float32))
        if self.form == "video":
            fed["rows"] = [np.unique(clip.rows).astype(np.int32) for clip in clips]

        # All inputs must be fed before the run is scheduled.
        for name, arrays in fed.items():
            self._pipeline.feed_input(name, arrays)
        self._runs.append(list(clips))
        self._pipeline.schedule_run()

    def deliver(self, outs: list[torch.Tensor]) -> None:
        """Wait for the oldest run and write its clips, (T, h, w, 3) uint8 each, into `outs` on the device.

        Raises:
            FAILURES: the run failed, or gave other frames than those it was given.
        """
        clips = self._runs.popleft()
        (samples,) = self._pipeline.share_outputs(cuda_stream=self.stream)

        with torch.cuda.stream(self.stream):
            for clip, pixels, out in zip(clips, self._frames(samples, clips), outs, strict=True):
                distinct, row_of = np.unique(clip.rows, return_inverse=True)
                expected = (len(distinct), *clip.size, 3)
                if tuple(pixels.shape) != expected:
                    raise RuntimeError(f"DALI gave {tuple(pixels.shape)} instead of {expected}")

                if clip.matrix is not None:
                    pixels = recoloured(pixels, clip.matrix)
                # DALI gave (F, h, w, 3) in ascending order: restore the order and the repeats of the clip.
                if not np.array_equal(row_of.reshape(-1), np.arange(len(clip.rows))):
                    rows = torch.from_numpy(row_of.reshape(-1).astype(np.int64))
                    pixels = pixels.index_select(0, transfer.to_device(rows, self.device))
                out.copy_(pixels)

        # The copies must be complete before DALI reuses the buffers.
        if self.stream is not None:
            self.stream.synchronize()  # waits for the copies alone
        self._pipeline.release_outputs()

    def _frames(self, samples: Sequence[object], clips: list[Clip]) -> Iterator[torch.Tensor]:
        """Yield the distinct frames of each clip, (F, h, w, 3)."""
        if self.form == "video":
            yield from (torch.from_dlpack(sample) for sample in samples)
            return

        # Images are separate samples (h, w, 3), clip after clip.
        first = 0
        for clip in clips:
            last = first + len(np.unique(clip.rows))
            yield torch.stack([torch.from_dlpack(samples[number]) for number in range(first, last)])
            first = last

    def close(self) -> None:
        """End the pipeline and its threads. After an error on a GPU keep it: ending it would wait for the GPU."""
        self._runs.clear()
        if sys.exc_info()[0] is not None and self.device.type == "cuda":
            _left_to_the_end.append(self._pipeline)
        self._pipeline = None


# Pipelines that end with the process, since an earlier end could hang.
_left_to_the_end: list[object] = []


def recoloured(pixels: torch.Tensor, matrix: str) -> torch.Tensor:
    """Return RGB that was decoded as BT.601 with the colours of the matrix `matrix`; (..., 3) uint8 in and out."""
    # Pixels are row vectors here, so the matrix is transposed.
    values = tuple(map(tuple, bitstream.correction(matrix).T.tolist()))
    product = pixels.float() @ transfer.constant(values, torch.float32, pixels.device)
    return product.round_().clamp_(0, 255).to(torch.uint8)


def reason_of(error: BaseException) -> str:
    """Return why DALI could not decode something, in one line."""
    return f"DALI: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """Return the cause without the context around it: the line after "encountered:", where DALI writes one."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    if not lines:
        # Without that word, skip the lines about the pipeline that DALI adds to each error.
        lines = [line for line in str(error).splitlines() if "ritical error" not in line and "to peek" not in line]

    text = (lines or ["it cannot be decoded"])[0]
    return text if len(text) <= 200 else text[:197] + "..."
