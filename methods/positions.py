"""Test fully convolutionally: a classifier that looks at every window of the map instead of its average.

The classifiers here are linear. So averaging the logits of all positions is the same as classifying the average of the
map, which every method does with a view of any size. PySlowFast differs: a window of the training map's size slides
with stride 1, each position gets a softmax, and the probabilities are averaged. `PositionScores` computes that test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


def window_means(features: Tensor, side: int) -> Tensor:
    """Average over all frames and every window of side x side places, stride 1.

    Args:
        features: (B, D, T, H, W).
        side: side of the window; a smaller map is one window.

    Returns:
        (B, P, D), P windows row by row.
    """
    frames, height, width = features.shape[2:]
    pooled = F.avg_pool3d(features, (frames, min(side, height), min(side, width)), stride=1)  # (B, D, 1, P1, P2)
    return pooled.flatten(2).transpose(1, 2)


class PositionScores(nn.Module):
    """Return the logarithm of the class probabilities averaged over the windows, in place of a method's logits.

    Their softmax is the average itself, so `prob` and `sum` join views as PySlowFast does.

    Args:
        method: has `window_logits(clips, side) -> (B, P, K)`.
        side: side of the window in places of the map, that of a training clip: 7 for 224 pixels.
    """

    def __init__(self, method: nn.Module, side: int) -> None:
        super().__init__()
        self.method, self.side = method, side
        self.window_logits: Callable[[Tensor, int], Tensor] = method.window_logits  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, clips: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to (B, K), the logarithm of probabilities."""
        logits = self.window_logits(clips, self.side)  # (B, P, K)
        # log of the mean over P windows, without leaving the logarithm
        return logits.log_softmax(2).logsumexp(1) - math.log(logits.shape[1])
