"""What a run does with media that cannot be read: counted, named, and stopped above a budget; never silent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from utils.faults import UserError

POLICIES = ("error", "skip", "substitute")
#: Substitutes that are tried for one clip before it is skipped.
MAX_SUBSTITUTES = 5
_NAMED = 5


def printable(path: str) -> str:
    """A path that any log can take: bytes that are not UTF-8 are written as escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclasses.dataclass
class BadSample:
    """One sample that failed.

    Attributes:
        path: as the list writes it (or the frame file that failed).
        reason: why, the first time.
        times: how often it was met.
    """

    path: str
    reason: str
    times: int = 1


@dataclasses.dataclass(frozen=True)
class BadEvent:
    """One failure, for the log.

    Attributes:
        position: global position of the clip (-1 in an evaluation).
        sample: index of the record that failed.
        path, reason: which file, and why.
        action: what became of the clip.
        new: the sample had not failed before.
        timeout: it was given up for being late: not a property of the file, to be journalled for an exact resume.
        crashed: it was given up because reading it ended a reader process twice (perhaps for lack of memory): the same.
    """

    position: int
    sample: int
    path: str
    reason: str
    action: str
    new: bool
    timeout: bool = False
    crashed: bool = False

    def __str__(self) -> str:
        return f"bad sample {self.sample} ({self.path}): {self.reason}; {self.action}"


class Ledger:
    """The failures that this process has met.

    Args:
        videos: number of records, N.
        bad_budget: largest tolerated share of N; at least one bad sample is tolerated.
        policy: "error", "skip" or "substitute".
    """

    def __init__(self, videos: int, bad_budget: float, policy: str) -> None:
        if policy not in POLICIES:
            raise UserError(f"data.on_bad: {policy!r} is not one of {', '.join(POLICIES)}")
        self.samples: dict[int, BadSample] = {}
        self.policy = policy
        self.limit = max(1, int(bad_budget * videos))
        self.videos = videos
        self._events: list[BadEvent] = []

    def add(self, event: BadEvent) -> None:
        """Note a failure; UserError under the policy "error" or when the budget is used up."""
        known = self.samples.get(event.sample)
        if known:
            known.times += 1
        else:
            self.samples[event.sample] = BadSample(event.path, event.reason)
        self._events.append(event)
        if self.policy == "error":
            raise UserError(
                f"{event.path}: {event.reason}; mend or remove it, or set data.on_bad to substitute or skip"
            )
        if len(self.samples) > self.limit:
            raise UserError(
                f"{len(self.samples)} of {self.videos} videos cannot be read, data.bad_budget allows {self.limit}: "
                f"{self.summary()}"
            )

    def take_events(self) -> list[BadEvent]:
        """Failures since the last call."""
        events, self._events = self._events, []
        return events

    def summary(self) -> str:
        """One line: how many samples failed, and those that failed most often."""
        if not self.samples:
            return "no bad samples"
        worst = sorted(self.samples.items(), key=lambda item: (-item[1].times, item[0]))[:_NAMED]
        named = "; ".join(f"{bad.path} ({bad.reason}, {bad.times}x)" for _, bad in worst)
        more = len(self.samples) - len(worst)
        return f"{len(self.samples)} bad: {named}" + (f"; and {more} more" if more else "")


class Substitutes:
    """The stand-in of a sample: the next one of the same label in list order, round to the start.

    Args:
        labels: (N,) integer labels.
    """

    def __init__(self, labels: np.ndarray | Sequence[int]) -> None:
        self._labels = np.asarray(labels)

    def after(self, sample: int) -> int | None:
        """The next sample of the same label; None if there is no other."""
        same = np.flatnonzero(self._labels == self._labels[sample])
        following = int(same[(np.searchsorted(same, sample) + 1) % len(same)])
        return None if following == sample else following
