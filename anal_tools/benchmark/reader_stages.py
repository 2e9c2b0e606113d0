"""Measure one reader for `benchmark data`: its clips in this process, the bare decode of their frames, its loader."""

from __future__ import annotations

import cProfile
import functools
import pstats
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anal_tools.benchmark import data_raw
from datasets.loading import loader as loaders
from datasets.loading.messages import Answer, ReadClip
from datasets.loading.slots import Slot
from datasets.loading.train import TrainLoader
from datasets.loading.workers import ReadHandler, Setup
from datasets.plan.train import train_spec
from utils.errors import UserError

if TYPE_CHECKING:
    from anal_tools.benchmark.common import Figures
    from utils.config import Config

#: {stage: parts of the names under which a profile lists its functions}; the first stage that fits counts.
STAGES = {
    "opening files": ("av.container.core.open", "posix.open", "posix.stat", "posix.close", "posix.listdir"),
    "reading": ("posix.read", "posix.pread", "recv", "sendall", "video_index.py:packets", "demux", "xxhash", "xxh"),
    "decoding": ("'decode' of 'av", "frames.py:decode", "_decode_one", "simplejpeg", "imdecode"),
    "colour": ("to_ndarray", "reformat"),
    "resizing": ("{resize}", "resize.py"),
    "plan": ("order.py", "plan.py", "sampling", "crops.py"),
}
_PROFILED = 16  # clips per round: a profile slows Python down, so these are not among the timed clips


class Bench:
    """Measure one reader with the plan of an experiment.

    Args:
        cfg: a loaded configuration, with the list and the root of this reader's media.
        name: name of the reader.
        folder: folder of its media, for the table.
        clips: how many are timed at most, so that every round takes different ones.
    """

    def __init__(self, cfg: Config, name: str, folder: str, *, clips: int) -> None:
        self.cfg, self.name = cfg.model_copy(update={"data": cfg.data.model_copy(update={"reader": name})}), name
        self.label = f"{name} ({folder})" if folder else name
        self.records = loaders.records_of(self.cfg, "train")
        self.spec = train_spec(cfg)
        self.options = loaders.loader_options(self.cfg)

        # (T, H, W, C) of one clip: the slot must hold it
        shape = (self.spec.sampling.frames_per_clip, self.spec.input_size, self.spec.input_size, 3)

        self.slot = Slot.create("zoetrope-bench", int(np.prod(shape)))
        setup = Setup(self.options.reader, train=self.spec, seed=cfg.seed)
        self.handler: ReadHandler | None = ReadHandler(setup, self.records, [self.slot])

        # Sums over all rounds: CPU seconds of the reader and of the bare decode, clips, stored bytes, bad videos.
        self.next, self.clips = 0, clips
        self.cpu = self.raw_cpu = 0.0
        self.done = self.stored = self.bad = 0
        self.last_failure = ""
        self.profile = cProfile.Profile(time.process_time)  # CPU time, like all figures here

    def close(self) -> None:
        """Close the reader; a second call does nothing."""
        if self.handler is not None:
            self.handler.close()
            self.slot.close()
        self.handler = None

    def round(self, clips: int) -> None:
        """Time `clips` clips, then the bare decode of the same frames, then profile some."""
        import cv2

        threads = cv2.getNumThreads()
        cv2.setNumThreads(0)  # as in a reader process
        try:
            # The reader: CPU time, and the bytes that it read from files.
            first, self.next = self.next, self.next + clips
            before, cpu = bytes_read(), time.process_time()
            answers = [self.ask(position) for position in range(first, first + clips)]
            self.cpu += time.process_time() - cpu
            self.stored += bytes_read() - before

            # The bare decode of the same frames. The two alternate, so that a slower machine slows both.
            good = [answer.plan for answer in answers if answer.plan is not None]
            self.done += len(good)
            raw = functools.partial(data_raw.decode, self.records)
            cpu = time.process_time()
            for plan in good:
                raw(plan.sample, plan.frames.tolist())
            self.raw_cpu += time.process_time() - cpu

            # The profile reads the same clips again: their files are in the page cache, as for the bare decode.
            self.profile.enable()
            for position in range(first, first + min(clips, _PROFILED)):
                self.ask(position)
            self.profile.disable()
        finally:
            cv2.setNumThreads(threads)

    def ask(self, position: int) -> Answer:
        """Read one clip as a reader process does; count a bad video instead of raising its error."""
        assert self.handler is not None
        videos = len(self.records)
        answer = self.handler.answer(position + 1, ReadClip(position % videos, position // videos, position))
        if answer.bug or answer.user:
            raise UserError(f"benchmark data: reader {self.label}: {answer.user or answer.bug}")

        if not answer.ok:
            self.bad += 1
            self.last_failure = f"{answer.path}: {answer.reason}"
        return answer

    def figures(self) -> Figures:
        """Return the figures measured so far."""
        if not self.done:
            raise UserError(f"benchmark data: reader {self.label} could not read a single clip: {self.last_failure}")

        return {
            "reader": self.label,
            "clips": self.done,
            "bad": self.bad,
            "clips_per_cpu_s": round(self.done / self.cpu, 2),
            "raw_clips_per_cpu_s": round(self.done / self.raw_cpu, 2),
            "over_raw": round(self.cpu / self.raw_cpu, 3),
            "mb_per_cpu_s": round(self.stored / 1e6 / self.cpu, 2),
            "kb_per_clip": round(self.stored / 1e3 / self.done, 1),
            "stages": self.stages(),
        }

    def stages(self) -> dict[str, float]:
        """Return each stage's share of the CPU time, by a profile; Python around the stages is the stage "other"."""
        spent = dict.fromkeys([*STAGES, "other"], 0.0)
        table: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = pstats.Stats(self.profile).stats  # pyright: ignore[reportAttributeAccessIssue]
        # the profile's own time of a function, without the functions that it calls
        for (file, _, function), (_, _, self_seconds, _, _) in table.items():
            shown = f"{Path(file).name}:{function}"
            for stage, names in STAGES.items():
                if any(name in shown or name in function for name in names):
                    spent[stage] += self_seconds
                    break
            else:
                spent["other"] += self_seconds

        total = sum(spent.values()) or 1.0
        return {stage: round(seconds / total, 3) for stage, seconds in spent.items()}

    def loader(self, workers: int) -> TrainLoader:
        """Return the training loader of this reader on the CPU, one shard."""
        from utils import dist
        from utils.shards import ShardPlan

        shards = ShardPlan(total=1, batch_size=self.cfg.batch_size, world=1, rank=0, group_size=1)
        cfg = self.cfg.model_copy(update={"workers": workers})
        import torch

        world = dist.World(device=torch.device("cpu"))
        # without a last iteration: the loader may be read for as long as the measurement takes
        lengths = self.cfg.lr_scheduler.model_copy(update={"max_iter": None})
        cfg = cfg.model_copy(update={"lr_scheduler": lengths})
        return loaders.train(cfg, world, shards, records=self.records)


def bytes_read() -> int:
    """Return the bytes that this process has read from files by system calls; reads from sockets do not count."""
    import psutil

    return psutil.Process().io_counters().read_chars
