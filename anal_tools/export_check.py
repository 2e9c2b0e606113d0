"""Check an export: provide the plain network and clips, and compare logits."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from anal_tools.predict.predictor import Predictor
    from anal_tools.predict.sources import InputVideo

CLIPS = 4  # of the validation list, if --check names none


def export_form(net: torch.nn.Module) -> torch.nn.Module:
    """Return the network as it is exported: float32, weights in the ordinary memory layout, no gradients."""
    net = net.cpu().float().eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()
    return net


def clips_to_check(args: argparse.Namespace, predictor: Predictor) -> list[InputVideo]:
    """Return what --check names, else the first videos of the validation list; none if only noise can be compared."""
    from anal_tools.predict.sources import InputVideo, expand
    from datasets.loading.loader import records_of
    from datasets.readers.metadata_cache import family_of
    from utils import config

    if args.check:
        return expand(args.check)
    if not args.target.is_dir():
        return []

    cfg = config.load(args.target, args.set)
    with contextlib.suppress(UserError):
        records = records_of(cfg, "val")
        paths = [records.full_path(i) for i in range(min(CLIPS, len(records)))]
        return [InputVideo(path, family_of(path)) for path in paths if os.path.lexists(path)]
    return []


def compare(ours: Predictor, exported: Predictor, sources: Sequence[InputVideo], *, tolerance: float) -> list[str]:
    """Compare logits of the checkpoint and of the exported file on the same clips; return lines to print.

    Raises:
        UserError: they differ by more than `tolerance` of the largest logit, or no source could be read.
    """
    import numpy as np
    import torch

    from anal_tools.predict import look
    from utils.dist import World

    spec = ours.spec
    shape = (3, 3, spec.sampling.frames_per_clip, spec.crop_size, spec.crop_size)  # (B, C, T, H, W)
    # Noise: it needs no files, and a batch of 3 is neither the traced one nor 1
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        rows = [("3 clips of noise", ours.net(noise).numpy(), exported.net(noise).numpy())]
    # Videos: the real range of values
    if sources:
        pairs = zip(look(ours, sources, World()), look(exported, sources, World()), strict=True)
        good = [(a.logits, b.logits) for a, b in pairs if a.logits is not None and b.logits is not None]
        if not good:
            raise UserError("export: none of the videos to check could be read; name others with --check")
        expected, got = (np.concatenate([pair[side] for pair in good]) for side in range(2))
        rows.append((f"{len(good)} of {len(sources)} videos", expected, got))

    lines = []
    for name, expected, got in rows:
        scale, gap = max(1.0, float(np.abs(expected).max())), float(np.abs(expected - got).max())
        # `not <=` so that nan fails, too
        if not gap <= tolerance * scale:
            raise UserError(
                f"export: on {name} the exported file's logits differ by {gap:.3g} (allowed {tolerance * scale:.3g}); "
                "nothing was written"
            )
        lines.append(f"{name}: largest difference of a logit {gap:.2g} (largest logit {scale:.3g})")

    if not sources:
        lines.append("no real clip was compared: name videos with --check")
    return lines
