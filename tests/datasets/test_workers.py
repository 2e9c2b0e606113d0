from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datasets.lists.records import Records
from datasets.loading.messages import Answer, ReadClip, ReadVideo
from datasets.loading.pool import Inline, Pool, Service
from datasets.loading.slots import Slot
from datasets.loading.workers import Setup
from datasets.plan.sampling import Sampling
from datasets.plan.train import Plan, TrainSpec
from datasets.plan.views import EvalSpec, VideoPlan
from tests.datasets.specs import reader_spec, train_spec
from tests.datasets.videos import number_in, records_of, write_video
from utils.errors import UserError

SPEC = train_spec(
    Sampling("tsn", 4), input_size=32, colorjitter=(0.2, 0.2, 0.2, 0.1), random_erasing=(0.5, 0.02, 0.4, 0.3)
)
CLIP = (4, 32, 32, 3)
BYTES = int(np.prod(CLIP))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        write_video(folder / f"v{i}.mp4", "libx264", 20 + i, options={"g": "8"})
    return folder


def setup_of(spec: TrainSpec = SPEC, views: EvalSpec | None = None) -> Setup:
    return Setup(reader_spec("video"), train=spec, eval=views, seed=7)


def request(number: int, sample: int, *, offset: int = 0) -> tuple[int, ReadClip]:
    return number, ReadClip(sample, 0, number, 0, offset)


def collect(service: Service, count: int) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}
    while len(answers) < count:
        answers |= {answer.id: answer for answer in service.answers()}
    return answers


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def records(videos: Path, tmp_path: Path) -> Records:
    return records_of(tmp_path, [f"v{i}.mp4 {i % 2}" for i in range(4)], root=videos)


def test_pool_and_inline_give_the_same_clips_and_plans(records: Records) -> None:
    slots = [[Slot.create("test", 12 * BYTES)] for _ in range(2)]
    services = [Pool(setup_of(), records, slots[0], 2, 30), Inline(setup_of(), records, slots[1])]
    try:
        results = []
        for service in services:
            for number in range(1, 13):
                service.submit(*request(number, number % 4, offset=(number - 1) * BYTES))
            results.append(collect(service, 12))
        for number in range(1, 13):
            assert values_of(results[0][number]) == values_of(results[1][number])
        clips = [slot[0].view(0, (12, *CLIP)) for slot in slots]
        assert clips[0].any()
        assert np.array_equal(clips[0], clips[1])
    finally:
        for service in services:
            service.close()
        for slot in slots:
            slot[0].close()


def values_of(answer: Answer) -> list:
    """All that an answer says, as plain values: every bit of a float counts."""
    plan = answer.plan
    assert isinstance(plan, Plan)
    rows = {name: row.tolist() for name, row in plan.ops.items()}
    assert list(rows) == ["flip", "colorjitter", "random_erasing"]
    return [dataclasses.replace(answer, plan=None).__dict__, plan.sample, plan.frames.tolist(), plan.box, rows]


def test_evaluation_grows_the_slot_on_both_sides(records: Records) -> None:
    slot = Slot.create("test", 0)
    views = EvalSpec(Sampling("tsn", 4), num_clips=1, crops="centre", scale=48, crop_size=32)
    pool = Pool(setup_of(views=views), records, [slot], 1, 30)
    try:
        pool.submit(1, ReadVideo(3))
        plan = collect(pool, 1)[1].plan
        assert isinstance(plan, VideoPlan)
        frames = slot.view(0, (len(plan.frames), *plan.size, 3))
        assert plan.size == (48, 48)
        assert [number_in(image) for image in frames] == plan.frames.tolist()
    finally:
        pool.close()
        slot.close()


def test_workers_have_no_torch_and_ignore_job_signals(records: Records) -> None:
    code = "import sys, datasets.loading.workers, datasets.readers.video, datasets.readers.frames, datasets.dump.video"
    code += "\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    slot = Slot.create("test", BYTES)
    pool = Pool(setup_of(), records, [slot], 2, 30)
    try:
        pids = pool.pids
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            for pid in pids:
                os.kill(pid, number)
        pool.submit(*request(1, 0))
        assert collect(pool, 1)[1].ok
        assert pool.pids == pids
        assert pool.restarts == 0
        for pid in pids:
            assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    finally:
        pool.close()
        slot.close()


