"""Add non-local blocks: every position of a clip looks at every other one (Wang et al. 2018, arXiv:1711.07971).

The operator of section 3 has three published forms, which `mode`, `scaled` and `pool_first` select. The blocks of the
TSM repository and MMAction2 pool phi(x) and g(x) and do not scale. PySlowFast pools x before both projections and
divides the embedded Gaussian's exponent by sqrt(D).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from networks.pooling import MaxPool3d

MODES = ("embedded_gaussian", "dot_product", "gaussian")


class NonLocal(nn.Module):
    """Compute z = x + BN(W y), y_i = sum_j f(x_i, x_j) g(x_j) / C(x), on sub-sampled positions j (section 3.3).

    * embedded_gaussian: softmax over j of theta(x_i) . phi(x_j)
    * gaussian: softmax over j of x_i . x_j
    * dot_product: theta(x_i) . phi(x_j) / M, with M positions j

    The scale of the BN starts at 0, so the block is the identity at first (section 4.1).

    Args:
        channels: C of x; the projections have D = C / 2 channels.
        mode: one of `MODES`.
        scaled: divide the exponent of the softmax by sqrt(D).
        pool_first: max-pool x, (1, 2, 2), before phi and g, instead of their outputs.

    Raises:
        ValueError: unknown mode.
    """

    def __init__(
        self, channels: int, mode: str = "embedded_gaussian", *, scaled: bool = False, pool_first: bool = False
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"non_local is {mode!r}; it must be one of {', '.join(MODES)}")
        self.mode, self.scaled, self.pool_first = mode, scaled, pool_first

        inner = channels // 2
        embedded = mode != "gaussian"
        self.theta = nn.Conv3d(channels, inner, 1) if embedded else nn.Identity()
        self.phi = nn.Conv3d(channels, inner, 1) if embedded else nn.Identity()
        self.g = nn.Conv3d(channels, inner, 1)
        self.pool = MaxPool3d((1, 2, 2))
        self.out = nn.Conv3d(inner, channels, 1, bias=False)
        self.bn = nn.BatchNorm3d(channels)

        # Small weights, and a BN scale of 0: the block is the identity at first.
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to the same shape."""
        pooled = self.pool(x) if self.pool_first else x
        query = self.theta(x).flatten(2).transpose(1, 2)  # (B, D, T, H, W) -> (B, N, D), N = T*H*W
        key, value = (self._places(projection(pooled)) for projection in (self.phi, self.g))  # (B, M, D)

        if self.mode == "dot_product":
            # (q k') v / M = q (k' v) / M: the N x M table of weights is never computed.
            y = query @ (key.transpose(1, 2) @ value / key.shape[1])  # (B, N, D)
        else:
            # attention expects an axis of heads; the kernels of torch do not store the N x M table either
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)  # (B, M, D) -> (B, 1, M, D)
            y = F.scaled_dot_product_attention(query, key, value, scale=None if self.scaled else 1.0).squeeze(1)

        y = y.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, N, D) -> (B, D, T, H, W)
        return x + self.bn(self.out(y))

    def _places(self, projected: Tensor) -> Tensor:
        """Map (B, D, T, H, W) to (B, M, D), pooled here unless x was."""
        pooled = projected if self.pool_first else self.pool(projected)
        return pooled.flatten(2).transpose(1, 2)


class FramesNonLocal(NonLocal):
    """Put a `NonLocal` between the blocks of a 2D network, over the T frames of each clip."""

    def __init__(self, channels: int, mode: str, num_segments: int) -> None:
        super().__init__(channels, mode)
        self.num_segments = num_segments

    def forward(self, x: Tensor) -> Tensor:
        """Map (B*T, C, H, W) to the same shape."""
        clips = x.unflatten(0, (-1, self.num_segments)).transpose(1, 2)  # (B*T, C, H, W) -> (B, C, T, H, W)
        return super().forward(clips).transpose(1, 2).flatten(0, 1)  # (B, C, T, H, W) -> (B*T, C, H, W)


def add_non_local(network: nn.Module, *, first: int, make: Callable[[int], nn.Module]) -> None:
    """Put a separate block after every second residual block of layer2 and layer3 (res3 and res4).

    ResNet-50, first = 0: after blocks 0 and 2 of layer2 and 0, 2 and 4 of layer3 (TSM repository, MMAction2); first =
    1: after 1 and 3, and 1, 3 and 5 (PySlowFast). Existing state-dict names stay; new ones are `layer2.0_non_local.*`.

    Args:
        network: a ResNet in two or three dimensions, changed in place; shifts must be in it already.
        first: index of the first block of a stage that gets a non-local block.
        make: channels -> the block.

    Raises:
        ValueError: not a ResNet.
    """
    if not hasattr(network, "layer2"):
        raise ValueError(f"non_local is an option of ResNets, not of a {type(network).__name__}")

    for name, divisor in (("layer2", 4), ("layer3", 2)):
        # channels double from stage to stage; feature_dim are those of layer4
        channels = int(network.feature_dim) // divisor  # pyright: ignore[reportArgumentType]
        stage: OrderedDict[str, nn.Module] = OrderedDict()
        for index, block in enumerate(network.get_submodule(name).children()):
            stage[str(index)] = block
            if index >= first and (index - first) % 2 == 0:
                stage[f"{index}_non_local"] = make(channels)
        setattr(network, name, nn.Sequential(stage))
