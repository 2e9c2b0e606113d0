"""The reader `dali` as a plain `Reader` of one clip at a time, for tools and for comparing readers.

Training and evaluation do not use it: their loaders (loader.py) decode whole batches alongside the model.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from datasets.dali import capability
from datasets.dali.encoded import Encoded, EncodedReader
from datasets.dali.pipeline import FAILURES, Clip, Decoder, mode, reason_of, require_dali
from datasets.dali.video_cut import Refused
from datasets.readers.resize import Box
from utils.errors import MediaError

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.plan.metadata import VideoMetadata
    from datasets.readers.spec import ReaderSpec


class DaliReader:
    """Read frames decoded by DALI, on the current GPU or else on the CPU. PyAV reads what DALI cannot.

    Attributes:
        fallbacks: why clips were not decoded by DALI -> how many.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, spec: ReaderSpec, records: Records) -> None:
        require_dali()
        self.records = records
        has_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
        self.fallbacks: collections.Counter[str] = collections.Counter()

        limits = capability.limits(self.device) if has_gpu else None
        spec = dataclasses.replace(spec, kind="encoded", decoder=mode(self.device), limits=limits)
        self._stored = EncodedReader(spec, records)
        self._decoders: dict[str, tuple[int, Decoder]] = {}  # form -> (most frames, decoder)

    def close(self) -> None:
        """Close files and pipelines."""
        self._stored.close()
        for _, decoder in self._decoders.values():
            decoder.close()
        self._decoders.clear()

    def probe(self, i: int) -> VideoMetadata:
        """See `Reader.probe`."""
        return self._stored.probe(i)

    def missing(self, i: int) -> int:
        """See `VideoReader.missing`."""
        return self._stored.missing(i)

    def read(self, i: int, frames: np.ndarray, box: Box | None, size: tuple[int, int], out: np.ndarray) -> None:
        """Read frames of record i into `out` (F, h, w, 3); see `Reader.read`."""
        metadata = self.probe(i)
        if box is not None and not (0 <= box[0] < box[2] <= metadata.width and 0 <= box[1] < box[3] <= metadata.height):
            raise ValueError(f"box {tuple(box)} does not lie inside a frame of {metadata.width}x{metadata.height}")

        try:
            self._decode(self._stored.encode(i, frames), box or (0, 0, metadata.width, metadata.height), size, out)
            return
        except Refused as refusal:
            self.fallbacks[str(refusal)] += 1
        except MediaError as error:
            self.fallbacks[error.reason] += 1
        self._stored.read(i, frames, box, size, out)

    def _decode(self, encoded: Encoded, box: Box, size: tuple[int, int], out: np.ndarray) -> None:
        files = [np.frombuffer(file, np.uint8) for file in encoded.files]
        decoder = self._decoder(encoded.form, len(encoded.rows))

        try:
            decoder.submit([Clip(encoded.form, files, encoded.rows, box, size, encoded.codec, encoded.matrix)])
            clip = torch.empty(out.shape, dtype=torch.uint8, device=self.device)
            decoder.deliver([clip])
            out[...] = clip.cpu().numpy()
        except FAILURES as error:
            # A pipeline is of no use after an error; the next clip gets another one.
            decoder.restart()
            raise Refused(reason_of(error)) from error

    def _decoder(self, form: str, frames: int) -> Decoder:
        most, decoder = self._decoders.get(form, (0, None))
        if decoder is None or frames > most:
            if decoder is not None:
                decoder.close()
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            # Doubling keeps the number of rebuilt pipelines small while clips get longer.
            decoder = Decoder(form, self.device, clips=1, frames=max(frames, 2 * most), stream=stream)
            self._decoders[form] = (max(frames, 2 * most), decoder)

        return decoder