def stop_in_a_request(pool: Pool, number: int) -> int:
    """Freeze the worker that has taken a request, as a hanging decoder would; gives its pid."""
    stopped = []

    def caught() -> bool:
        for worker in pool._workers:
            if worker.busy_with()[0] == number:
                os.kill(worker.process.pid, signal.SIGSTOP)
                if worker.busy_with()[0] == number:
                    stopped.append(worker.process.pid)
                    return True
                os.kill(worker.process.pid, signal.SIGCONT)
        return False

    end = time.monotonic() + 20
    while not caught():
        assert time.monotonic() < end
    return stopped[0]


@pytest.fixture
def slow_records(tmp_path: Path) -> Records:
    """One long video that takes a while to read, and a short one."""
    write_video(tmp_path / "long.ts", "mpeg2video", 1500)
    write_video(tmp_path / "short.mp4", "libx264", 10)
    return records_of(tmp_path, ["long.ts 0", "short.mp4 1"])


def test_late_worker_is_killed_and_the_others_requests_go_on(slow_records: Records) -> None:
    slot = Slot.create("test", 4 * BYTES)
    pool = Pool(setup_of(), slow_records, [slot], 1, 1.0)
    try:
        pool.submit(*request(1, 0))
        for number in (2, 3):
            pool.submit(*request(number, 1, offset=number * BYTES))
        pid = stop_in_a_request(pool, 1)
        answers = collect(pool, 3)
        assert answers[1].reason == "took longer than 1 s"
        assert answers[1].timeout
        assert answers[2].ok
        assert answers[3].ok
        assert pool.restarts == 1
        assert not alive(pid)
    finally:
        pool.close()
        slot.close()


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_worker_that_dies_gets_its_request_tried_once_more(slow_records: Records, crashes: int) -> None:
    slot = Slot.create("test", BYTES)
    pool = Pool(setup_of(), slow_records, [slot], 1, 60)
    try:
        pool.submit(*request(1, 0))
        for _ in range(crashes):
            os.kill(stop_in_a_request(pool, 1), signal.SIGKILL)
            wait_for(lambda: pool._workers[0].process.poll() is not None)
            if crashes == 2 and pool.restarts == 0:
                assert pool._check(pool._workers[0]) == []
                pool._send()
        answer = collect(pool, 1)[1]
        assert answer.ok == (crashes == 1)
        if crashes == 2:
            assert answer.reason == "reading it ended the reader process twice (ended by SIGKILL)"
            assert answer.crashed
    finally:
        pool.close()
        slot.close()


def test_closing_is_prompt_and_leaves_nothing(records: Records) -> None:
    records.share()
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    slot = Slot.create("test", 64 * BYTES)
    pool = Pool(setup_of(), records, [slot], 2, 30)
    for number in range(1, 60):
        pool.submit(*request(number, number % 4, offset=number * BYTES))
    collect(pool, 3)
    pids, began = pool.pids, time.monotonic()
    pool.close()
    slot.close()
    assert time.monotonic() - began < 1
    assert not any(alive(pid) for pid in pids)
    assert set(os.listdir("/proc/self/fd")) == before


