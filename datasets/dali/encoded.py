"""Give stored bytes to a decoder on the device, in the reader processes of `dali`. Torch-free, DALI-free.

A folder of frames, a pack or an image gives its JPEG files, through the frame source of the list (disk, packs,
memcached). Any other file gives a small mp4 (video_cut.py). Clips that the device cannot decode, or might decode to
other frames, are refused with a reason. The readers `video` and `frames` then read their pixels here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.dali.video_cut import Refused, codec_of, cut
from datasets.readers.frames import FramesReader
from datasets.readers.metadata_cache import family_of
from datasets.readers.resize import Box
from datasets.readers.video import VideoReader
from utils.errors import MediaError

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.loading.messages import AsStored
    from datasets.loading.slots import Slot
    from datasets.plan.metadata import VideoMetadata
    from datasets.plan.train import Plan
    from datasets.plan.views import VideoPlan
    from datasets.readers.spec import ReaderSpec

#: Codecs that DALI 2.4 decodes, with the smallest and largest side of a frame [pixels]. Its CPU build has no H.264 and
#: no HEVC. Files without exact time stamps, such as AVI, are refused earlier, so MPEG-4 of old data sets is missing.
#: AV1 is missing too: its encoders hide frames in most files, and NVDEC counts pictures wrongly after a hidden frame.
LIMITS = {
    "cpu": {"vp9": (2, 16384), "mjpeg": (2, 16384)},
    "mixed": {"h264": (128, 4096), "hevc": (144, 4096), "vp9": (128, 4096)},
}
#: Bytes of whole frames that one clip may have on the device before it is cropped.
DECODED_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The stored bytes of some frames.

    Attributes:
        form: "video": one mp4; "images": JPEG files, each frame once.
        files: their bytes.
        rows: (F,) int32: for each wanted frame, its ordinal in the mp4 or the number of its file.
        codec: "jpeg", or the codec of the video.
        matrix: name of the colour matrix in `bitstream.MATRICES`; None for BT.601.
    """

    form: str
    files: list[bytes]
    rows: np.ndarray
    codec: str = "jpeg"
    matrix: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files))


class EncodedReader:
    """A `Reader` that can also give stored bytes, for the decoder named by `spec.decoder` ("cpu" or "mixed")."""

    def __init__(self, spec: ReaderSpec, records: Records) -> None:
        self.records = records
        self._limits = LIMITS[spec.decoder] if spec.limits is None else spec.limits
        self._video = VideoReader(spec, records)

        if spec.memcached and spec.memcached.get("servers"):
            from datasets.memcached.source import MemcachedReader

            served = MemcachedReader(spec, records)
            self._frames: FramesReader = served
            self.counters = served.counters
        else:
            self._frames = FramesReader(spec, records)

    def close(self) -> None:
        """Close both readers."""
        self._video.close()
        self._frames.close()

    def probe(self, i: int) -> VideoMetadata:
        """See `Reader.probe`."""
        return self._of(i).probe(i)

    def missing(self, i: int) -> int:
        """See `VideoReader.missing`."""
        return self._video.missing(i) if self._of(i) is self._video else 0

    def read(self, i: int, frames: np.ndarray, box: Box | None, size: tuple[int, int], out: np.ndarray) -> None:
        """Read the pixels of frames, decoded in this process; see `Reader.read`."""
        self._of(i).read(i, frames, box, size, out)

    def encode(self, i: int, frames: np.ndarray, without: Sequence[str] = ()) -> Encoded:
        """Return the stored bytes of some frames of record i.

        Args:
            i: the record.
            frames: (F,) ordinals.
            without: codecs of which the decoder has never decoded a clip.

        Raises:
            Refused: the frames have to be read as pixels.
            MediaError: a file cannot be opened.
        """
        if isinstance(self._of(i), FramesReader):
            if "jpeg" in without:
                raise Refused("DALI does not decode JPEG here")
            return self._files(i, frames)

        index = self._video.index(i)
        # A record may be a part of a video: its frames count from `starts`.
        ordinals = np.asarray(frames, np.int64) + int(self.records.starts[i])
        if ordinals.min() < 0 or ordinals.max() >= index.metadata.frames:
            raise Refused("a frame is missing")  # reading it as pixels then names the frame

        path, shown, codec = self.records.full_path(i), self.records.path(i), codec_of(index)
        if codec in without:
            raise Refused(f"DALI does not decode {codec} here")

        smallest, largest = self._limits.get(codec, (0, 0))
        codecs = frozenset(self._limits)
        data, rows, matrix = cut(path, shown, index, ordinals.tolist(), codecs, (smallest, largest))
        return Encoded("video", [data], rows, codec, matrix)

    def _of(self, i: int) -> VideoReader | FramesReader:
        return self._frames if family_of(self.records.full_path(i)) == "frames" else self._video

    def _files(self, i: int, frames: np.ndarray) -> Encoded:
        # Each file is stored and decoded once, however often its frame is wanted.
        distinct, rows = np.unique(np.asarray(frames, np.int64), return_inverse=True)
        metadata = self._frames.probe(i)
        if distinct[0] < 0 or distinct[-1] >= metadata.frames:
            raise Refused("a frame is missing")

        files = self._frames.files(i, distinct.tolist())
        for data in files:
            _check_jpeg(data, (metadata.height, metadata.width))
        return Encoded("images", files, rows.astype(np.int32).reshape(-1))


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """Describe the stored bytes in a slot, one file after the other.

    Attributes:
        form, rows, codec, matrix: as in `Encoded`.
        files: number of bytes of each file.
        box: part of the frames to keep.
        decoded: bytes of the whole frames once decoded.
        frame: (height, width) as stored.
    """

    form: str
    files: list[int]
    rows: np.ndarray
    codec: str
    matrix: str | None
    box: Box
    decoded: int
    frame: tuple[int, int]


