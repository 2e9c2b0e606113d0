"""The reader `memcached` as users meet it: loaders, data sets, preload, and a training run with a server of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from datasets.lists.records import Records
from datasets.loading.base import LoaderOptions
from datasets.loading.train import TrainLoader
from datasets.memcached import preload
from datasets.memcached.report import NAMES, MemcachedTraffic, line, total_line
from datasets.memcached.servers import FOLDER, NODES, servers_of, started
from datasets.memcached_dataset import McDataset
from datasets.memcached_dataset_tsn import McTSNDataset
from datasets.plan.sampling import Sampling
from datasets.readers import ReaderSpec
from tests.datasets.specs import reader_spec, train_spec
from tests.datasets.videos import decode_all, frame_image, records_of
from tests.experiment import make
from tests.memcached import MISSING, Server, wait_for
from utils import log
from utils.config.schema import Memcached
from utils.errors import MediaError, UserError
from utils.shards import ShardPlan

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ROOT = Path(__file__).resolve().parents[2]
FRAMES = 12
SPEC = train_spec(Sampling("tsn", 4), input_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = tmp_path_factory.mktemp("frames")
    for video in range(6):
        (frames / f"v{video}").mkdir()
        for number in range(FRAMES):
            data = simplejpeg.encode_jpeg(frame_image(16 * video + number), quality=90)
            (frames / f"v{video}" / f"img_{number + 1:05d}.jpg").write_bytes(data)
    (frames / "list.txt").write_text("".join(f"v{video} {FRAMES} {video % 3}\n" for video in range(6)))
    (frames / "images.txt").write_text("".join(f"v{video}/img_00003.jpg {video}\n" for video in range(6)))
    return frames


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    memcached = Server(tmp_path, "s")
    yield memcached
    memcached.close()


def clips(
    records: Records, spec: ReaderSpec, workers: int, steps: int = 6
) -> tuple[list[torch.Tensor], MemcachedTraffic]:
    options = LoaderOptions(spec, workers=workers, on_bad="error")
    shards = ShardPlan(total=1, batch_size=2, world=1, rank=0, group_size=1)
    with TrainLoader(records, SPEC, options, seed=3, shards=shards, stop=steps) as loader:
        return [batch.clips.clone() for _, batches in loader for batch in batches], loader.traffic


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_clips_as_from_the_disk_and_every_frame_is_counted(
    folder: Path, tmp_path: Path, server: Server, workers: int
) -> None:
    records = records_of(tmp_path, (folder / "list.txt").read_text().splitlines(), root=folder)
    expected, silent = clips(records, reader_spec("frames"), 0)
    assert silent.report() == ([], {})
    spec = reader_spec("memcached", memcached={"servers": [server.name], "timeout_ms": 5000})
    runs = [clips(records, spec, workers) for _ in range(2)]
    for got, _ in runs:
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    traffic = runs[-1][1]
    lines, values = traffic.report()
    counts = traffic.total
    assert 12 * 4 < counts["frames"] <= 12 * (4 + 1)  # the clips, and a first frame for the size of each video
    assert counts["hits"] + counts["misses"] + counts["no_server"] == counts["frames"]
    assert values["memcached_hit_rate"] > 0.5
    assert set(values) == {f"memcached_{name}" for name in ("hit_rate", "misses", "corrupt", "timeouts", "mb_per_s")}
    assert lines[-1].startswith("memcached: hit rate ")


def test_a_change_of_state_is_said_once(tmp_path: Path) -> None:
    traffic = MemcachedTraffic()
    for _ in range(3):  # three reader processes find out
        traffic.add(({"frames": 8, "no_server": 8}, [("a:1", "out of use (refused)")]))
    lines, values = traffic.report()
    assert lines[0] == "WARNING: memcached a:1: out of use (refused)"
    assert len(lines) == 2
    assert values["memcached_hit_rate"] == 0.0
    traffic.add(({}, [("a:1", "in use again")]))
    assert traffic.report() == (["WARNING: memcached a:1: in use again"], {})
    assert total_line([0.0] * len(NAMES), 2) == ""
    assert "2 rank(s)" in total_line([8.0] * len(NAMES), 2)
    assert "MB/s" not in line(dict.fromkeys(NAMES, 1.0), None)


def pixels_of(record: tuple[object, int]) -> torch.Tensor:
    pixels, _ = record
    assert isinstance(pixels, torch.Tensor)
    return pixels


def test_images_of_a_list(folder: Path, server: Server) -> None:
    images = McDataset(folder, folder / "images.txt", servers=[server.name])
    record = images[4]  # read once: a second time may be a hit already
    image = pixels_of(record)
    assert (tuple(image.shape), image.dtype, record[1]) == ((96, 96, 3), torch.uint8, 4)
    images.reader.pool.flush()
    again = pixels_of(images[4])
    assert torch.equal(image, again)
    assert images.counters()["hits"] == 1
    encoded = McDataset(folder, folder / "images.txt", encoded=True)
    assert encoded[4] == ((folder / "v4/img_00003.jpg").read_bytes(), 4)
    halves = McDataset(folder, folder / "images.txt", transform=lambda pixels: pixels[::2])
    half, _ = halves[0]
    assert isinstance(half, np.ndarray)
    assert half.shape == (48, 96, 3)
    with pytest.raises(IndexError):
        images[6]
    for data in (images, encoded, halves):
        data.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_segments_in_a_data_loader(folder: Path, server: Server, method: str) -> None:
    data = McTSNDataset(folder, folder / "list.txt", 4, servers=[server.name], timeout_ms=5000.0)
    expected = [data[i] for i in range(len(data))]  # the parent has connections already
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=method)
    batches = list(loader)
    assert torch.equal(torch.cat([batch for batch, _ in batches]), torch.stack([pixels_of(pair) for pair in expected]))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 0, 1, 2]
    data.close()


def test_modes_of_the_segment_data_set(folder: Path) -> None:
    train = McTSNDataset(folder, folder / "list.txt", 4)
    drawn = [train.frames(0).tolist()]
    train.set_epoch(1)
    drawn.append(train.frames(0).tolist())
    assert drawn[0] != drawn[1]
    val = McTSNDataset(folder, folder / "list.txt", 4, mode="val", sampling="tsn")
    clip, label = pixels_of(val[1]), val[1][1]
    assert (tuple(clip.shape), label) == ((4, 96, 96, 3), 1)
    files = McTSNDataset(folder, folder / "list.txt", 4, mode="val", sampling="tsn", encoded=True)[1][0]
    assert isinstance(files, list)
    assert all(np.array_equal(simplejpeg.decode_jpeg(f), c) for f, c in zip(files, clip.numpy(), strict=True))
    dense = McTSNDataset(folder, folder / "list.txt", 1, 4, mode="dense", sampling="mmaction2_0x")
    assert pixels_of(dense[0]).shape == (40, 96, 96, 3)
    with pytest.raises(UserError, match="dense"):
        McTSNDataset(folder, folder / "list.txt", mode="test")  # pyright: ignore[reportArgumentType]
    (folder / "v5" / "img_00012.jpg").rename(folder / "v5" / "away")
    try:
        with pytest.raises(MediaError, match="img_00012"):
            train[5]
    finally:
        (folder / "v5" / "away").rename(folder / "v5" / "img_00012.jpg")


def test_preload_stores_everything_once(folder: Path, tmp_path: Path, server: Server) -> None:
    records = records_of(tmp_path, ["gone 12 0", *(folder / "list.txt").read_text().splitlines()], root=folder)
    spec = reader_spec("memcached", memcached={"servers": [server.name], "timeout_ms": 5000})
    half = preload.preload(records, spec, range(0, 7, 2), None, workers=1)
    assert (half.done, half.frames, half.there, half.stored) == (4, 36, 0, 36)
    assert len(half.failed) == 1
    assert "gone" in half.failed[0]
    whole = preload.preload(records, spec, range(1, 7), None, workers=2)
    assert (whole.frames, whole.there, whole.stored, whole.failed) == (72, 36, 36, [])
    assert "36 already there, 36 stored, 0 not" in whole.text()
    assert preload.preload(records, spec, range(1, 7), None, workers=2).read_bytes == 0


def test_preload_verb(folder: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture) -> None:
    exp = make(tmp_path / "exp", folder)
    sets = [f"train_root={folder}", f"train_source={folder / 'list.txt'}", f"val_source={folder / 'list.txt'}"]
    words = [str(exp), *(word for text in sets for word in ("--set", text))]
    with pytest.raises(UserError, match="--servers"):
        preload.main(words)
    with pytest.raises(UserError, match="does not answer"):
        preload.main([*words, "--servers", "[unix:/nowhere/s]"])
    assert preload.main([*words, "--servers", f"['{server.name}']", "--shard", "1/3", "--split", "both"]) == 0
    assert "2/2 videos, 24 frames: 0 already there, 24 stored, 0 not" in capsys.readouterr().out
    file = tmp_path / "servers.txt"
    file.write_text(f"{server.name}\n")
    assert preload.main([*words, "--servers", str(file), "--frames", "val"]) == 0
    assert "6/6 videos, 12 frames" in capsys.readouterr().out


def test_preload_of_videos_is_refused_once(folder: Path, tmp_path: Path) -> None:
    exp = make(tmp_path / "exp", folder)
    (tmp_path / "v.avi").mkdir()
    (tmp_path / "v.MP4").touch()
    (tmp_path / "list.txt").write_text("v.MP4 3 0\n")
    words = [str(exp), "--servers", "[unix:/nowhere/s]", "--set", f"train_root={tmp_path}"]
    words += ["--set", f"train_source={tmp_path / 'list.txt'}"]
    with pytest.raises(UserError, match=r"list\.txt names video files \(v\.MP4\); .*dump"):
        preload.main(words)
    (tmp_path / "list.txt").write_text("v.avi 3 0\n")
    with pytest.raises(UserError, match="does not answer"):  # a folder of frames with the name of its video
        preload.main(words)
    with pytest.raises(UserError, match="--workers 0"):
        preload.main([*words, "--workers", "0"])


def test_which_servers_a_configuration_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (FOLDER, NODES):
        monkeypatch.delenv(name, raising=False)
    assert servers_of(Memcached())["servers"] == []
    assert servers_of(Memcached(servers=("10.0.0.1:1", "unix:/s")))["servers"] == ["10.0.0.1:1", "unix:/s"]
    for name, text in (("b", "10.0.0.2:5"), ("a", "10.0.0.9:5")):
        (tmp_path / f"{name}.server").write_text(f"{text}\n")
    (tmp_path / "secret").write_text("user:word\n")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv(NODES, "2")
    settings = servers_of(Memcached())
    assert (settings["servers"], settings["secret_file"]) == (["10.0.0.2:5", "10.0.0.9:5"], str(tmp_path / "secret"))
    assert started(tmp_path, 3, seconds=0.2) == ["10.0.0.2:5", "10.0.0.9:5"], "a missing node does not stop the run"
    with pytest.raises(UserError, match="cannot be read"):
        servers_of(Memcached(servers=str(tmp_path / "absent")))


@pytest.mark.slow
def test_training_with_a_server_started_by_the_launcher(motion_videos: Path, tmp_path: Path) -> None:
    data: Any = tmp_path / "data"
    (data / "lists").mkdir(parents=True)
    for name in ("train.txt", "val.txt"):
        text = (motion_videos / "lists" / name).read_text()
        (data / "lists" / name).write_text("\n".join(text.splitlines()[:12]) + "\n")
        for path in (row.split()[0] for row in text.splitlines()[:12]):
            (data / path).mkdir(parents=True)
            for number, image in enumerate(decode_all(motion_videos / path)):
                (data / path / f"img_{number + 1:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(image))
    for extra in (motion_videos / "lists").glob("classInd*"):
        (data / "lists" / extra.name).write_text(extra.read_text())
    exp = make(tmp_path / "exp", data, workers=1, steps=6)
    words = ["train", str(exp), "local", "0", "--set", "data.reader=memcached", "--set", "data.memcached.megabytes=64"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "launch", *words], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (exp / "log.txt").read_text()
    assert "no server 0," in text
    assert text.count("1 rank(s), since the start") == 2, "one at each validation"
    steps = [step for step, _ in log.read_scalars(exp / "events" / log.SCALARS)["memcached_hit_rate"]]
    assert set(steps) <= {2, 4, 6}  # every print_freq; readers that are far ahead have nothing new to say
    assert 2 in steps
    assert text.count('memcached: remark message="hit rate') == len(steps) + 2 + 2, text
    assert wait_for(lambda: not list(tmp_path.glob("zoetrope-*"))), "the server's folders go with the run"
