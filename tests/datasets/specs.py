"""Specs for tests, from the config keys: the schema alone has defaults."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from datasets.plan import train
from datasets.plan.sampling import Sampling
from datasets.plan.train import TrainSpec
from datasets.readers import video_index
from datasets.readers.spec import ReaderSpec
from utils.config.schema import Augmentation, Data


def train_spec(
    sampling: Sampling, input_size: int = 224, crop: Any = "multi_scale", *, flip: bool = True, **keys: Any
) -> TrainSpec:
    """Return the spec of these keys of `augmentation`."""
    cfg: Any = SimpleNamespace(
        augmentation=Augmentation(input_size=input_size, crop=crop, **keys),
        model=SimpleNamespace(num_segments=sampling.num_segments),
        data=SimpleNamespace(
            sampling=sampling.preset, clip_len=sampling.clip_len, frame_interval=sampling.frame_interval, flip=flip
        ),
    )
    return train.train_spec(cfg)


def reader_spec(kind: str, **fields: Any) -> ReaderSpec:
    """Return the spec of a reader."""
    return ReaderSpec(kind, **{"missing_share": Data().missing_share, **fields})


def build_index(path: str, shown: str) -> video_index.Index:
    """Return the index of a video file."""
    return video_index.build_index(path, shown, missing_share=Data().missing_share)