def pack(
    reader: Any, plan: Plan | VideoPlan, box: Box | None, slot: Slot, offset: int, limits: AsStored
) -> dict[str, object]:
    """Write the stored bytes of some frames into a slot.

    Args:
        reader: an EncodedReader, perhaps behind a cache of metadata.
        plan, box: frames of a record, and the part of them to keep; box None means whole frames.
        slot, offset: where the bytes go.
        limits: largest number of bytes, and codecs to leave out.

    Returns:
        Fields of an `Answer`: `stored`, or `refused` if nothing was written.
    """
    metadata: VideoMetadata = reader.probe(plan.sample)
    decoded = len(np.unique(plan.frames)) * metadata.height * metadata.width * 3

    try:
        # Checked before anything is read: the device holds whole frames until they are cropped.
        if decoded > DECODED_BYTES:
            raise Refused(f"its frames take {decoded >> 20} MiB before they are cropped")
        encoded: Encoded = reader.encode(plan.sample, plan.frames, limits.without)
        if limits.room is not None and encoded.size > limits.room:
            raise Refused(f"its frames are stored in more than {limits.room >> 20} MiB")
    except Refused as refusal:
        return {"refused": str(refusal)}
    except MediaError as error:
        return {"refused": error.reason}  # reading it as pixels names the bad frame, or repairs the clip

    slot.grow(offset + encoded.size)
    out = slot.view(offset, (encoded.size,))
    out[:] = np.frombuffer(b"".join(encoded.files), np.uint8)

    box = (0, 0, metadata.width, metadata.height) if box is None else box
    sizes, frame = [len(file) for file in encoded.files], (metadata.height, metadata.width)
    return {"stored": Stored(encoded.form, sizes, encoded.rows, encoded.codec, encoded.matrix, box, decoded, frame)}


def _check_jpeg(data: bytes, size: tuple[int, int]) -> None:
    """Raise Refused unless `data` is a complete, usual JPEG: a decoder may show part of a file without an error."""
    import simplejpeg

    if data[:2] != b"\xff\xd8":
        raise Refused("its images are not JPEG files")
    # A few bytes of padding may follow the end marker.
    if b"\xff\xd9" not in data[-64:]:
        raise Refused("a JPEG file of it is cut off")

    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise Refused(f"a JPEG file of it is not readable ({error})") from error

    if colour not in ("YCbCr", "Gray"):
        raise Refused(f"JPEG files in {colour} are not decoded there")
    if (height, width) != size:
        raise Refused("its images differ in size")
