"""The reader `dali` on a GPU: NVDEC gives the frames that were asked for, and how fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[dali]')")


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device("cuda", 0)


def write(path: Path, codec: str, options: dict[str, str], frames: int = 120) -> None:
    import av

    from tests.datasets.videos import frame_image

    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        for number in range(frames):
            image = av.VideoFrame.from_ndarray(frame_image(number, 256, 340), format="rgb24")
            output.mux(stream.encode(image.reformat(format="yuv420p")))
        output.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"bf": "3", "g": "250"}),
        ("libx264", {"bf": "2", "g": "12"}),
        ("libx264", {"bf": "2", "g": "12", "x264-params": "open-gop=1"}),
        ("libx265", {"x265-params": "log-level=none:keyint=20"}),
        ("libvpx-vp9", {"g": "30", "cpu-used": "8"}),
    ],
)
def test_nvdec_gives_the_frames_of_every_ordinal(
    codec: str, options: dict[str, str], device: torch.device, tmp_path: Path
) -> None:
    import numpy as np

    from datasets.dali.reader import DaliReader
    from datasets.readers import open_reader
    from tests.datasets.specs import reader_spec
    from tests.datasets.videos import number_in, records_of

    write(tmp_path / "v.mp4", codec, options)
    records = records_of(tmp_path, ["v.mp4 0"])
    reader, video_reader = (open_reader(reader_spec(kind), records) for kind in ("dali", "video"))
    generator = np.random.default_rng(3)
    for frames in ([0, 119, 7, 7], (np.arange(32) * 2 + 40).tolist(), *generator.integers(0, 120, (4, 8)).tolist()):
        clip, reference = (np.zeros((len(frames), 224, 300, 3), np.uint8) for _ in range(2))
        reader.read(0, np.array(frames), (10, 20, 330, 250), (224, 300), clip)
        video_reader.read(0, np.array(frames), (10, 20, 330, 250), (224, 300), reference)
        assert [number_in(image) for image in clip] == [number_in(image) for image in reference]
        assert np.abs(clip.astype(int) - reference).mean() < 6.0
    assert isinstance(reader, DaliReader)
    assert not reader.fallbacks


def test_jpeg_frames_on_the_gpu(device: torch.device, tmp_path: Path) -> None:
    import numpy as np
    import simplejpeg

    from datasets.dali.reader import DaliReader
    from datasets.readers import open_reader
    from tests.datasets.specs import reader_spec
    from tests.datasets.videos import frame_image, number_in, records_of

    (tmp_path / "v").mkdir()
    for number in range(16):
        data = simplejpeg.encode_jpeg(frame_image(number, 256, 340), quality=90, colorsubsampling="420")
        (tmp_path / "v" / f"img_{number + 1:05d}.jpg").write_bytes(data)
    records = records_of(tmp_path, ["v 16 0"])
    reader, frame_reader = (open_reader(reader_spec(kind), records) for kind in ("dali", "frames"))
    clip, reference = (np.zeros((4, 224, 224, 3), np.uint8) for _ in range(2))
    for one, out in ((reader, clip), (frame_reader, reference)):
        one.read(0, np.array([0, 15, 3, 3]), (0, 0, 340, 256), (224, 224), out)
    assert [number_in(image) for image in clip] == [0, 15, 3, 3]
    assert np.abs(clip.astype(int) - reference).mean() < 4.0
    assert isinstance(reader, DaliReader)
    assert not reader.fallbacks


def test_a_training_loader_fills_batches_on_the_device(device: torch.device, tmp_path: Path) -> None:
    from tests.benchmarks.data import dali as checks

    checks.VIDEOS, checks.FRAMES, checks.STEPS = 6, 120, 6
    figures = checks.measure(tmp_path, str(device), "libx264")
    print(figures)
    assert figures["wrong_frames"] == 0
    assert figures["on_cpu"] == 0
    for pipe in checks.PIPES:
        assert figures[pipe]["dali_clips_per_s"] > 0
