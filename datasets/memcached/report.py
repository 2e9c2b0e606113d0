"""Report the counters of the reader `memcached`, summed over reader processes, as log lines and curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets.memcached.client import FILL_COUNTS, READ_COUNTS

if TYPE_CHECKING:
    from datasets.memcached.client import Counts
    from utils.dist import World
    from utils.log import RunLog

NAMES: tuple[str, ...] = (*READ_COUNTS, *FILL_COUNTS)  # the order in which counters travel between ranks


class MemcachedTraffic:
    """Counters of this rank's reader processes: since the last report, and since the start.

    Args:
        counts: True if the reader counts anything; the same on every rank.
    """

    def __init__(self, counts: bool = True) -> None:
        self.counts = counts
        self.total: dict[str, float] = dict.fromkeys(NAMES, 0.0)
        self._reported = dict(self.total)
        self._since = time.monotonic()
        self._events: list[tuple[str, str]] = []
        self._state: dict[str, str] = {}  # server -> state that was logged last

    def add(self, news: Counts) -> None:
        """Add the result of one `MemcachedReader.counters`."""
        counts, events = news
        for name, value in counts.items():
            self.total[name] += value
        self._events += events

    def report(self) -> tuple[list[str], dict[str, float]]:
        """Return (log lines, TensorBoard tags and values) since the last report; both empty if nothing was counted."""
        lines = []
        for server, text in self._events:
            # Compare without the reason, which differs between processes.
            state = text.partition(" (")[0]
            if self._state.get(server) != state:  # each reader process reports it, but one line is enough
                lines.append(f"WARNING: memcached {server}: {text}")
            self._state[server] = state
        self._events.clear()

        now = time.monotonic()
        news = {name: value - self._reported[name] for name, value in self.total.items()}
        seconds, self._since, self._reported = now - self._since, now, dict(self.total)

        if not news["frames"]:
            return lines, {}
        return [*lines, line(news, seconds)], scalars(news, seconds)

    def write(self, log: RunLog, step: int | None = None) -> None:
        """Write the report of this rank to a log, and to its curves if there is a step."""
        lines, values = self.report() if self.counts else ([], {})
        for text in lines:
            log.line(text)
        if values and step is not None:
            log.scalars(step, values)

    def write_total(self, log: RunLog, world: World) -> None:
        """Write one line for all ranks since the start. Collective."""
        if self.counts:
            # Imported only here, so that the package stays free of torch.
            import torch

            totals = torch.tensor(self.totals(), dtype=torch.float64, device=world.device)
            text = total_line(world.sum_(totals).tolist(), world.size)
            if text:
                log.line(text)

    def totals(self) -> list[float]:
        """Return the counters since the start in the order of `NAMES`, so that a sum over ranks fits `total_line`."""
        return [self.total[name] for name in NAMES]


def total_line(totals: Sequence[float], ranks: int) -> str:
    """Return one line for the counters of a whole run, or "" if nothing was counted."""
    counts = dict(zip(NAMES, totals, strict=True))
    return f"{line(counts, None)}, {ranks} rank(s), since the start" if counts["frames"] else ""


def line(counts: dict[str, float], seconds: float | None) -> str:
    """Return `memcached: ...` with hits, misses, faults, MB/s over `seconds` (None: without), call time and stores."""
    rate = "" if seconds is None else f"{counts['bytes'] / 1e6 / max(seconds, 1e-9):.1f} MB/s "
    call = 1000 * counts["seconds"] / max(counts["requests"], 1)
    return (
        f"memcached: hit rate {hit_rate(counts):.4f} of {counts['frames']:.0f} frames, misses {counts['misses']:.0f}, "
        f"corrupt {counts['corrupt']:.0f}, timeouts {counts['timeouts']:.0f}, errors {counts['errors']:.0f}, "
        f"no server {counts['no_server']:.0f}, {rate}{call:.2f} ms/call, stored {counts['fills']:.0f} "
        f"(dropped {counts['fill_dropped']:.0f}, full {counts['fill_full']:.0f}, failed {counts['fill_errors']:.0f})"
    )


def scalars(counts: dict[str, float], seconds: float) -> dict[str, float]:
    """Return the values of the curves."""
    return {
        "memcached_hit_rate": hit_rate(counts),
        "memcached_misses": counts["misses"],
        "memcached_corrupt": counts["corrupt"],
        "memcached_timeouts": counts["timeouts"],
        "memcached_mb_per_s": counts["bytes"] / 1e6 / max(seconds, 1e-9),
    }


def hit_rate(counts: dict[str, float]) -> float:
    """Return the share of the requested frames that came from a server."""
    return counts["hits"] / counts["frames"] if counts["frames"] else 0.0
