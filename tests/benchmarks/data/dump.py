"""`main.py dump`: its speed beside ffmpeg, and kill -9 at 20 moments."""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.rows import ROOT, environment, run_rows, workspace

CORES = 2
ROUNDS = 3
VIDEOS = 8
KILLS = 20
BENCH_VIDEOS = "ZOETROPE_BENCH"  # a folder made by `peers data`


def dump(work: Path) -> dict:
    """The whole verb, start-up included, against one ffmpeg per video, two at a time, on the same cores; A B A B ...

    Both decode the same H.264 files on one thread a process and write a JPEG per frame, at the stored size and scaled
    to a short side of 128. Ratios of CPU seconds; wall seconds are reported too.
    """
    videos = bench_videos(work)
    figures: dict[str, dict[str, float]] = {}
    for case, short_side, scale in (("same size", 0, []), ("to 128", 128, ["-vf", "scale=-2:128"])):
        ratios: dict[str, list[float]] = {"cpu": [], "wall": []}
        for _ in range(ROUNDS):
            ours = timed(our_dump(videos, work / "ours", short_side))
            theirs = timed(their_dump(videos, work / "theirs", scale))
            for kind in ratios:
                ratios[kind].append(theirs[kind] / ours[kind])
            same_frames(work / "ours", work / "theirs")
        figures[case] = {kind: round(statistics.median(values), 2) for kind, values in ratios.items()}
    measured = "ffmpeg's seconds / ours, median of rounds: " + "; ".join(f"{case} {v}" for case, v in figures.items())
    return {"measured": measured, "holds": all(values["cpu"] >= 0.9 for values in figures.values())}


def bench_videos(work: Path) -> list[Path]:
    """The videos of `peers data`, or the real files of ../shared/data where there are none."""
    folder = os.environ.get(BENCH_VIDEOS)
    if folder:
        return sorted((Path(folder) / "videos").glob("*.mp4"))[:VIDEOS]
    single = ROOT.parent / "shared" / "data" / "single" / "mmaction2"
    copies = work / "videos"
    copies.mkdir(parents=True, exist_ok=True)
    for number in range(VIDEOS):
        shutil.copy(single / ("demo.mp4", "test.mp4")[number % 2], copies / f"vid_{number:03d}.mp4")
    return sorted(copies.glob("*.mp4"))


def our_dump(videos: list[Path], out: Path, short_side: int) -> list[str]:
    """The user's command for a fresh folder."""
    shutil.rmtree(out, ignore_errors=True)
    lists = out.parent / "dump.txt"
    lists.write_text("".join(f"{video.name} 0\n" for video in videos))
    argv = ["main.py", "dump", str(lists), str(out), "--as", "frames", "--root", str(videos[0].parent)]
    return [sys.executable, *argv, "--short-side", str(short_side), "--workers", str(CORES)]


def their_dump(videos: list[Path], out: Path, scale: list[str]) -> list[str]:
    """xargs runs one ffmpeg per video, as many at a time as we have workers."""
    shutil.rmtree(out, ignore_errors=True)
    for video in videos:
        (out / video.stem).mkdir(parents=True)
    names = out.parent / "names.txt"
    names.write_text("".join(f"{video.stem}\n" for video in videos))
    convert = ["ffmpeg", "-v", "error", "-threads", "1", "-i", f"{videos[0].parent}/{{}}.mp4", *scale]
    convert += ["-fps_mode", "passthrough", "-threads", "1", "-q:v", "3", f"{out}/{{}}/img_%05d.jpg"]
    return ["xargs", "-a", str(names), "-P", str(CORES), "-I", "{}", *convert]


def timed(argv: list[str]) -> dict[str, float]:
    """Wall and CPU seconds of a command with all its children."""
    started = time.monotonic()
    process = subprocess.Popen(
        argv, cwd=ROOT, env=environment({"OMP_NUM_THREADS": "1"}), stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)} left with {process.returncode}")
    return {"wall": time.monotonic() - started, "cpu": usage.ru_utime + usage.ru_stime}


def same_frames(ours: Path, theirs: Path) -> None:
    """Both have as many images of each video, or the comparison means nothing."""
    for folder in sorted(theirs.iterdir()):
        counts = [len(list((base / folder.name).glob("img_*.jpg"))) for base in (ours, theirs)]
        if counts[0] != counts[1] or not counts[0]:
            raise RuntimeError(f"{folder.name}: ours has {counts[0]} frames, ffmpeg's {counts[1]}")


