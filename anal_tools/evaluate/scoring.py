"""Score kept views: fewer of them, a different average, several models together; and how certain the scores are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np

from anal_tools.evaluate.protocols import FAMILIES, Protocol, nested_clips, nested_crops, parse_views
from anal_tools.evaluate.result_parts import score_in_blocks
from anal_tools.evaluate.results import Results
from datasets.plan.views import EVAL_CROPS
from utils import config, metrics
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.config import Config


LEVEL, RESAMPLES = 0.95, 2000  # of bootstrap intervals


@dataclass(frozen=True)
class Subset:
    """Some of the kept views.

    Attributes:
        protocol: the protocol whose views they are, or replace.
        views: (V,) their indices among the kept ones.
        note: "" if they are exactly the views of that protocol, else how they differ.
    """

    protocol: Protocol
    views: tuple[int, ...]
    note: str = ""


def kept_protocol(results: Results) -> Protocol:
    """Return the protocol of the kept views."""
    return Protocol.from_dict(results.protocol)


def smaller(kept: Protocol, views: str | None = None, average: str | None = None) -> Subset:
    """Return the subset that `--views` and `--average` select, with the crops of the kept protocol's tool."""
    spec = kept.spec
    if views is not None:
        clips, crops = parse_views(views)
        same = crops == spec.crops_per_clip
        # the same number of crops keeps the rule, in any family
        spec = dataclasses.replace(
            spec, num_clips=clips, crops=spec.crops if same else FAMILIES[kept.family].get(crops, spec.crops)
        )
    return subset(kept, dataclasses.replace(kept, spec=spec, average=average or kept.average))


def subset(kept: Protocol, protocol: Protocol) -> Subset:
    """Return the kept views that are those of a different protocol.

    If the tool places fewer clips or crops elsewhere, take the nearest ones and mention it in the note.

    Raises:
        UserError: the wanted views cannot be found in the kept ones.
    """
    have, want = kept.spec, protocol.spec
    # pixels that were not kept cannot be recovered from those that were
    for field in ("sampling", "scale", "crop_size", "rounding"):
        if getattr(have, field) != getattr(want, field):
            raise UserError(
                f"the kept views have {field} {getattr(have, field)}, {protocol.name or 'the wanted ones'} "
                f"{getattr(want, field)}: this needs a separate evaluation"
            )

    if kept.window != protocol.window:
        raise UserError("views kept with and without --per-position are not interchangeable")

    if want.num_clips > have.num_clips or want.crops_per_clip > have.crops_per_clip:
        raise UserError(
            f"{want.num_clips}x{want.crops_per_clip} views are not among the kept ones, "
            f"{have.num_clips}x{have.crops_per_clip}"
        )

    # Clips: all of them, those that are nested in the kept ones, or the nearest choice.
    notes = []
    if want.num_clips == have.num_clips:
        clips = list(range(have.num_clips))
    elif (nested := nested_clips(have.sampling, have.num_clips, want.num_clips)) is not None:
        clips = nested
    else:
        clips = spread(have.num_clips, want.num_clips)
        numbers = ", ".join(map(str, clips))
        notes.append(
            f"not nested: {have.sampling.preset} places {want.num_clips} clip(s) elsewhere than among its "
            f"{have.num_clips}; these are clips {numbers} of them"
        )

    # Views are numbered clip by clip: view = clip * crops + crop.
    crops = _crops(have.crops, want.crops, notes)
    size = have.crops_per_clip
    return Subset(protocol, tuple(clip * size + crop for clip in clips for crop in crops), "; ".join(notes))


def spread(kept: int, count: int) -> list[int]:
    """Return the indices of `count` of `kept` clips, evenly spread; one clip is the middle one."""
    return [int((2 * i + 1) * kept / (2 * count)) for i in range(count)]


def _crops(have: str, want: str, notes: list[str]) -> list[int]:
    # as for clips: all of them, nested ones, or for a single crop the nearest
    if have == want:
        return list(range(len(EVAL_CROPS[have])))
    nested = nested_crops(have, want)
    if nested is not None:
        return nested
    if len(EVAL_CROPS[want]) > 1:
        raise UserError(f"the crops {want} are not among the kept ones ({have}): this needs a separate evaluation")

    rule = EVAL_CROPS[have]
    notes.append(f"not nested: the centre crop of {have} may be one pixel off that of {want}")
    # a mirrored rule has each place twice, plain and flipped
    return [rule.places.index("centre") * (2 if rule.mirrored else 1)]


