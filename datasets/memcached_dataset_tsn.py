"""`McTSNDataset`: segments of videos kept as frames, read through memcached. A plain torch data set.

    from datasets.memcached_dataset_tsn import McTSNDataset
    clips = McTSNDataset("data/kinetics400/frames", "train.txt", 8, servers="servers.txt")
    clip, label = clips[0]                 # (8, H, W, 3) uint8, int

Experiments do not need it: `data.reader: memcached` reads the same frames with augmentation, deadlines and resume.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from datasets.memcached_dataset import McRecords
from datasets.plan.order import uniforms
from datasets.plan.sampling import Sampling, test_frames, train_frames, uniforms_needed
from datasets.plan.train import TEMPORAL  # the same seed draws the same frames as a run
from utils.faults import UserError

DENSE_CLIPS = 10


class McTSNDataset(McRecords):
    """Clips of T = num_segments x clip_len frames: item i is (clip, label).

    Args:
        root: folder in front of the paths of the list.
        list_file: `path num_frames label` or another layout that lists may have.
        num_segments: segments of the video.
        clip_len: frames from each.
        mode: "train": frames drawn by `sampling`, anew in each epoch (`set_epoch`); "val": the rule's test frames;
            "dense": those of ten clips one after another.
        servers, template, frame_base, options: see `McRecords`.
        transform: called with the clip, (T, H, W, 3) uint8 RGB; None gives it as a torch tensor.
        encoded: give the T image files as bytes instead, for a decoder elsewhere.
        sampling, frame_interval: as `data.sampling` and `data.frame_interval`.
        seed: of what "train" draws.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        list_file: str | os.PathLike[str],
        num_segments: int = 8,
        clip_len: int = 1,
        mode: Literal["train", "val", "dense"] = "train",
        *,
        servers: Sequence[str] | str | os.PathLike[str] | None = None,
        transform: Callable[[np.ndarray], Any] | None = None,
        encoded: bool = False,
        sampling: str = "seed004",
        frame_interval: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(root, list_file, servers, **options)
        if mode not in ("train", "val", "dense"):
            raise UserError(f"mode is train, val or dense, not {mode!r}")
        self.sampling = Sampling(sampling, num_segments, clip_len, frame_interval)
        self.mode, self.transform, self.encoded, self.seed, self.epoch = mode, transform, encoded, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other frames from now on; call it before the DataLoader starts its workers."""
        self.epoch = epoch

    def frames(self, i: int) -> np.ndarray:
        """(T,) ordinals of the frames that item i shows now."""
        facts = self.reader.probe(i)
        if self.mode == "train":
            u = uniforms(self.seed, self.epoch, i, TEMPORAL, uniforms_needed(self.sampling))
            return np.asarray(train_frames(self.sampling, facts.frames, facts.fps, u)).reshape(-1)
        clips = DENSE_CLIPS if self.mode == "dense" else 1
        return np.asarray(test_frames(self.sampling, facts.frames, facts.fps, clips)).reshape(-1)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        """(clip, label) of record i; MediaError names a file that cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        frames = self.frames(i)
        if self.encoded:
            return self.reader.files(i, frames.tolist()), self.label(i)
        facts = self.reader.probe(i)
        clip = np.empty((len(frames), facts.height, facts.width, 3), np.uint8)
        self.reader.read(i, frames, None, (facts.height, facts.width), clip)
        return (torch.from_numpy(clip) if self.transform is None else self.transform(clip)), self.label(i)