def dump_kill(work: Path) -> dict:
    """kill -9 of the whole command at 20 moments spread over a dump; then whatever is visible must be whole.

    Every form gets its share of the kills. A video counts as redone when a later start replaced a finished one.
    """
    videos = kill_videos(work)
    partial, redone, finished_videos, kills = [], 0, 0, 0
    for number in range(KILLS):
        form = ("frames", "packs", "clips")[number % 3]
        out = work / f"killed-{form}"
        shutil.rmtree(out, ignore_errors=True)
        process = start(videos, out, form)
        wait_until_finished(process, out, form, videos=number * len(videos) // KILLS)
        time.sleep(random.Random(number).uniform(0.0, 0.15))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.2)  # the workers die with their parent
        finished = visible(out, form)
        finished_videos += len(finished)
        partial += [name for name in finished if not is_whole(out, name, form)]
        if start(videos, out, form).wait() != 0:
            raise RuntimeError(f"the restart of {form} failed")
        after = visible(out, form)
        redone += sum(after.get(name) != inode for name, inode in finished.items())
        partial += [name for name in after if not is_whole(out, name, form)]
        if len(after) != len(videos):
            partial.append(f"{form}: {len(after)} of {len(videos)} after the restart")
    measured = f"{kills} of {KILLS} kills hit a dump at work, {finished_videos} videos were finished by then: "
    measured += f"{len(partial)} partial results visible, {redone} finished videos redone"
    return {"measured": measured, "holds": not partial and redone == 0 and kills >= KILLS - 2 and finished_videos > 0}


def wait_until_finished(process: subprocess.Popen[bytes], out: Path, form: str, *, videos: int) -> None:
    """Until so many videos are visible and a next one is being written, or the command has ended."""
    while process.poll() is None:
        if len(visible(out, form)) >= videos and any((out / ".dump").glob("tmp/*")):
            return
        time.sleep(0.002)


FRAMES = 60


def kill_videos(work: Path) -> list[Path]:
    """Twelve small videos of known length."""
    folder = work / "kill-videos"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(12):
        file = folder / f"v{number:02d}.mp4"
        if not file.exists():
            pattern = f"testsrc2=size=320x240:rate=30:duration={FRAMES / 30}"
            subprocess.run(
                ["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", pattern, "-c:v", "libx264", str(file)], check=True
            )
    return sorted(folder.glob("*.mp4"))


def start(videos: list[Path], out: Path, form: str) -> subprocess.Popen[bytes]:
    """The command in the background."""
    lists = out.parent / "kill.txt"
    lists.write_text("".join(f"{video.name} 0\n" for video in videos))
    argv = ["main.py", "dump", str(lists), str(out), "--as", form, "--root", str(videos[0].parent), "--workers", "2"]
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment({"OMP_NUM_THREADS": "1"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def visible(out: Path, form: str) -> dict[str, int]:
    """Names that a user sees as results, and their inodes."""
    ending = {"frames": "", "packs": ".fsh", "clips": ".mp4"}[form]
    paths = out.iterdir() if out.exists() else []
    results = [path for path in paths if path.name.startswith("v") and path.suffix == ending]
    return {path.name: path.stat().st_ino for path in results}


def is_whole(out: Path, name: str, form: str) -> bool:
    """All frames of a result are there and decode, read by other means than the dump's own record."""
    if form == "clips":
        argv = ["ffprobe", "-v", "error", "-count_frames", "-show_entries", "stream=nb_read_frames", "-of", "csv=p=0"]
        probe = subprocess.run([*argv, str(out / name)], capture_output=True, text=True, check=False)
        return probe.returncode == 0 and probe.stdout.strip().rstrip(",") == str(FRAMES)
    from datasets.readers.frame_source import FilesSource
    from datasets.readers.frames import decode
    from utils.errors import MediaError

    source, folder = FilesSource(), str(out / name)
    try:
        names = [f"img_{number:05d}.jpg" for number in range(1, FRAMES + 1)]
        for data, file in zip(source.read_many(folder, names), names, strict=True):
            decode(data, file)
        return not source.exists(os.path.join(folder, f"img_{FRAMES + 1:05d}.jpg"))
    except MediaError:
        return False


ROWS = {
    "dump": ("dump speed / ffmpeg, same work, same cores", ">= 0.9x", lambda: dump(workspace())),
    "dump_kill": (
        "kill -9 of a dump at 20 moments",
        "no partial result visible; a restart redoes 0 finished videos",
        lambda: dump_kill(workspace()),
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
