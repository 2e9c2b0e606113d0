"""Scores out of kept views: fewer of them, another average, several models together; and what they are worth."""

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
from utils.faults import UserError

if TYPE_CHECKING:
    from utils.config import Config


LEVEL, RESAMPLES = 0.95, 2000  # of bootstrap intervals


@dataclass(frozen=True)
class Subset:
    """Some of the kept views.

    Attributes:
        protocol: what they are meant to be.
        views: (V,) their numbers among the kept ones.
        note: "" if they are exactly the views of that protocol, else in which way they are others.
    """

    protocol: Protocol
    views: tuple[int, ...]
    note: str = ""


def kept_protocol(results: Results) -> Protocol:
    """How the kept views were made."""
    return Protocol.from_dict(results.protocol)


def smaller(kept: Protocol, views: str | None = None, average: str | None = None) -> Subset:
    """The subset that `--views` and `--average` mean, with the crops of the kept protocol's tool."""
    spec = kept.spec
    if views is not None:
        clips, crops = parse_views(views)
        same = crops == spec.crops_per_clip
        spec = dataclasses.replace(
            spec, num_clips=clips, crops=spec.crops if same else FAMILIES[kept.family].get(crops, spec.crops)
        )
    return subset(kept, dataclasses.replace(kept, spec=spec, average=average or kept.average))


def subset(kept: Protocol, wanted: Protocol) -> Subset:
    """Which kept views are those of another protocol.

    Where the tool places fewer clips or crops elsewhere, the nearest choice is taken and the note says so.

    Raises:
        UserError: the wanted views cannot be found in the kept ones.
    """
    have, want = kept.spec, wanted.spec
    for field in ("sampling", "scale", "crop_size", "rounding"):
        if getattr(have, field) != getattr(want, field):
            raise UserError(
                f"the kept views have {field} {getattr(have, field)}, {wanted.name or 'the wanted ones'} "
                f"{getattr(want, field)}: this needs an evaluation of its own"
            )
    if kept.window != wanted.window:
        raise UserError("kept views with and without --per-position cannot stand for each other")
    if want.num_clips > have.num_clips or want.crops_per_clip > have.crops_per_clip:
        raise UserError(
            f"{want.num_clips}x{want.crops_per_clip} views are not among the kept ones, "
            f"{have.num_clips}x{have.crops_per_clip}"
        )
    notes = []
    if want.num_clips == have.num_clips:
        clips = list(range(have.num_clips))
    elif (found := nested_clips(have.sampling, have.num_clips, want.num_clips)) is not None:
        clips = found
    else:
        clips = spread(have.num_clips, want.num_clips)
        numbers = ", ".join(map(str, clips))
        notes.append(
            f"not nested: {have.sampling.preset} places {want.num_clips} clip(s) elsewhere than among its "
            f"{have.num_clips}; these are clips {numbers} of them"
        )
    crops = _crops(have.crops, want.crops, notes)
    size = have.crops_per_clip
    return Subset(wanted, tuple(clip * size + crop for clip in clips for crop in crops), "; ".join(notes))


def spread(kept: int, wanted: int) -> list[int]:
    """`wanted` of `kept` clips, evenly spread; one is the middle."""
    return [int((2 * i + 1) * kept / (2 * wanted)) for i in range(wanted)]


def _crops(have: str, want: str, notes: list[str]) -> list[int]:
    if have == want:
        return list(range(len(EVAL_CROPS[have])))
    found = nested_crops(have, want)
    if found is not None:
        return found
    if len(EVAL_CROPS[want]) > 1:
        raise UserError(f"the crops {want} are not among the kept ones ({have}): this needs an evaluation of its own")
    rule = EVAL_CROPS[have]
    notes.append(f"not nested: the centre crop of {have} may stand a pixel beside that of {want}")
    return [rule.places.index("centre") * (2 if rule.mirrored else 1)]


