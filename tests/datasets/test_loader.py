from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets.lists.records import Records
from datasets.loading.base import LoaderOptions
from datasets.loading.eval import EvalLoader
from datasets.loading.train import Batch, TrainLoader
from datasets.plan.order import Order
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec
from tests.datasets.specs import reader_spec, train_spec
from tests.datasets.videos import frame_image, number_in, records_of, write_video
from utils.errors import UserError
from utils.shards import ShardPlan

SPEC = train_spec(
    Sampling("tsn", 4), input_size=32, colorjitter=(0.2, 0.2, 0.2, 0.1), random_erasing=(0.5, 0.02, 0.4, 0.3)
)
VIEWS = EvalSpec(Sampling("tsn", 4), scale=48, crop_size=32)
OPTIONS = LoaderOptions(reader_spec("video"), workers=0, prefetch=2, on_bad="error")
VIDEOS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    videos = tmp_path_factory.mktemp("videos")
    for i in range(VIDEOS):
        write_video(videos / f"v{i}.mp4", "libx264", 16 + i, options={"g": "8"})
    (videos / "broken.mp4").write_bytes(b"nothing of the kind")
    return videos


@pytest.fixture
def records(folder: Path, tmp_path: Path) -> Records:
    return records_of(tmp_path, [f"v{i}.mp4 {i % 2}" for i in range(VIDEOS)], root=folder)


@pytest.fixture
def with_broken(folder: Path, tmp_path: Path) -> Records:
    """Samples 0 and 3 are broken; the labels are 0 1 0 0 1 2."""
    lines = ["broken.mp4 0", "v1.mp4 1", "v2.mp4 0", "broken.mp4 0", "v4.mp4 1", "v5.mp4 2"]
    return records_of(tmp_path, lines, root=folder)


def shards(batch_size: int = 2, total: int = 2, world: int = 1, rank: int = 0, group_size: int = 1) -> ShardPlan:
    return ShardPlan(total=total, batch_size=batch_size, world=world, rank=rank, group_size=group_size)


def digest(batch: Batch) -> dict[int, str]:
    """Position -> hash of all that belongs to that clip."""
    digests = {}
    for i, position in enumerate(batch.positions):
        parts = [batch.clips[i], batch.labels[i], batch.flip[i], batch.weights[i]]
        parts += [rows[i] for rows in batch.drawn.values()]
        data = b"".join(part.contiguous().numpy().tobytes() for part in parts) + str(batch.samples[i]).encode()
        digests[position] = hashlib.sha256(data).hexdigest()
    return digests


def clips_of(
    records: Records, options: LoaderOptions = OPTIONS, *, start: int = 0, stop: int = 6, **plan: int
) -> dict[int, str]:
    digests: dict[int, str] = {}
    with TrainLoader(records, SPEC, options, seed=5, shards=shards(**plan), start=start, stop=stop) as loader:
        for _, batches in loader:
            for batch in batches:
                digests |= digest(batch)
    return digests


@pytest.mark.system
def test_clips_depend_on_seed_and_position_only(records: Records) -> None:
    expected = clips_of(records)
    assert sorted(expected) == list(range(24))
    assert clips_of(records, dataclasses.replace(OPTIONS, workers=2)) == expected
    assert clips_of(records, dataclasses.replace(OPTIONS, workers=1, prefetch=1)) == expected
    resumed = clips_of(records, start=4)
    assert resumed == {position: expected[position] for position in range(16, 24)}
    ranks = [clips_of(records, world=2, rank=rank) for rank in range(2)]
    assert ranks[0] | ranks[1] == expected
    assert not ranks[0].keys() & ranks[1].keys()


def test_batches_have_the_shapes_and_samples_of_the_order(records: Records) -> None:
    plan = shards(batch_size=2, total=4, world=2, rank=1)
    with TrainLoader(records, SPEC, OPTIONS, seed=5, shards=plan, stop=3) as loader:
        steps = [(step, [batch.shards for batch in batches]) for step, batches in loader]
    assert steps == [(step, list(plan.micro_batches)) for step in range(3)]
    with TrainLoader(records, SPEC, OPTIONS, seed=5, shards=plan, start=2) as loader:
        step, batches = next(loader)
    assert step == 2
    batch = batches[0]
    assert batch.clips.shape == (2, 4, 32, 32, 3)
    assert batch.clips.dtype == torch.uint8
    shapes = {"flip": (2, 1, 1), "colorjitter": (2, 1, 8), "random_erasing": (2, 1, 4)}
    assert {name: tuple(rows.shape) for name, rows in batch.drawn.items()} == shapes
    assert list(batch.drawn) == list(shapes), "in the order of application"
    assert batch.labels.dtype == torch.int64
    assert batch.positions == list(plan.positions(2, batch.shards[0]))
    assert batch.samples == [Order("shuffled", 5, records)(position).sample for position in batch.positions]
    assert batch.labels.tolist() == [sample % 2 for sample in batch.samples]


