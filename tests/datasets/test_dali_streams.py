"""What the reader `dali` does with streams that its decoders number or colour wrongly, repeat, or cannot decode."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from datasets.dali import bitstream
from datasets.dali.video_cut import Refused, cut
from datasets.loading.base import LoaderOptions
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec
from datasets.readers import open_reader
from tests.datasets.specs import build_index, reader_spec, train_spec
from tests.datasets.videos import SIZE, number_in, records_of, write_video
from utils.errors import UserError
from utils.shards import ShardPlan

NVDEC = frozenset({"h264", "hevc", "vp9"})


def cut_of(path: Path, ordinals: list[int] | None = None) -> tuple[bytes, np.ndarray, str | None]:
    index = build_index(str(path), path.name)
    return cut(str(path), path.name, index, ordinals or [3, 20], NVDEC, (16, 4096))


def write_flat(
    path: Path, codec: str, tag: int, yuv: tuple[int, int, int], options: dict[str, str], side: int = SIZE
) -> None:
    """A video of one colour, tagged."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        stream.codec_context.colorspace = tag
        stream.codec_context.color_range = 1
        for _ in range(8):
            frame = av.VideoFrame(side, side, "yuv420p")
            for plane, value in zip(frame.planes, yuv, strict=True):
                plane.update(np.full(plane.buffer_size, value, np.uint8).tobytes())
            frame.colorspace, frame.color_range = tag, 1
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def write_hidden(path: Path, frames: int = 60, every: int = 12) -> int:
    """VP9 whose key frames are hidden: each lies in one packet, a superframe, with the shown frame after it.

    Encoders hide frames that only others refer to in this way. Here two packets of an ordinary stream are joined, and
    the bit `show_frame` of the key frame is cleared.

    Returns:
        Number of shown frames.
    """
    write_video(path.with_name("plain.mp4"), "libvpx-vp9", frames, options={"g": str(every), "cpu-used": "8"})
    with av.open(str(path.with_name("plain.mp4"))) as source, av.open(str(path), "w") as output:
        copy = output.add_stream_from_template(source.streams.video[0])
        copy.time_base = Fraction(1, 25)
        held, shown = b"", 0
        for packet in source.demux(video=0):
            data = bytes(packet)
            if not data:
                continue
            if packet.is_keyframe:
                held = bytes([data[0] & ~2]) + data[1:]
                continue
            if held:
                marker = bytes([0xC0 | 3 << 3 | 1])  # sizes of four bytes, two frames
                sizes = len(held).to_bytes(4, "little") + len(data).to_bytes(4, "little")
                data = held + data + marker + sizes + marker
            joined = av.Packet(data)
            joined.stream, joined.time_base = copy, Fraction(1, 25)
            joined.pts = joined.dts = shown
            joined.duration, joined.is_keyframe = 1, bool(held)
            output.mux(joined)
            held, shown = b"", shown + 1
    return shown


@pytest.mark.parametrize("name", ["bt709", "smpte240m", "bt2020", "fcc"])
def test_colours_decoded_as_601_become_those_of_their_matrix(name: str) -> None:
    """Against the definition of both matrices, in the range that is not clamped."""
    red, blue = bitstream.MATRICES[name]
    luma, db, dr = 0.45, 0.06, 0.11  # of E'PB and E'PR
    expected = np.array([luma + 2 * (1 - red) * dr, 0.0, luma + 2 * (1 - blue) * db])
    expected[1] = (luma - red * expected[0] - blue * expected[2]) / (1 - red - blue)
    as_601 = np.array([luma + 2 * (1 - 0.299) * dr, 0.0, luma + 2 * (1 - 0.114) * db])
    as_601[1] = (luma - 0.299 * as_601[0] - 0.114 * as_601[2]) / 0.587
    np.testing.assert_allclose(bitstream.correction(name) @ as_601, expected, atol=1e-12)