def scores_of(results: Results, chosen: Subset) -> np.ndarray:
    """Probabilities of the videos from a subset of their views: (N, K) float64."""
    views = chosen.views
    logits = results.logits if views == tuple(range(results.logits.shape[1])) else _Views(results.logits, views)
    return score_in_blocks(logits, chosen.protocol.average, multi_label=results.multi_label)  # type: ignore[arg-type]


class _Views:
    """Some views of memory-mapped logits; a block of videos is read when it is asked for."""

    def __init__(self, logits: np.ndarray, views: Sequence[int]) -> None:
        self.logits, self.views = logits, list(views)
        self.shape = (logits.shape[0], len(self.views), logits.shape[2])

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.logits[rows][:, self.views]


def common_rows(a: Sequence[str], b: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the videos that both lists have, in the order of the first.

    A list may name a video twice: the i-th of equal paths is the i-th in the other list.
    """
    places = {key: row for row, key in enumerate(_numbered(b))}
    found = [(row, places[key]) for row, key in enumerate(_numbered(a)) if key in places]
    rows = np.array(found, dtype=np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _numbered(ids: Sequence[str]) -> list[tuple[str, int]]:
    """Each path with how often it stood before."""
    seen: Counter[str] = Counter()
    keys = []
    for name in ids:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def aligned(models: Sequence[Results]) -> list[np.ndarray]:
    """Return for each evaluation the row of every video of the first one; the lists may differ in order only.

    Raises:
        UserError: a video is missing in one of them, has another label, or the classes differ.
    """
    first = models[0]
    rows = []
    for other in models:
        if other.num_class != first.num_class or other.class_names != first.class_names:
            raise UserError(
                f"{first.folder} and {other.folder}: different classes; these models cannot be put together"
            )
        here, there = common_rows(first.ids, other.ids)
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
    """Scores of several models as one: the weighted mean of their probabilities or, for "logit", of their logarithms.

    The mean of logarithms is that of the logits but for a constant per video, which the softmax at the end removes.

    Args:
        scores: (N, K) probabilities of each model, rows aligned.
        weights: one per model.
        average: one of `metrics.AVERAGES`.

    Returns:
        (N, K) float64; nan where one of the models could not read the video.
    """
    shares = np.asarray(weights, np.float64) / float(sum(weights))
    if average != "logit":
        return np.sum([share * np.asarray(own, np.float64) for own, share in zip(scores, shares, strict=True)], axis=0)
    logs = [share * np.log(np.maximum(own, 1e-300)) for own, share in zip(scores, shares, strict=True)]
    return metrics.probabilities(np.sum(logs, axis=0))


def interval(
    right: np.ndarray, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over videos (Efron and Tibshirani 1993, section 13.3).

    Args:
        right: (N,) one number per video, 0 or 1 for an accuracy.
        level: share of resamples that lie inside.
        resamples: how many lists of N videos are drawn, with replacement.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        Lower and upper end, in the unit of `right`.
    """
    right = np.asarray(right, np.float64)
    if not len(right):
        return float("nan"), float("nan")
    generator = np.random.Generator(np.random.Philox(seed))
    values, counts = np.unique(right, return_counts=True)
    # How often each value is drawn is all that a mean needs: N draws cost as little as the number of values.
    means = generator.multinomial(len(right), counts / len(right), size=resamples) @ values / len(right)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def config_of(results: Results) -> Config:
    """The configuration that an evaluation was made with, as nested attributes.

    Raises:
        UserError: the results are of a version that did not keep it.
    """
    if "config" not in results.summary:
        raise UserError(f"{results.folder}: made before configs were kept in results; evaluate again, or use --views")
    # An earlier version did not write the keys that came later: they hold their defaults.
    return cast("Config", _as_attributes(config.with_defaults(results.summary["config"])))


def _as_attributes(value: object) -> object:
    return SimpleNamespace(**{k: _as_attributes(v) for k, v in value.items()}) if isinstance(value, dict) else value