def test_no_orphans_after_the_parent_was_killed(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("v0.mp4 0\n")
    code = f"""
import sys, time
from datasets.loading.pool import Pool
from datasets.lists.records import Records
from datasets.loading.slots import Slot
from tests.datasets.test_workers import request, setup_of
records = Records.load({str(tmp_path / "l.txt")!r}, {str(videos)!r}, num_class=None)
pool = Pool(setup_of(), records, [Slot.create("test", {BYTES})], 2, 30)
pool.submit(*request(1, 0))
pool.answers()
print(*pool.pids, flush=True)
time.sleep(60)
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids)
        parent.kill()
    wait_for(lambda: not any(alive(pid) for pid in pids))


def test_relative_paths_mean_the_parents_folder(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (videos / "l.txt").write_text("v0.mp4 0\n")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("raise ImportError('the wrong datasets')")
    monkeypatch.chdir(tmp_path)
    slot = Slot.create("test", BYTES)
    records = Records.load("../" + os.path.relpath(videos / "l.txt", tmp_path.parent), videos, num_class=None)
    pool = Pool(setup_of(), records, [slot], 1, 30)
    try:
        pool.submit(*request(1, 0))
        assert collect(pool, 1)[1].ok
    finally:
        pool.close()
        slot.close()


def no_worker_starts(monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    """Let every worker that is started from now on be another program."""
    monkeypatch.setattr(sys, "executable", python)


@pytest.mark.parametrize(
    ("python", "why"), [("/bin/false", "exit code 1"), ("/nowhere/python", "No such file or directory")]
)
def test_readers_that_do_not_start_are_stood_in_for_and_reported(
    records: Records, monkeypatch: pytest.MonkeyPatch, python: str, why: str
) -> None:
    slots = [[Slot.create("test", 4 * BYTES)] for _ in range(2)]
    inline = Inline(setup_of(), records, slots[0])
    no_worker_starts(monkeypatch, python)
    pool = Pool(setup_of(), records, slots[1], 2, 30, stand_in=True)
    try:
        for service in (inline, pool):
            for number in range(1, 5):
                service.submit(*request(number, number - 1, offset=(number - 1) * BYTES))
            assert all(answer.ok for answer in collect(service, 4).values())
        assert pool.trouble == f"reader processes that do not start (3 in a row, the last: {why})"
        assert pool.pids == []
        first, second = (slot[0].view(0, (4, *CLIP)) for slot in slots)
        assert np.array_equal(first, second), "the same pixels"
    finally:
        pool.close()
        inline.close()
        for slot in slots:
            slot[0].close()


def test_readers_that_do_not_start_end_a_scan_with_a_sentence(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_worker_starts(monkeypatch, "/bin/false")
    slot = Slot.create("test", BYTES)
    pool = Pool(setup_of(), records, [slot], 1, 30)
    try:
        pool.submit(*request(1, 0))
        with pytest.raises(UserError, match=r"processes that do not start \(3 in a row.* doctor.* run the same"):
            pool.answers()
    finally:
        pool.close()
        slot.close()


def test_a_reader_that_gets_stuck_while_starting_is_dropped_and_the_other_goes_on(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = Slot.create("test", 8 * BYTES)
    pool = Pool(setup_of(), records, [slot], 2, 30, stand_in=True)
    try:
        stuck = pool.pids[0]
        os.kill(stuck, signal.SIGSTOP)
        monkeypatch.setattr("datasets.loading.pool._START_SECONDS", 3.0)
        for number in range(1, 9):
            pool.submit(*request(number, number % 4, offset=(number - 1) * BYTES))
        assert all(answer.ok for answer in collect(pool, 8).values())
        wait_for(lambda: pool._check(pool._workers[0]) == [] and stuck not in pool.pids)
        assert pool.trouble == f"reader processes that do not start (process {stuck} was not ready after 3 s)"
        pool.submit(*request(9, 0))
        assert collect(pool, 1)[9].ok
        assert not alive(stuck)
    finally:
        pool.close()
        slot.close()


def test_readers_outlive_the_thread_that_made_the_pool(records: Records) -> None:
    """The kernel sends the signal of a parent's death when the *thread* ends that forked."""
    slot = Slot.create("test", BYTES)
    pools: list[Pool] = []
    maker = threading.Thread(target=lambda: pools.append(Pool(setup_of(), records, [slot], 2, 30)))
    maker.start()
    maker.join()
    (pool,) = pools
    try:
        pool.submit(*request(1, 0))
        assert collect(pool, 1)[1].ok
        time.sleep(0.2)
        assert all(alive(pid) for pid in pool.pids)
        assert pool.restarts == 0
    finally:
        pool.close()
        slot.close()
