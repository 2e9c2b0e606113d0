"""Average the frames of a clip and classify the mean image with two small convolutions (a network for tests)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods._heads import new_classifier, new_dropout


class Toy(nn.Module):
    """Two convolutions with batch norm on each frame, a mean over frames and places, a classifier."""

    def __init__(self, num_class: int, num_segments: int, dropout: float, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, 4, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.dropout = new_dropout(dropout)
        self.classifier = new_classifier(width, num_class, 0.01)
        self.frames_per_clip = num_segments
        self.pretrained_note = ""

    def forward(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, K)."""
        frames = clips.transpose(1, 2).flatten(0, 1)  # (B*T, C, H, W)
        features = self.backbone(frames).mean((2, 3))  # (B*T, width)
        features = features.view(len(clips), -1, features.shape[1]).mean(1)  # (B, width)
        return self.classifier(self.dropout(features))


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.5,
    pretrained: bool | str = False,
    width: int = 8,
) -> Toy:
    """A small network for tests (no paper).

    Args:
        width: channels of both convolutions.
    """
    assert not pretrained
    torch.manual_seed(0)
    return Toy(num_class, num_segments, dropout, width)