REPEATED = dataclasses.replace(SPEC, ops=train_spec(SPEC.sampling, 32, randaugment="rand-m7-n4-mstd0.5-inc1").ops)


def views_of(records: Records, options: LoaderOptions = OPTIONS, **more: Any) -> dict[int, tuple[int, bytes]]:
    """Position -> (sample, bytes of the clip) of the first steps of two shards of 4 clips, each video twice."""
    views: dict[int, tuple[int, bytes]] = {}
    plan = shards(batch_size=4, **{name: more.pop(name) for name in ("world", "rank") if name in more})
    more = {"stop": 5, "num_sample": 2} | more
    with TrainLoader(records, REPEATED, options, seed=5, shards=plan, **more) as loader:
        for _, batches in loader:
            for batch in batches:
                rows = zip(batch.positions, batch.samples, batch.clips, strict=True)
                views |= {position: (sample, clip.numpy().tobytes()) for position, sample, clip in rows}
    return views


def test_views_of_a_video_are_those_of_a_reader_that_reads_each_alone(records: Records) -> None:
    """Per sample: turn t is epoch t // 7 of the order; both views show the frames that the first one draws."""
    from datasets.plan.train import draw, resolve
    from datasets.readers import open_reader

    views = views_of(records)
    assert sorted(views) == list(range(40))
    reader, boxes = open_reader(OPTIONS.reader, records), set()
    for position, (sample, clip) in views.items():
        shard, row = divmod(position, 4)
        turn = 2 * shard + row % 2
        assert sample == Order("shuffled", 5, records)(turn).sample
        first = position if row < 2 else position - 2
        drawn = draw(5, turn // VIDEOS, position, REPEATED, frames_of=first)
        plan = resolve(drawn, reader.probe(sample), REPEATED, sample)
        assert np.array_equal(drawn.temporal, draw(5, turn // VIDEOS, first, REPEATED).temporal)
        out = np.empty((4, 32, 32, 3), np.uint8)
        reader.read(sample, plan.frames, plan.box, plan.size, out)
        assert out.tobytes() == clip
        boxes.add((position - first, plan.box))
    assert len(boxes) > 30, "the views differ"
    reader.close()


def test_a_video_is_decoded_once_for_all_its_views(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.readers.video import VideoReader

    reads, original_read = [], VideoReader.read

    def read(self: VideoReader, *args: Any) -> None:
        reads.append(args[0])
        original_read(self, *args)

    monkeypatch.setattr(VideoReader, "read", read)
    whole = views_of(records, dataclasses.replace(OPTIONS, prefetch=1), stop=2)
    assert len(reads) == len(whole) / 2
    monkeypatch.setattr("datasets.loading.workers._WHOLE_BYTES", 1)
    assert views_of(records, dataclasses.replace(OPTIONS, prefetch=1), stop=2) == whole, "frames that are too large"
    assert len(reads) == len(whole) * 3 / 2


@pytest.mark.system
def test_views_depend_on_seed_and_position_only(records: Records) -> None:
    expected = views_of(records)
    assert views_of(records, dataclasses.replace(OPTIONS, workers=2)) == expected
    assert views_of(records, start=3) == {position: expected[position] for position in range(24, 40)}
    ranks = [views_of(records, world=2, rank=rank) for rank in range(2)]
    assert ranks[0] | ranks[1] == expected


def test_all_views_of_a_bad_video_are_its_substitute_or_skipped(with_broken: Records) -> None:
    plan = shards(batch_size=6, total=1)
    for on_bad in ("skip", "substitute"):
        options = dataclasses.replace(OPTIONS, on_bad=on_bad, bad_budget=1.0)
        with TrainLoader(with_broken, SPEC, options, seed=5, shards=plan, stop=4, num_sample=2) as loader:
            for _, (batch,) in loader:
                one, two = batch.samples[:3], batch.samples[3:]
                assert one == two
                for index, sample in enumerate(batch.samples):
                    is_bad = with_broken.path(sample) == "broken.mp4"
                    assert batch.weights[index].item() == (0.0 if is_bad else 1.0)
                    assert bool(batch.clips[index].any()) != is_bad
                    assert on_bad == "skip" or not is_bad
            assert set(loader.ledger.samples) == {0, 3}
            assert all(event.position % 6 < 3 for event in loader.ledger.take_events()), "once for all views"


@pytest.mark.system
def test_clips_stay_as_they_are_until_the_next_step(records: Records) -> None:
    options = dataclasses.replace(OPTIONS, workers=2, prefetch=1)
    with TrainLoader(records, SPEC, options, seed=5, shards=shards(), stop=8) as loader:
        _, batches = next(loader)
        before = batches[0].clips.clone()
        loader.service.answers()  # give the workers time for the next step
        assert torch.equal(batches[0].clips, before)
        last = batches[0].clips
    assert last.sum() > 0  # still readable after the loader was closed


def test_on_bad_error_names_the_file(with_broken: Records) -> None:
    with pytest.raises(UserError, match=r"broken.mp4: .*data.on_bad"):
        clips_of(with_broken)


def test_on_bad_skip_keeps_the_place_with_weight_zero(with_broken: Records) -> None:
    options = dataclasses.replace(OPTIONS, on_bad="skip", bad_budget=0.5)
    with TrainLoader(with_broken, SPEC, options, seed=5, shards=shards(3, 2), stop=2) as loader:
        for _, batches in loader:
            for batch in batches:
                bad = [sample in (0, 3) for sample in batch.samples]
                assert batch.weights.tolist() == [0.0 if is_bad else 1.0 for is_bad in bad]
                assert [bool(clip.any()) for clip in batch.clips] == [not is_bad for is_bad in bad]
        assert set(loader.ledger.samples) == {0, 3}
        assert len(loader.ledger.samples[0]) == 2
        events = loader.ledger.take_events()
        assert [event.new for event in events] == [True, True, False, False]
        assert "weight 0" in str(events[0])
        assert loader.ledger.take_events() == []
        assert "2 bad: broken.mp4" in loader.ledger.summary()


@pytest.mark.system
@pytest.mark.parametrize("workers", [0, 2])
def test_substitute_is_the_next_of_the_label_with_the_same_draws(with_broken: Records, workers: int) -> None:
    options = dataclasses.replace(OPTIONS, on_bad="substitute", bad_budget=0.5, workers=workers)
    with TrainLoader(with_broken, SPEC, options, seed=5, shards=shards(3, 2), stop=1) as loader:
        _, batches = next(loader)
        shown = {
            position: (sample, int(label), float(weight))
            for batch in batches
            for position, sample, label, weight in zip(
                batch.positions, batch.samples, batch.labels, batch.weights, strict=True
            )
        }
        for position, (sample, label, weight) in shown.items():
            due = Order("shuffled", 5, with_broken)(position).sample
            assert sample == {0: 2, 3: 2}.get(due, due)
            assert (label, weight) == (int(with_broken.labels[due]), 1.0)


def test_a_label_without_a_readable_sample_is_skipped(folder: Path, tmp_path: Path) -> None:
    lines = ["broken.mp4 0", "v1.mp4 1", "broken.mp4 0", "v2.mp4 2"]
    records = records_of(tmp_path, lines, root=folder)
    options = dataclasses.replace(OPTIONS, on_bad="substitute", bad_budget=0.5)
    with TrainLoader(records, SPEC, options, seed=5, shards=shards(2, 2), stop=1) as loader:
        _, batches = next(loader)
        assert sorted(float(w) for batch in batches for w in batch.weights) == [0, 0, 1, 1]
        assert {sample for batch in batches for sample in batch.samples} == {0, 1, 2, 3}


def test_above_the_budget_the_run_stops_and_names_the_worst(with_broken: Records) -> None:
    with pytest.raises(UserError, match=r"2 of 6 videos .*data.bad_budget allows 1: .*broken.mp4"):
        clips_of(with_broken, dataclasses.replace(OPTIONS, on_bad="skip", bad_budget=0.01))


def test_a_journalled_time_out_fails_again_without_being_read(records: Records) -> None:
    options = dataclasses.replace(OPTIONS, on_bad="substitute", bad_budget=0.5)
    first = Order("shuffled", 5, records)(0).sample
    with TrainLoader(records, SPEC, options, seed=5, shards=shards(), stop=1, replay=[(0, first)]) as loader:
        _, batches = next(loader)
        assert batches[0].samples[0] != first
        assert batches[0].samples[0] % 2 == first % 2
        event = loader.ledger.take_events()[0]
        assert (event.position, event.sample, event.timeout) == (0, first, True)


@pytest.mark.system
def test_evaluation_gives_each_video_once_and_equal_rounds(records: Records, folder: Path, tmp_path: Path) -> None:
    for world in (1, 2, 3):
        seen: list[int] = []
        rounds = set()
        for rank in range(world):
            options = dataclasses.replace(OPTIONS, workers=rank % 2)
            with EvalLoader(records, VIEWS, options, rank=rank, world=world) as loader:
                items = 0
                for item in loader:
                    items += 1
                    if item.sample < 0:
                        assert item.frames is None
                        continue
                    seen.append(item.sample)
                    assert item.label == item.sample % 2
                    assert item.frames is not None
                    assert item.plan is not None
                    assert [number_in(frame.numpy()) for frame in item.frames] == item.plan.frames.tolist()
                rounds.add(items)
        assert sorted(seen) == list(range(VIDEOS))
        assert len(rounds) == 1


def test_evaluation_reports_a_failure_and_goes_on(with_broken: Records) -> None:
    with EvalLoader(with_broken, VIEWS, dataclasses.replace(OPTIONS, on_bad="skip")) as loader:
        items = list(loader)
    assert [item.sample for item in items] == list(range(6))
    assert [item.failure is not None for item in items] == [True, False, False, True, False, False]
    assert "broken.mp4" in str(items[0].failure)
    assert items[0].label == 0


def test_images_and_frame_folders_go_through_the_same_path(tmp_path: Path) -> None:
    import cv2

    for i in range(3):
        cv2.imwrite(str(tmp_path / f"p{i}.png"), frame_image(i)[..., ::-1])
    records = records_of(tmp_path, [f"p{i}.png {i}" for i in range(3)])
    spec = train_spec(Sampling("tsn", 1), input_size=96, crop="centre", flip=False)
    options = dataclasses.replace(OPTIONS, reader=reader_spec("frames"))
    with TrainLoader(records, spec, options, seed=0, shards=shards(3, 1), stop=1) as loader:
        _, batches = next(loader)
        assert [number_in(clip[0].numpy()) for clip in batches[0].clips] == batches[0].labels.tolist()


@pytest.mark.system
def test_waiting_is_measured_and_nothing_stays_open(records: Records) -> None:
    records.share()
    before = set(os.listdir("/proc/self/fd"))
    loader = TrainLoader(records, SPEC, dataclasses.replace(OPTIONS, workers=1), seed=5, shards=shards())
    next(loader)
    assert loader.seconds_waiting > 0
    loader.close()
    loader.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_bugs_are_not_taken_for_bad_media(records: Records) -> None:
    spec = dataclasses.replace(SPEC, crop="centre")
    loader = TrainLoader(records, spec, OPTIONS, seed=5, shards=shards(), stop=1)
    service: Any = loader.service
    service._handler.reader.read = None
    with loader, pytest.raises(RuntimeError, match="not the file's fault"):
        next(loader)


@pytest.mark.system
def test_build_follows_the_configuration(records: Records) -> None:
    from types import SimpleNamespace as Space

    from datasets.loading import loader
    from utils.dist import World

    augmentation = Space(
        input_size=32, test_resize=48, crop="random_resized", scales=(1.0,), max_distort=1, more_fix_crop=True,
        area=(0.5, 1.0), aspect=(0.75, 1.33), colorjitter=None, colorjitter_per_frame=False, random_erasing=None,
        random_erasing_per_frame=False, randaugment=None,
    )  # fmt: skip
    data = Space(
        reader="video", template="auto", frame_base="auto", sampling="tsn", clip_len=1, frame_interval=1,
        on_bad="skip", bad_budget=0.1, missing_share=0.05, flip=True, deadline_seconds=20.0, prefetch=2,
        list_layout="auto", order="class_balanced", metadata=None, num_sample=1,
    )  # fmt: skip
    cfg: Any = Space(
        augmentation=augmentation, data=data, workers=1, seed=3, val_dense=True, loss="ce",
        model=Space(num_segments=4, num_class=2),
        lr_scheduler=Space(max_iter=2), train_source=records.list_file, train_root=records.root,
        val_source=records.list_file, val_root=records.root,
    )  # fmt: skip
    with loader.train(cfg, World(), shards()) as train:
        steps = list(train)
    assert [step for step, _ in steps] == [0, 1]
    assert list(steps[0][1][0].drawn) == ["flip"]
    labels = [label for _, batches in steps for batch in batches for label in batch.labels.tolist()]
    assert all({first, second} == {0, 1} for first, second in zip(labels[::2], labels[1::2], strict=True)), "balanced"
    with loader.val(cfg, World()) as val:
        items = list(val)
    assert len(items) == VIDEOS
    assert items[0].plan is not None
    assert np.shape(items[0].plan.boxes) == (10, 4)


def test_the_defaults_of_reading_are_those_of_the_config() -> None:
    from utils.config.schema import Data

    options, data = LoaderOptions(reader_spec("video")), Data()
    given = (options.deadline, options.on_bad, options.bad_budget, options.prefetch)
    assert given == (data.deadline_seconds, data.on_bad, data.bad_budget, data.prefetch)


def test_a_missing_video_is_reported_with_its_full_path(folder: Path, tmp_path: Path) -> None:
    records = records_of(tmp_path, ["broken.mp4 0", "gone.mp4 1", "v1.mp4 1"], root=folder)
    with EvalLoader(records, VIEWS, dataclasses.replace(OPTIONS, on_bad="skip")) as loader:
        failures = [item.failure for item in loader]
    assert f"(there is no {folder}/gone.mp4)" in str(failures[1])
    assert "there is no" not in str(failures[0]), "this one exists and is broken"
    assert failures[2] is None