def scores_of(results: Results, chosen: Subset) -> np.ndarray:
    """Return the probabilities of the videos from a subset of their views, (N, K) float64."""
    views = chosen.views
    # all views: the memory map itself, without a copy of each block
    logits = results.logits if views == tuple(range(results.logits.shape[1])) else _Views(results.logits, views)
    return score_in_blocks(logits, chosen.protocol.average, multi_label=results.multi_label)  # pyright: ignore[reportArgumentType]


class _Views:
    """Select some views of memory-mapped logits; a block of videos is read when it is indexed."""

    def __init__(self, logits: np.ndarray, views: Sequence[int]) -> None:
        self.logits, self.views = logits, list(views)
        self.shape = (logits.shape[0], len(self.views), logits.shape[2])

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.logits[rows][:, self.views]


def common_rows(a: Sequence[str], b: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the videos that both lists have, in the order of the first.

    A list may name a video twice: the i-th of equal paths matches the i-th in the other list.
    """
    places = {key: row for row, key in enumerate(_numbered(b))}
    pairs = [(row, places[key]) for row, key in enumerate(_numbered(a)) if key in places]
    rows = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _numbered(ids: Sequence[str]) -> list[tuple[str, int]]:
    """Return each path with the number of equal paths before it, so that the pairs are unique."""
    seen: Counter[str] = Counter()
    keys = []
    for name in ids:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def aligned(models: Sequence[Results]) -> list[np.ndarray]:
    """Return for each evaluation the row of every video of the first one; the lists may differ only in their order.

    Raises:
        UserError: a video is missing in one of them, has another label, or the classes differ.
    """
    first = models[0]
    rows = []
    for other in models:
        if other.num_class != first.num_class or other.class_names != first.class_names:
            raise UserError(f"{first.folder} and {other.folder}: different classes; these models cannot be combined")

        here, there = common_rows(first.ids, other.ids)
        # name one video that only one of the lists has
        if len(here) < max(len(first.ids), len(other.ids)):
            ours, theirs = Counter(first.ids), Counter(other.ids)
            alone = [*(ours - theirs), *(theirs - ours)]
            raise UserError(
                f"{first.folder} and {other.folder} were evaluated on different lists: {alone[0]!r} is in one of them "
                "only"
            )

        wrong = np.flatnonzero(other.labels[there] != first.labels)
        if len(wrong):
            raise UserError(f"{first.folder} and {other.folder}: {first.ids[wrong[0]]!r} has different labels in them")
        rows.append(there)
    return rows


def fuse(scores: Sequence[np.ndarray], weights: Sequence[float], average: str = "prob") -> np.ndarray:
    """Join the scores of several models: the weighted mean of their probabilities or, for "logit", of their logarithms.

    The mean of logarithms is that of the logits up to a constant per video, which the softmax at the end removes.

    Args:
        scores: (N, K) probabilities of each model, rows aligned.
        weights: one per model.
        average: one of `metrics.AVERAGES`.

    Returns:
        (N, K) float64; NaN if one of the models could not read the video.
    """
    shares = np.asarray(weights, np.float64) / float(sum(weights))
    if average != "logit":
        return np.sum([share * np.asarray(one, np.float64) for one, share in zip(scores, shares, strict=True)], axis=0)

    # 1e-300: the logarithm of a probability of 0 would be infinite
    logs = [share * np.log(np.maximum(one, 1e-300)) for one, share in zip(scores, shares, strict=True)]
    return metrics.probabilities(np.sum(logs, axis=0))


def interval(
    right: np.ndarray, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over videos (Efron and Tibshirani 1993, section 13.3).

    Args:
        right: (N,) one number per video, 0 or 1 for an accuracy.
        level: share of resamples that lie inside.
        resamples: number of lists of N videos that are drawn, with replacement.
        seed: seed of the draws; the same seed gives the same interval.

    Returns:
        Lower and upper end, in the unit of `right`.
    """
    right = np.asarray(right, np.float64)
    if not len(right):
        return float("nan"), float("nan")

    generator = np.random.Generator(np.random.Philox(seed))
    values, counts = np.unique(right, return_counts=True)

    # A mean needs only how often each value is drawn, so N draws cost as little as the number of values.
    means = generator.multinomial(len(right), counts / len(right), size=resamples) @ values / len(right)

    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def config_of(results: Results) -> Config:
    """Return the configuration that an evaluation was made with, as nested attributes.

    Raises:
        UserError: an earlier version wrote the results without it.
    """
    if "config" not in results.summary:
        raise UserError(f"{results.folder}: made before configs were kept in results; evaluate again, or use --views")
    # Keys that are newer than the result hold their defaults.
    return cast("Config", _as_attributes(config.with_defaults(results.summary["config"])))


def _as_attributes(value: object) -> object:
    return SimpleNamespace(**{k: _as_attributes(v) for k, v in value.items()}) if isinstance(value, dict) else value
