"""Write a dumped video in one of three forms: a folder of images, a pack, a clip. Each takes pictures in order.

Everything is written under a temporary name on the same file system. It is renamed when it is complete and on the disk.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from datasets.dump.pixels import Coder
from datasets.dump.settings import DumpSettings
from datasets.dump.source import Picture, decoded
from datasets.readers.frame_pack import FramePack, PackWriter
from datasets.readers.video import Scaler
from utils import files
from utils.errors import MediaError

if TYPE_CHECKING:
    from fractions import Fraction

    import av

#: Inside a dumped folder: its source and its settings. Not an image, so readers do not see it.
NOTE = ".dump.json"


class VideoWriter(Protocol):
    """One video that is being written."""

    def add(self, picture: Picture) -> None:
        """Store the next frame."""
        ...

    def close(self) -> int:
        """Finish the temporary file or folder and sync it to the disk. Return its bytes."""
        ...

    def abandon(self) -> None:
        """Remove the unfinished file or folder."""
        ...


class FolderWriter:
    """A folder of images, in the layout of TSN."""

    def __init__(self, tmp: str, coder: Coder, settings: DumpSettings, info: files.Row) -> None:
        self._tmp, self._coder, self._settings, self._info = tmp, coder, settings, info
        self._count = self._bytes = 0
        os.makedirs(tmp)

    def add(self, picture: Picture) -> None:
        """See `VideoWriter`."""
        data = self._coder.code(picture)
        name = self._settings.template.format(self._settings.base + self._count)
        _write(os.path.join(self._tmp, name), data)
        self._count += 1
        self._bytes += len(data)

    def close(self) -> int:
        """See `VideoWriter`."""
        # After all images, so that a folder with a note is complete.
        _write(os.path.join(self._tmp, NOTE), json.dumps({"frames": self._count, **self._info}).encode())
        sync_file_system(self._tmp)
        return self._bytes

    def abandon(self) -> None:
        """See `VideoWriter`."""
        shutil.rmtree(self._tmp, ignore_errors=True)


class PackFile:
    """One pack, which holds all frames of a video in one file."""

    def __init__(self, tmp: str, coder: Coder, settings: DumpSettings, info: files.Row) -> None:
        height, width = coder.size
        self._tmp, self._coder = tmp, coder
        self._pack = PackWriter(
            tmp,
            template=settings.template,
            base=settings.base,
            height=height,
            width=width,
            fps=info["fps"],
            info=info,
        )

    def add(self, picture: Picture) -> None:
        """See `VideoWriter`."""
        self._pack.add(self._coder.code(picture))

    def close(self) -> int:
        """See `VideoWriter`."""
        self._pack.close()
        return os.path.getsize(self._tmp)

    def abandon(self) -> None:
        """See `VideoWriter`."""
        with suppress(OSError):  # report the error that led here, not this one
            self._pack.abandon()
        _remove(self._tmp)


class ClipFile:
    """A video file that is cheap to sample: H.264, a key frame every few frames, no audio.

    Every frame keeps its ordinal. A variable frame rate becomes the average rate.
    """

    def __init__(self, tmp: str, coder: Coder, settings: DumpSettings, info: files.Row, fps: Fraction) -> None:
        import av

        self._tmp, self._coder, self._settings, self._scaler = tmp, coder, settings, Scaler()
        self._count = 0

        note = json.dumps(info)
        # "file:" keeps FFmpeg from taking a colon in the name for a protocol.
        self._container = av.open(
            f"file:{tmp}", "w", format="mp4", options={"movflags": "+faststart"}, container_options={}
        )
        self._container.metadata["comment"] = note

        stream = self._container.add_stream(
            "libx264rgb" if settings.lossless else "libx264", rate=fps, options=clip_options(settings)
        )
        stream.height, stream.width = coder.size
        stream.pix_fmt = "rgb24" if settings.lossless else "yuv420p"
        stream.codec_context.thread_count = 1  # the dump runs one process per core
        self._stream: Any = stream

    def add(self, picture: Picture) -> None:
        """See `VideoWriter`."""
        from fractions import Fraction

        frame = self._upright(decoded(picture), picture.name)
        # Numbers instead of the source's time stamps: frame k of the clip is frame k of the source.
        frame.pts, frame.time_base = self._count, Fraction(1) / self._stream.codec_context.rate
        frame.pict_type = 0  # the encoder decides; the decoded type would force it

        # The first frame sets the colours of the stream, which cannot change later.
        if self._count == 0 and not self._settings.lossless:
            self._stream.codec_context.colorspace = frame.colorspace
            self._stream.codec_context.color_range = frame.color_range

        self._container.mux(self._stream.encode(frame))
        self._count += 1

    def _upright(self, frame: av.VideoFrame, name: str) -> av.VideoFrame:
        import av
        from av.video.reformatter import Interpolation

        coder, turns = self._coder, self._coder.turns
        if self._settings.lossless:
            return av.VideoFrame.from_ndarray(coder.rgb(frame, name), format="rgb24")

        height, width = coder.stored_size()
        options = {"width": width, "height": height, "format": "yuv420p", "interpolation": Interpolation.BICUBIC}
        scaled = self._scaler.to(frame, name, threads=1, **options)
        if not turns:
            return scaled

        # Turn the planes, not RGB, so that colours stay as stored; chroma has half the height and width.
        rows = np.asarray(scaled.to_ndarray(), np.uint8)  # (H * 3 / 2, W): the three planes
        planes = [rows[:height], *rows[height:].reshape(2, height // 2, width // 2)]
        turned = [np.ascontiguousarray(np.rot90(plane, turns)) for plane in planes]
        joined = np.concatenate([plane.reshape(-1) for plane in turned]).reshape(-1, coder.size[1])

        result = av.VideoFrame.from_ndarray(joined, format="yuv420p")
        result.colorspace, result.color_range = scaled.colorspace, scaled.color_range
        return result

    def close(self) -> int:
        """See `VideoWriter`."""
        self._container.mux(self._stream.encode(None))  # the frames that the encoder still holds
        self._container.close()
        files.sync_file(Path(self._tmp))
        return os.path.getsize(self._tmp)

    def abandon(self) -> None:
        """See `VideoWriter`."""
        from av.error import FFmpegError

        with suppress(FFmpegError, OSError, ValueError):  # report the error that led here, not this one
            self._container.close()
        _remove(self._tmp)


def clip_options(settings: DumpSettings) -> dict[str, str]:
    """Return the options of x264; docs/dump.md has the measurements behind them."""
    if settings.lossless:
        return {"qp": "0", "preset": "veryfast", "g": str(settings.gop), "bf": "0"}
    # A fixed distance of key frames, and no reference across them: any frame costs at most one short group.
    params = f"keyint={settings.gop}:min-keyint={settings.gop}:scenecut=0:open-gop=0"
    params += ":ref=1:bframes=3:b-adapt=0:b-pyramid=none"
    # With B-frames, x264's macroblock tree reads memory that nothing has written (its SIMD code, seen in version
    # 164). The same pictures then occasionally give different bytes. Without it they do not, and files are smaller and
    # closer.
    params += ":mbtree=0"
    return {"crf": str(settings.crf), "preset": "medium", "tune": "fastdecode", "x264-params": params}


def note_of(path: str, form: str) -> files.Row | None:
    """Return the note that a dump wrote into a video; None if there is none, so that no dump wrote it."""
    try:
        if form == "frames":
            with open(os.path.join(path, NOTE), "rb") as file:
                note = json.load(file)
                return note if isinstance(note, dict) else None

        if form == "packs":
            pack = FramePack(path)
            pack.close()
            return pack.info

        from datasets.readers.video_index import open_container

        with open_container(path, path) as container:
            note = json.loads(container.metadata.get("comment", "null"))
            return note if isinstance(note, dict) else None
    except (OSError, ValueError, MediaError):  # not of this form, or damaged
        return None


def sync_file_system(path: str) -> None:
    """Sync everything below a folder to the disk, in one call instead of one per file."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # syncfs is not in `os`: the C library has it.
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(fd)


def _write(path: str, data: bytes) -> None:
    # O_EXCL: two frames must never get the same name.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        # A write may be short, on a full disk for example; the next one then raises.
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.unlink(path)
