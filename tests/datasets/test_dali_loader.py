"""The loaders of the reader `dali` on the CPU beside those of the reader `video`: same plans, same policies."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from datasets.lists.records import Records
from datasets.loading.base import LoaderOptions
from datasets.loading.eval import EvalLoader
from datasets.loading.pool import Pool
from datasets.loading.train import Batch, TrainLoader
from datasets.plan.order import Order
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec
from tests.datasets.specs import reader_spec, train_spec
from tests.datasets.videos import frame_image, number_in, records_of, write_video
from utils.errors import UserError
from utils.shards import ShardPlan

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[dali]')")

from datasets.dali.loader import DaliEvalLoader, DaliTrainLoader  # noqa: E402

SPEC = train_spec(
    Sampling("tsn", 4), input_size=32, colorjitter=(0.2, 0.2, 0.2, 0.1), random_erasing=(0.5, 0.02, 0.4, 0.3)
)
VIEWS = EvalSpec(Sampling("tsn", 4), scale=48, crop_size=32)
OPTIONS = LoaderOptions(reader_spec("video"), workers=0, prefetch=2, on_bad="error")
VIDEOS = 6
FIELDS = ("labels", "weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VP9 files v0..v5, an H.264 file, which DALI's CPU build does not read, a damaged one, JPEG frames, no video."""
    from tests.datasets.specs import build_index

    videos = tmp_path_factory.mktemp("videos")
    for i in range(VIDEOS):
        write_video(videos / f"v{i}.mp4", "libvpx-vp9", 16 + i, options={"g": "8", "cpu-used": "8"})
    write_video(videos / "h264.mp4", "libx264", 20)
    data = bytearray((videos / "v5.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    size = int(build_index(str(videos / "v5.mp4"), "v5.mp4").sizes[:8].sum())
    data[start + size : -1200] = b"\xff" * (len(data) - 1200 - start - size)
    (videos / "damaged.mp4").write_bytes(data)
    (videos / "broken.mp4").write_bytes(b"nothing of the kind")
    (videos / "jpeg").mkdir()
    for number in range(12):
        (videos / "jpeg" / f"img_{number + 1:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(frame_image(number)))
    return videos


@pytest.fixture
def records(folder: Path, tmp_path: Path) -> Records:
    return records_of(tmp_path, [f"v{i}.mp4 {i % 2}" for i in range(VIDEOS)], root=folder)


def shards(batch_size: int = 2, total: int = 2, world: int = 1, rank: int = 0) -> ShardPlan:
    return ShardPlan(total=total, batch_size=batch_size, world=world, rank=rank, group_size=1)


def collect(loader: TrainLoader) -> dict[int, tuple[Batch, int]]:
    """Position -> (its batch, row), with clips that stay valid."""
    clips = {}
    with loader:
        for _, batches in loader:
            for batch in batches:
                kept = dataclasses.replace(batch, clips=batch.clips.clone())
                clips |= {position: (kept, row) for row, position in enumerate(batch.positions)}
    return clips


def train(
    kind: type[TrainLoader],
    records: Records,
    options: LoaderOptions = OPTIONS,
    *,
    start: int = 0,
    stop: int = 4,
    **plan,
):
    return collect(kind(records, SPEC, options, seed=5, shards=shards(**plan), start=start, stop=stop))


def assert_same(one: dict[int, tuple[Batch, int]], other: dict[int, tuple[Batch, int]], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for position, (batch, row) in one.items():
        reference, at = other[position]
        assert batch.samples[row] == reference.samples[at]
        for name in FIELDS:
            assert torch.equal(getattr(batch, name)[row], getattr(reference, name)[at]), name
        assert list(batch.drawn) == list(reference.drawn) != []
        for name, rows in batch.drawn.items():
            assert torch.equal(rows[row], reference.drawn[name][at]), name
        difference = (batch.clips[row].int() - reference.clips[at].int()).abs().float()
        assert difference.mean() <= tolerance


def test_same_clips_as_the_video_reader_at_any_layout(records: Records) -> None:
    loader = DaliTrainLoader(records, SPEC, OPTIONS, seed=5, shards=shards(), stop=4)
    expected = collect(loader)
    assert not loader.fallbacks
    assert_same(expected, train(TrainLoader, records), tolerance=4.0)
    assert_same(train(DaliTrainLoader, records, dataclasses.replace(OPTIONS, workers=2)), expected)
    resumed = train(DaliTrainLoader, records, start=2)
    assert_same(resumed, {position: expected[position] for position in range(8, 16)})
    ranks = [train(DaliTrainLoader, records, world=2, rank=rank) for rank in range(2)]
    assert_same(ranks[0] | ranks[1], expected)


def test_forms_and_fallbacks_share_a_batch(folder: Path, tmp_path: Path) -> None:
    names = ["v1.mp4", "jpeg", "h264.mp4", "v2.mp4"]
    records = records_of(tmp_path, [f"{name} {i}" for i, name in enumerate(names)], root=folder)
    spec = train_spec(Sampling("tsn", 4), input_size=96, crop="centre", flip=False)
    with DaliTrainLoader(records, spec, OPTIONS, seed=1, shards=shards(4, 1), stop=3) as loader:
        for _, batches in loader:
            assert sorted(batches[0].samples) == [0, 1, 2, 3]
            for clip in batches[0].clips.numpy():
                numbers = [number_in(image) for image in clip]
                assert numbers == sorted(set(numbers))
        assert loader.fallbacks == {"the codec h264 is not decoded there": 3}
        notes = loader.notes()
        assert len(notes) == 1
        assert "h264.mp4" in notes[0]
        assert loader.notes() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_cost_their_sample_and_are_told_as_elsewhere(folder: Path, tmp_path: Path, workers: int) -> None:
    names = ["damaged.mp4 0", "v1.mp4 1", "v2.mp4 0", "broken.mp4 0", "v4.mp4 1", "h264.mp4 2"]
    records = records_of(tmp_path, names, root=folder)
    for policy in ("substitute", "skip"):
        options = dataclasses.replace(OPTIONS, on_bad=policy, bad_budget=0.5, workers=workers)
        reports, clips = [], []
        for kind in (DaliTrainLoader, TrainLoader):
            loader = kind(records, SPEC, options, seed=5, shards=shards(3, 2), stop=2)
            clips.append(collect(loader))
            events = loader.ledger.take_events()
            reports.append(sorted((e.position, e.sample, e.path, e.reason, e.action) for e in events))
        assert_same(*clips, tolerance=4.0)
        assert reports[0] == reports[1]
        assert {sample for _, sample, *_ in reports[0]} == {0, 3}
    with pytest.raises(UserError, match="data.on_bad"):
        train(DaliTrainLoader, records, dataclasses.replace(OPTIONS, workers=workers), batch_size=3)


def test_a_journalled_time_out_fails_again_without_being_read(records: Records) -> None:
    options = dataclasses.replace(OPTIONS, on_bad="substitute", bad_budget=0.5)
    first = Order("shuffled", 5, records)(0).sample
    with DaliTrainLoader(records, SPEC, options, seed=5, shards=shards(), stop=1, replay=[(0, first)]) as loader:
        _, batches = next(loader)
        assert batches[0].samples[0] != first
        assert loader.ledger.take_events()[0].timeout


def test_evaluation_gives_each_video_once_with_its_frames(folder: Path, tmp_path: Path) -> None:
    names = ["v0.mp4", "damaged.mp4", "h264.mp4", "jpeg", "broken.mp4", "v3.mp4"]
    records = records_of(tmp_path, [f"{name} {i}" for i, name in enumerate(names)], root=folder)
    for workers in (0, 2):
        options = dataclasses.replace(OPTIONS, on_bad="skip", workers=workers)
        with (
            DaliEvalLoader(records, VIEWS, options) as ours,
            EvalLoader(records, VIEWS, dataclasses.replace(options, reader=reader_spec("encoded"))) as theirs,
        ):
            for item, other in zip(ours, theirs, strict=True):
                assert (item.sample, item.label, item.failure) == (other.sample, other.label, other.failure)
                if other.frames is None:
                    continue
                assert item.frames is not None
                assert item.plan is not None
                assert item.frames.shape == (len(item.plan.frames), *item.plan.size, 3)
                assert [number_in(frame.numpy()) for frame in item.frames] == item.plan.frames.tolist()
            assert sum(ours.fallbacks.values()) == 1


def test_a_damaged_video_is_repaired_in_an_evaluation_as_elsewhere(folder: Path, tmp_path: Path) -> None:
    records = records_of(tmp_path, ["damaged.mp4 0", "v1.mp4 1"], root=folder)
    views = EvalSpec(Sampling("tsn", 8), scale=48, crop_size=32)
    items = []
    for kind in (DaliEvalLoader, EvalLoader):
        options = dataclasses.replace(OPTIONS, on_bad="substitute")
        with kind(records, views, options) as loader:
            item = next(loader)
            items.append((item.failure, item.repaired, None if item.plan is None else item.plan.frames.tolist()))
    assert items[0] == items[1]
    assert items[0][0] or items[0][1]


def test_signals_of_a_job_do_not_end_reader_processes(records: Records) -> None:
    options = dataclasses.replace(OPTIONS, workers=2)
    with DaliTrainLoader(records, SPEC, options, seed=5, shards=shards(), stop=6) as loader:
        next(loader)
        assert isinstance(loader.service, Pool)
        for pid in loader.service.pids:
            for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
                os.kill(pid, number)
        assert [step for step, _ in loader] == [1, 2, 3, 4, 5]
        assert loader.service.restarts == 0


def test_build_takes_the_loaders_of_the_reader() -> None:
    from datasets.loading.loader import loaders

    assert loaders("dali") == (DaliTrainLoader, DaliEvalLoader)
    assert loaders("video") == (TrainLoader, EvalLoader)
    assert np.all([issubclass(ours, theirs) for ours, theirs in zip(loaders("dali"), loaders("video"), strict=True)])