@pytest.mark.parametrize("tag", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("yuv", [(120, 90, 180), (90, 120, 130), (150, 140, 110)])
def test_colours_are_those_of_pyav(tag: int, yuv: tuple[int, int, int], tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[dali]')")
    write_flat(tmp_path / "v.mp4", "libvpx-vp9", tag, yuv, {"cpu-used": "8"})
    records = records_of(tmp_path, ["v.mp4 0"])
    clips = []
    for kind in ("dali", "video"):
        reader = open_reader(reader_spec(kind), records)
        clip = np.zeros((2, 32, 32, 3), np.uint8)
        reader.read(0, np.array([0, 5]), (8, 8, 72, 72), (32, 32), clip)
        assert not getattr(reader, "fallbacks", None)
        reader.close()
        clips.append(clip.astype(int))
    assert np.abs(clips[0] - clips[1]).max() <= 3


@pytest.mark.parametrize(("tag", "name"), [(1, "bt709"), (6, None), (2, None)])
def test_the_matrix_of_h264_is_read_from_its_stream(tag: int, name: str | None, tmp_path: Path) -> None:
    write_flat(tmp_path / "v.mp4", "libx264", tag, (120, 90, 180), {})
    assert cut_of(tmp_path / "v.mp4", [1, 5])[2] == name


def test_hidden_frames_of_vp9_are_refused_and_others_are_taken(tmp_path: Path) -> None:
    write_hidden(tmp_path / "hidden.mp4")
    with av.open(str(tmp_path / "hidden.mp4")) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert sum(map(bitstream.vp9_has_hidden_frames, packets)) >= 2
    assert len(cut_of(tmp_path / "plain.mp4")[1]) == 2
    with pytest.raises(Refused, match="never shown"):
        cut_of(tmp_path / "hidden.mp4", list(range(40)))


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({}, True),
        ({"bf": "3"}, True),
        ({"profile": "baseline", "bf": "0"}, True),
        ({"x264-params": "interlaced=1"}, False),
    ],
)
def test_only_progressive_h264_is_taken(options: dict[str, str], accepted: bool, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", "libx264", 30, options=options)
    if accepted:
        assert len(cut_of(tmp_path / "v.mp4")[1]) == 2
    else:
        with pytest.raises(Refused, match="fields|time stamps"):
            cut_of(tmp_path / "v.mp4")


def test_av1_and_odd_sides_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", "libx264", 8)
    # As root libsvtav1 gives the calling thread real-time priority, which every later process would inherit.
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    write_flat(tmp_path / "av1.mp4", "libsvtav1", 1, (120, 90, 180), {"preset": "12"})
    os.sched_setscheduler(0, policy, priority)
    with pytest.raises(Refused, match="codec av1"):
        cut_of(tmp_path / "av1.mp4", [1])


def test_barcodes_of_what_is_accepted(tmp_path: Path) -> None:
    """Every ordinal of VP9 with and without hidden frames: right by one reader or the other, never wrong."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[dali]')")
    from datasets.dali.reader import DaliReader

    shown = write_hidden(tmp_path / "hidden.mp4")
    records = records_of(tmp_path, ["hidden.mp4 0", "plain.mp4 0"])
    reader, video = (open_reader(reader_spec(kind), records) for kind in ("dali", "video"))
    assert video.probe(0).frames == shown < video.probe(1).frames
    assert isinstance(reader, DaliReader)
    for number, refused in ((0, True), (1, False)):
        reader.fallbacks.clear()
        for first in (0, 17, 38):
            clips = [np.zeros((16, SIZE, SIZE, 3), np.uint8) for _ in range(2)]
            for one, clip in zip((reader, video), clips, strict=True):
                one.read(number, np.arange(first, first + 16), None, (SIZE, SIZE), clip)
            assert [number_in(image) for image in clips[0]] == [number_in(image) for image in clips[1]]
            assert len({number_in(image) for image in clips[0]}) == 16
        assert bool(reader.fallbacks) == refused


class TestRuns:
    """Runs of DALI on the CPU."""

    @pytest.fixture(autouse=True)
    def _dali(self) -> None:
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[dali]')")

    def clip(self, path: Path, rows: list[int], **changes: Any) -> Any:
        from datasets.dali.pipeline import Clip

        data = np.frombuffer(path.read_bytes(), np.uint8)
        return Clip("video", [data], np.array(rows, np.int32), (0, 0, SIZE, SIZE), (32, 32), "vp9", **changes)

    def test_a_repeated_frame_is_decoded_once(self, tmp_path: Path) -> None:
        from datasets.dali.pipeline import Decoder

        write_video(tmp_path / "v.mp4", "libvpx-vp9", 60, options={"g": "250", "cpu-used": "8"})
        decoder = Decoder("video", torch.device("cpu"), clips=1, frames=16)
        seconds, shown = {}, {}
        for name, rows in (("distinct", list(range(40, 56))), ("one", [55] * 16), ("mixed", [55, 41] * 8)):
            out = torch.zeros(16, 32, 32, 3, dtype=torch.uint8)
            took = []
            for _ in range(3):
                began = time.process_time()
                decoder.submit([self.clip(tmp_path / "v.mp4", rows)])
                decoder.deliver([out])
                took.append(time.process_time() - began)
            seconds[name], shown[name] = min(took), out
        decoder.close()
        assert seconds["one"] <= 1.5 * seconds["distinct"]
        for row in range(16):
            assert torch.equal(shown["one"][row], shown["distinct"][15])
            assert torch.equal(shown["mixed"][row], shown["distinct"][1 if row % 2 else 15])

    def test_a_codec_that_cannot_be_decoded_costs_three_pipelines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from datasets.dali import pipeline
        from datasets.dali.queue import Breaker, Job, Queue

        built, original = [], pipeline.build
        monkeypatch.setattr(pipeline, "build", lambda *a, **k: built.append(1) or original(*a, **k))
        bad = np.random.default_rng(0).integers(0, 255, 20000).astype(np.uint8)
        clips = [
            pipeline.Clip("video", [bad], np.arange(8, dtype=np.int32), (0, 0, 340, 256), (32, 32), "vp9")
            for _ in range(16)
        ]
        outs = [torch.zeros(8, 32, 32, 3, dtype=torch.uint8) for _ in clips]
        breaker = Breaker()
        queue = Queue(pipeline.Decoder("video", torch.device("cpu"), clips=16, frames=8), breaker)
        for _ in range(2):
            queue.submit(Job(clips, outs, list(range(16))))
            assert sorted(name for name, _ in queue.collect()) == list(range(16))
        assert len(built) <= 3
        assert breaker.closed == ["vp9"]
        assert len(breaker.lines) == 1
        queue.close()

    def test_bad_files_do_not_close_a_codec_that_is_decoded(self, tmp_path: Path) -> None:
        from datasets.dali import pipeline
        from datasets.dali.queue import Breaker, Job, Queue

        write_video(tmp_path / "v.mp4", "libvpx-vp9", 12, options={"g": "12", "cpu-used": "8"})
        (tmp_path / "bad.mp4").write_bytes(b"\xff" * 5000)
        good, bad = self.clip(tmp_path / "v.mp4", [1, 2]), self.clip(tmp_path / "bad.mp4", [1, 2])
        outs = [torch.zeros(2, 32, 32, 3, dtype=torch.uint8) for _ in range(4)]
        breaker = Breaker()
        queue = Queue(pipeline.Decoder("video", torch.device("cpu"), clips=4, frames=2), breaker)
        for _ in range(5):
            queue.submit(Job([good, bad, bad, good], outs, [0, 1, 2, 3]))
            assert [name for name, _ in queue.collect()] == [1, 2]
        assert breaker.closed == []
        assert torch.equal(outs[0], outs[3])
        assert outs[0].any()
        queue.close()

    def test_running_out_of_memory_is_no_bad_file(self) -> None:
        from datasets.dali import pipeline
        from datasets.dali.queue import Breaker, Job, Queue

        class Full:
            def submit(self, clips: list[Any]) -> None:
                pass

            def deliver(self, outs: list[torch.Tensor]) -> None:
                raise RuntimeError("Critical error in pipeline: CUDA_ERROR_OUT_OF_MEMORY(2): out of memory")

        decoder: Any = Full()
        queue = Queue(decoder, Breaker())
        clip = pipeline.Clip("video", [], np.array([0]), (0, 0, 8, 8), (8, 8), "h264")
        queue.submit(Job([clip], [torch.zeros(1)], [0]))
        with pytest.raises(UserError, match="batch_size"):
            queue.collect()


class TestSessions:
    """The estimate of what DALI's sessions take; it needs no GPU."""

    def test_sizes_are_admitted_until_the_budget_is_full(self) -> None:
        from datasets.dali.sessions import Sessions, session_bytes

        assert session_bytes(1080, 1920) == 22 * 1088 * 1920 * 3 // 2
        sessions = Sessions(16 * session_bytes(1080, 1920) + 8 * session_bytes(240, 320), at_once=8)
        assert sessions.refusal("h264", (1080, 1920)) is None
        assert sessions.refusal("hevc", (1080, 1920)) is None
        assert "one more frame size" in str(sessions.refusal("h264", (1088, 1920)))
        assert sessions.refusal("h264", (240, 320)) is None
        assert sessions.refusal("vp9", (240, 320)) is not None
        for codec in ("h264", "hevc"):  # the answers stay
            assert sessions.refusal(codec, (1080, 1920)) is None
        assert sessions.refusal("h264", (1088, 1920)) is not None

    def test_any_number_of_sizes_fits_where_the_hundred_largest_do(self) -> None:
        from datasets.dali.sessions import Sessions, session_bytes

        sessions = Sessions(100 * session_bytes(480, 640), at_once=8)
        sizes = [(height, width) for height in range(240, 481, 16) for width in range(320, 641, 16)]
        assert all(sessions.refusal("h264", size) is None for size in sizes)
        assert sessions.refusal("h264", (4096, 4096)) is not None

    def test_there_is_no_limit_on_the_cpu(self) -> None:
        from datasets.dali import sessions

        assert sessions.of(torch.device("cpu")).refusal("vp9", (16384, 16384)) is None

    def test_another_frame_size_is_read_by_pyav(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[dali]')")
        from datasets.dali import sessions
        from datasets.dali.loader import DaliEvalLoader, DaliTrainLoader

        write_video(tmp_path / "large.mp4", "libvpx-vp9", 12, options={"g": "12", "cpu-used": "8"})
        write_flat(tmp_path / "small.mp4", "libvpx-vp9", 6, (120, 90, 180), {"cpu-used": "8"}, side=SIZE // 2)
        names = ["large.mp4 0", "small.mp4 1", "large.mp4 0", "small.mp4 1"]
        records = records_of(tmp_path, names)
        one_size = sessions.THREADS["mixed"] * sessions.session_bytes(SIZE, SIZE)
        monkeypatch.setattr(sessions, "of", lambda device: sessions.Sessions(one_size))
        options = LoaderOptions(reader_spec("video"), workers=0, prefetch=2)
        views = EvalSpec(Sampling("tsn", 4), scale=48, crop_size=32)
        with DaliEvalLoader(records, views, options) as loader:
            for item in loader:
                assert item.frames is not None
                assert item.plan is not None
                if item.label == 0:
                    assert [number_in(frame.numpy()) for frame in item.frames] == item.plan.frames.tolist()
                else:
                    assert item.frames.float().flatten(0, 2).std(0).max() < 2
            assert list(loader.fallbacks.values()) == [2]
            assert "one more frame size" in next(iter(loader.fallbacks))
        spec = train_spec(Sampling("tsn", 4), input_size=32, crop="centre", flip=False)
        plan = ShardPlan(total=1, batch_size=4, world=1, rank=0, group_size=1)
        with DaliTrainLoader(records, spec, options, seed=1, shards=plan, stop=3) as loader:
            for _, batches in loader:
                assert sorted(batches[0].samples) == [0, 1, 2, 3]
                for clip, label in zip(batches[0].clips.float(), batches[0].labels.tolist(), strict=True):
                    assert (clip.flatten(0, 2).std(0).max() < 2) == (label == 1)
            assert sum(loader.fallbacks.values()) == 6


def test_runs_keep_to_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[dali]')")
    from datasets.dali import loader

    monkeypatch.setattr(loader, "RUN_BYTES", 100)
    from datasets.dali import encoded
    from datasets.loading.messages import Answer

    sizes = (40, 60, 1, 90, 300, 10)
    stored = [encoded.Stored("images", [], np.zeros(0), "jpeg", None, (0, 0, 1, 1), size, (1, 1)) for size in sizes]
    answers: list[Any] = [Answer(1, stored=one) for one in stored]
    assert list(loader.within_budget([0, 1, 2, 3, 4, 5], answers)) == [[0, 1], [2, 3], [4], [5]]


def test_a_clip_with_too_large_frames_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.dali import encoded
    from datasets.loading.messages import AsStored
    from datasets.loading.slots import Slot
    from datasets.plan.train import Plan

    write_video(tmp_path / "v.mp4", "libvpx-vp9", 12, options={"cpu-used": "8"})
    records = records_of(tmp_path, ["v.mp4 0"])
    reader = encoded.EncodedReader(reader_spec("encoded", decoder="cpu"), records)
    slot = Slot.create("test", 0)
    plan = Plan(0, np.array([1, 1, 2]), (0, 0, SIZE, SIZE), (SIZE, SIZE), {})
    limits = AsStored(None)
    stored = encoded.pack(reader, plan, None, slot, 0, limits)["stored"]
    assert isinstance(stored, encoded.Stored)
    decoded = stored.decoded
    assert decoded == 2 * SIZE * SIZE * 3  # a repeated frame counts once
    refused = encoded.pack(reader, plan, None, slot, 0, AsStored(None, ("vp9",)))["refused"]
    assert "does not decode vp9 here" in str(refused)
    monkeypatch.setattr(encoded, "DECODED_BYTES", decoded - 1)
    assert "before they are cropped" in str(encoded.pack(reader, plan, None, slot, 0, limits)["refused"])
    slot.close()
    reader.close()


DRIVER = """
#include <string.h>
/* The structure as nvcuvid.h has it; H.264 and VP9 are supported, HEVC is not. */
typedef struct { int codec, chroma; unsigned bits, r1[3]; unsigned char supported, engines; unsigned short formats;
  unsigned max_w, max_h, max_mb; unsigned short min_w, min_h; unsigned char h, c; unsigned short b; unsigned r3[10];
} Caps;
int cuvidGetDecoderCaps(Caps *caps) {
  if (caps->chroma != 1 || caps->bits != 0) return 1;
  caps->supported = caps->codec == 4 || caps->codec == 10;
  caps->max_w = 8192; caps->max_h = caps->codec == 4 ? 2304 : 8192;
  caps->min_w = 48; caps->min_h = caps->codec == 4 ? 16 : 144;
  return 0;
}
"""


def test_the_driver_is_asked_what_it_decodes(tmp_path: Path) -> None:
    import ctypes

    from datasets.dali import capability

    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "driver.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", str(library)], check=True)
    sides = capability.asked(ctypes.CDLL(str(library)))
    assert sides == {"h264": (128, 2304), "vp9": (144, 4096)}
