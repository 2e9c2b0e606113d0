"""Provide `McTSNDataset`: segments of videos kept as frames, read through memcached. A plain torch data set.

    from datasets.memcached_dataset_tsn import McTSNDataset
    clips = McTSNDataset("data/kinetics400/frames", "train.txt", 8, servers="servers.txt")
    clip, label = clips[0]                 # (8, H, W, 3) uint8, int

It is for notebooks: experiments read the same frames with `data.reader: memcached`, augmentation and resume.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np

from datasets.memcached_dataset import McRecords
from datasets.plan.order import uniforms
from datasets.plan.sampling import Sampling, test_frames, train_frames
from datasets.plan.train import TEMPORAL  # the same seed draws the same frames as a run
from utils import renamed
from utils.errors import UserError

CLIPS = {"train": 1, "val": 1, "dense": 10}  # mode -> clips of a video


class McTSNDataset(McRecords):
    """Clips of T = num_segments x clip_len frames: item i is (clip (T, H, W, 3) or T files, label).

    Args:
        root: folder that the paths of the list are relative to.
        list_file: `path num_frames label` or another supported layout.
        num_segments: segments of the video.
        clip_len: frames per segment.
        mode: "train": frames drawn by `sampling`, different in each epoch (`set_epoch`); "val": the preset's test
            frames; "dense": those of ten clips one after another.
        sampling, frame_interval: as `data.sampling` and `data.frame_interval`.
        seed: of the draws of "train".
        more: see `McRecords`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        list_file: str | os.PathLike[str],
        num_segments: int = 8,
        clip_len: int = 1,
        mode: Literal["train", "val", "dense"] = "train",
        *,
        sampling: str = "one_per_segment",
        frame_interval: int = 1,
        seed: int = 0,
        **more: Any,
    ) -> None:
        super().__init__(root, list_file, **more)
        if mode not in CLIPS:
            raise UserError(f"mode must be one of {', '.join(CLIPS)}, not {mode!r}")

        self.sampling = Sampling(
            str(renamed.of_value("data.sampling", sampling)), num_segments, clip_len, frame_interval
        )
        self.mode, self.seed, self.epoch = mode, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw different frames from now on. Call it before the DataLoader starts its workers."""
        self.epoch = epoch

    def frames(self, i: int) -> np.ndarray:
        """Return the (T,) ordinals of the frames that item i shows now."""
        metadata = self.reader.probe(i)
        if self.mode == "train":
            u = uniforms(self.seed, self.epoch, i, TEMPORAL, self.sampling.num_segments)
            return train_frames(self.sampling, metadata.frames, metadata.fps, u)
        # (clips, T) -> (clips * T,): ten clips of "dense" are one item.
        return test_frames(self.sampling, metadata.frames, metadata.fps, CLIPS[self.mode]).reshape(-1)

    def _read(self, i: int) -> np.ndarray | list[bytes]:
        frames, metadata = self.frames(i), self.reader.probe(i)
        if self.encoded:
            return self.reader.files(i, frames.tolist())

        clip = np.empty((len(frames), metadata.height, metadata.width, 3), np.uint8)
        self.reader.read(i, frames, None, (metadata.height, metadata.width), clip)
        return clip
