"""memcached: faults in mid-traffic, the second epoch of a data set larger than its cache, CPU of the client."""

from __future__ import annotations

import functools

import collections
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from datasets.memcached.client import MemcachedPool, ClientSettings
from datasets.memcached.source import MemcachedSource, key_of, route_of
from datasets.memcached.wire import Seal
from datasets.readers.frame_source import FilesSource
from tests.benchmarks.rows import SHARED, run_rows, workspace
from tests.memcached import MISSING, Server

VIDEOS, FRAMES, CLIP = 64, 48, 8
TIMEOUT = 0.25
Truth = dict[str, list[int]]


def chaos(work: Path) -> dict:
    """Every fault in mid-traffic; each frame is compared with the digest of its file."""
    if MISSING:
        return {"measured": f"not measured: {MISSING}", "holds": False}
    work.mkdir(parents=True, exist_ok=True)
    truth = _write_frames(work / "frames")
    servers = [
        Server(work, "s0", megabytes=192),
        *(Server(work, name, tcp=True, megabytes=192) for name in ("s1", "s2")),
    ]
    try:
        return _Chaos(servers, truth).run()
    finally:
        for server in servers:
            server.close()


def _restart(server: Server) -> None:
    assert server.process is not None
    server.process.wait()
    server.start()


class _Chaos:
    def __init__(self, servers: list[Server], truth: Truth) -> None:
        self.servers, self.truth = servers, truth
        self.settings = ClientSettings(tuple(server.name for server in servers), timeout=TIMEOUT)
        self.source = MemcachedSource(FilesSource(), MemcachedPool(self.settings))
        self.seconds: list[float] = []
        self.tally: collections.Counter[str] = collections.Counter()
        self.phases: dict[str, float] = {}
        self.total: collections.Counter[str] = collections.Counter()

    def run(self) -> dict:
        kill, stop, go_on = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
        first, second, _ = self.servers
        self.phase("fill", 16_000)
        self.phase("warm", 8_000)
        self.phase("kill -9 of one", 12_000, (0.2, lambda: first.signal(kill)))
        self.phase("restart", 12_000, (0.2, functools.partial(_restart, first)))
        self.phase("SIGSTOP of one", 12_000, (0.2, lambda: second.signal(stop)))
        self.phase("SIGCONT", 12_000, (0.1, lambda: second.signal(go_on)))
        time.sleep(1.0)
        injected = self.corrupt(300)
        self.phase("corrupted values", 12_000)
        self.children()
        for server in self.servers:
            server.kill()
        self.phase("all dead", 8_000)
        time.sleep(1.0)
        ratio = self.against_disk()
        self.source.pool.take()  # its frames belong to no phase
        for server in self.servers:
            server.start()
        time.sleep(12.0)  # a probe every 10 s at most
        self.phase("all restarted", 12_000)
        seconds = np.array(self.seconds)
        p999, worst = float(np.quantile(seconds, 0.999)), float(seconds.max())
        holds = self.tally["frames"] >= 100_000 and not self.tally["wrong"] and not self.tally["missing"]
        holds &= p999 <= TIMEOUT + 0.05 and worst <= TIMEOUT + 0.25 and ratio <= 1.1
        holds &= self.total["corrupt"] > 0
        measured = {
            "frames": self.tally["frames"], "wrong": self.tally["wrong"], "missing": self.tally["missing"],
            "calls": len(seconds), "p99.9_ms": round(1e3 * p999, 1), "worst_ms": round(1e3 * worst, 1),
            "timeout_ms": 1e3 * TIMEOUT, "all_dead_over_disk": round(ratio, 3), "hit_rate": self.phases,
            "corrupt_injected": injected, "corrupt_found": self.total["corrupt"], "timeouts": self.total["timeouts"],
        }  # fmt: skip
        return {"measured": measured, "holds": bool(holds)}

    def phase(self, name: str, frames: int, event: tuple[float, Callable[[], object]] | None = None) -> None:
        """Read so many frames; meanwhile, after so many seconds, something happens."""
        timer = threading.Timer(*event) if event else None
        if timer:
            timer.start()
        counted, seconds = read_clips(self.source, self.truth, frames, seed=len(self.phases))
        if timer:
            timer.join()
        self.tally.update(counted)
        self.seconds += seconds
        self.source.pool.flush(5)
        counts, _ = self.source.pool.take()
        self.total.update(counts)
        self.phases[name] = round(counts.get("hits", 0) / counts["frames"], 4)

    def corrupt(self, count: int) -> int:
        """Replace stored values by five kinds of wrong ones, behind the pool's back."""
        rng, done = random.Random(5), 0
        state = self.source.pool._state()
        for folder in rng.sample(sorted(self.truth), len(self.truth)):
            route = route_of(folder)
            assert route is not None
            for name in rng.sample(_names(), 6):
                key, other = key_of(route, name), key_of(route, "another")
                payload = Path(folder, name).read_bytes()
                good = Seal().pack(key, payload)
                flipped = bytearray(good)
                flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
                wrong = [bytes(flipped), good[: len(good) // 2], Seal().pack(other, payload), payload, b""][done % 5]
                for server in state.servers:
                    server.filling.set(key, wrong)
                done += 1
                if done >= count:
                    return done
        return done

    def children(self) -> None:
        """Read in two forked processes and a spawned one, all with this process's pool, while it keeps reading."""
        forked = [_fork(lambda seed=seed: read_clips(self.source, self.truth, 6_000, seed)) for seed in (101, 102)]
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        spawned = context.Process(target=_spawned, args=(self.source, self.truth, answers))
        spawned.start()
        self.phase("fork and spawn", 12_000)
        results = [json.loads(os.fdopen(end).read()) for _, end in forked] + [answers.get(timeout=120)]
        for pid, _ in forked:
            os.waitpid(pid, 0)
        spawned.join()
        for counted, seconds in results:
            self.tally.update(counted)
            self.seconds += seconds

    def against_disk(self) -> float:
        """Time with all servers dead over the time of the source below alone; median of pairs."""
        ratios = []
        for round_ in range(21):
            pair = {}
            for name in ("disk", "dead") if round_ % 2 else ("dead", "disk"):
                source = self.source if name == "dead" else self.source.inner
                pair[name] = sum(read_clips(source, self.truth, 2_000, seed=round_, compare=False)[1])
            ratios.append(pair["dead"] / pair["disk"])
        return float(np.median(ratios))


def read_clips(
    source: Any, truth: Truth, frames: int, seed: int, *, compare: bool = True
) -> tuple[dict[str, int], list[float]]:
    """Read random clips; ({frames, wrong, missing}, seconds of each call)."""
    rng, names, seconds = random.Random(seed), _names(), []
    folders, counts = sorted(truth), {"frames": 0, "wrong": 0, "missing": 0}
    for _ in range(-(-frames // CLIP)):
        folder, chosen = rng.choice(folders), rng.sample(range(FRAMES), CLIP)
        began = time.perf_counter()
        got = source.read_many(folder, [names[i] for i in chosen])
        seconds.append(time.perf_counter() - began)
        if compare:
            counts["frames"] += len(chosen)
            counts["missing"] += len(chosen) - len(got)
            counts["wrong"] += sum(
                xxhash.xxh3_64_intdigest(data) != truth[folder][i] for i, data in zip(chosen, got, strict=False)
            )
    return counts, seconds


def _names() -> list[str]:
    return [f"img_{number:05d}.jpg" for number in range(1, FRAMES + 1)]


def _write_frames(folder: Path) -> Truth:
    rng, truth = np.random.default_rng(0), {}
    for video in range(VIDEOS):
        place = folder / f"v{video:03d}"
        place.mkdir(parents=True, exist_ok=True)
        truth[str(place)] = []
        for name in _names():
            data = rng.bytes(int(rng.integers(12_000, 36_000)))
            (place / name).write_bytes(data)
            truth[str(place)].append(xxhash.xxh3_64_intdigest((place / name).read_bytes()))
    return truth


def _fork(work: Callable[[], object]) -> tuple[int, int]:
    """(pid, end of a pipe that gives what `work` returned) of a forked child."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            with os.fdopen(theirs, "w") as out:
                json.dump(work(), out)
        finally:
            os._exit(0)
    os.close(theirs)
    return pid, ours


def _spawned(source: MemcachedSource, truth: Truth, answers: Any) -> None:
    answers.put(read_clips(source, truth, 6_000, 103))


class _Noise:
    """Frames that exist in memory only, as many bytes as a JPEG of 340x256 has."""

    def __init__(self) -> None:
        self.noise = np.random.default_rng(0).bytes(1 << 24)

    def read_many(self, folder: str, names: Sequence[str]) -> list[bytes]:
        """See `FrameSource`."""
        frames = []
        for name in names:
            rng = random.Random(f"{folder}/{name}")
            start = rng.randrange(1 << 23)
            frames.append(self.noise[start : start + max(6_000, int(rng.gauss(25_700, 4_500)))])
        return frames


def epoch2(work: Path, megabytes: int = 512) -> dict:
    """Hit rate of the second epoch; c = memory that the server was given (-m) over bytes of the data set."""
    if MISSING:
        return {"measured": f"not measured: {MISSING}", "holds": False}
    rates = {}
    for ratio in (0.25, 0.5, 0.75, 0.9):
        folder = work / f"c{ratio}"
        server = Server(_new_folder(folder), "s", megabytes=megabytes)
        try:
            pool = MemcachedPool(ClientSettings((server.name,), timeout=5.0))
            inner: Any = _Noise()  # nothing asks it for pixels
            source: Any = MemcachedSource(inner, pool)
            size, videos = 0, []
            while size < megabytes * 2**20 / ratio:
                videos.append(str(_new_folder(folder / f"v{len(videos):05d}")))
                size += sum(map(len, source.inner.read_many(videos[-1], _names())))
            for epoch in range(2):
                random.Random(epoch).shuffle(videos)
                pool.take()
                for number, video in enumerate(videos):
                    source.read_many(video, _names())
                    if number % 4 == 3:
                        pool.flush(30)  # decoding would leave the thread this time
            counts, _ = pool.take()
            evictions = int(pool._state().servers[0].filling.stats()["evictions"])
            c = megabytes * 2**20 / size
            rate = counts["hits"] / counts["frames"]
            rates[f"{c:.3f}"] = {"hit_rate": round(rate, 4), "over_c": round(rate / c, 4), "evictions": evictions}
            pool.close()
        finally:
            server.close()
    holds = all(row["over_c"] >= 0.97 and not row["evictions"] for row in rates.values())
    return {"measured": rates, "holds": holds}


def client_cpu(work: Path) -> dict:
    """CPU of fetching and decoding over decoding alone: real frames of 340x256, one process, one thread, paired."""
    if MISSING:
        return {"measured": f"not measured: {MISSING}", "holds": False}
    folders, figures = _real_frames(work / "real"), {}
    for tcp in (False, True):
        server = Server(work, "cpu", tcp=tcp, megabytes=256)
        source = MemcachedSource(FilesSource(), MemcachedPool(ClientSettings((server.name,), timeout=2.0)))
        try:
            for name, ordinals in (("TSN-8", range(4, 64, 8)), ("32x2", range(0, 64, 2))):
                clips = [(folder, [f"img_{i + 1:05d}.jpg" for i in ordinals]) for folder in folders]
                ratio, size = _decode_ratio(source, clips)
                figures[f"{name} {'tcp' if tcp else 'unix'}"] = {
                    "ratio": round(ratio, 4),
                    "frame_kB": round(size / 1e3, 1),
                }
            counts, _ = source.pool.take()
            figures["errors"] = figures.get("errors", 0) + counts.get("errors", 0) + counts.get("timeouts", 0)
            source.pool.close()
        finally:
            server.close()
    holds = all(row["ratio"] <= 1.10 for row in figures.values() if isinstance(row, dict))
    return {"measured": figures, "holds": holds}


def _decode_ratio(source: MemcachedSource, clips: list[tuple[str, list[str]]]) -> tuple[float, float]:
    """(median over pairs of CPU with fetching over CPU without, bytes of a frame)."""
    import simplejpeg

    kept: list[list[bytes]] = []
    for _ in range(2):
        kept = [source.read_many(*clip) for clip in clips]
        source.pool.flush()
    room, ratios = np.empty(340 * 256 * 3, np.uint8), []

    def cpu(get: Callable[[int], list[bytes]]) -> float:
        began = time.thread_time()
        for _ in range(max(1, 64 // len(kept[0]))):
            for number in range(len(clips)):
                for data in get(number):
                    simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=room)
        return time.thread_time() - began

    for turn in range(14):
        fetch = lambda: cpu(lambda number: source.read_many(*clips[number]))  # noqa: E731
        alone = lambda: cpu(lambda number: kept[number])  # noqa: E731
        first, second = (fetch(), alone()) if turn % 2 else (alone(), fetch())
        ratios.append(first / second if turn % 2 else second / first)
    return float(np.median(ratios[2:])), float(np.mean([len(data) for clip in kept for data in clip]))


def _real_frames(folder: Path) -> list[str]:
    """Eight folders of 64 frames from real videos, 340x256, quality 85."""
    import av
    import cv2
    import simplejpeg
    from av.error import FFmpegError

    folders: list[str] = []
    for video in sorted((SHARED / "single").rglob("*.mp4")):
        place = _new_folder(folder / f"v{len(folders)}")
        try:
            with av.open(str(video)) as container:
                for number, frame in zip(range(64), container.decode(video=0), strict=False):
                    small = cv2.resize(frame.to_ndarray(format="rgb24"), (340, 256), interpolation=cv2.INTER_AREA)
                    (place / f"img_{number + 1:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(small, quality=85))
        except FFmpegError:
            continue
        if len(list(place.iterdir())) == 64:
            folders.append(str(place))
        if len(folders) == 8:
            break
    if not folders:
        raise RuntimeError("no real videos in ../shared/data/single")
    return folders


def _new_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


ROWS = {
    "chaos": (
        "memcached: kill -9, SIGSTOP, restart, all dead, corrupted values, fork and spawn in the middle",
        ">= 100,000 frames, 0 wrong, 0 missing; p99.9 <= timeout + 50 ms, worst <= timeout + 250 ms; all dead <= 1.1x",
        lambda: chaos(workspace()),
    ),
    "epoch2": (
        "second epoch with cache/data-set ratio c under -M",
        "hit rate >= 0.97 c",
        lambda: epoch2(workspace()),
    ),
    "client_cpu": (
        "fetching and decoding / decoding alone, real frames of 340x256, one thread",
        "<= 1.10",
        lambda: client_cpu(workspace()),
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
