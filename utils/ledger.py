"""Journal the samples that could not be read during a run on every rank, and sum them up at every epoch.

`jobs/bad_samples.jsonl` has one row for each event, from all ranks and processes of the run, and two kinds of markers:
``{"resume": s, ...}``, the iteration from which a process resumed, and ``{"stopped": s}``, where the budget ended one.
`jobs/bad_samples.json` is the summary: which videos, why, how often, and in which part of the run.

A process that resumes reads the samples after its checkpoint again, so the rows of that part are dropped: the files may
have been repaired. Rows of clips that timed out or ended their reader process stay: the repeated steps must skip the
same clips. If the budget ended the process, these rows are dropped too, so that the clips are read again. Rows from
before the checkpoint stay and are counted, but a budget that they used up stops the run only once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from utils import files, log
from utils.errors import UserError, refuse_odd_file

JOURNAL = "jobs/bad_samples.jsonl"
LEDGER = "jobs/bad_samples.json"
TRAINING, PRECISE_BN, VALIDATION = "training", "precise batch norm", "validation"
_NAMED = 5  # files that a log line names


@dataclasses.dataclass(frozen=True)
class BadEvent:
    """One failure, for the log.

    Attributes:
        position: global position of the clip (-1 in an evaluation).
        sample: index of the record that failed.
        path, reason: which file, and why.
        action: what happened to the clip.
        new: the sample had not failed before.
        timeout: the clip was given up because it was late. The file may be good, so an exact resume needs this record.
        crashed: reading the clip ended a reader process twice (perhaps for lack of memory); recorded likewise.
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


class BadSamples:
    """The journal of one run.

    Args:
        exp: the experiment folder.
        run_log: the log for events and sums.
        videos: number of training videos, N.
        num_sample: clips of each video in an epoch, which has N * num_sample positions.
        bad_budget: share of the videos that may be bad in one epoch, over all ranks; one is always allowed.
        first_is_fatal: the first bad clip of the training ends the process (`data.on_bad: error`).
    """

    def __init__(
        self,
        exp: Path,
        run_log: log.RunLog,
        *,
        videos: int,
        bad_budget: float,
        num_sample: int = 1,
        first_is_fatal: bool = False,
    ) -> None:
        # `_epoch` is in positions: several clips of a video count separately, the budget counts videos.
        self.exp, self.log, self.videos, self._epoch = Path(exp), run_log, videos, videos * num_sample
        self.limit = max(1, int(bad_budget * videos))
        self._first_is_fatal = first_is_fatal
        self._logged: set[tuple[str, int]] = set()  # (part of the run, sample) that this process has logged
        self._stopped = False  # the budget ends this process

    def note(self, events: Iterable[BadEvent], step: int, during: str = TRAINING) -> None:
        """Journal failures, and log each sample when it is met for the first time. Every rank may.

        Args:
            events: from a loader's ledger.
            step: finished iterations.
            during: the part of the run that met them.
        """
        for event in events:
            row = {"step": step, "position": event.position, "sample": event.sample, "late": event.timeout}
            row |= {"path": event.path, "reason": event.reason}
            row |= {"crashed": True} if event.crashed else {}
            self.log.journal(JOURNAL, row if during == TRAINING else row | {"during": during})

            # A bad sample comes back in every epoch: one line of the log is enough.
            if (during, event.sample) not in self._logged:
                self._logged.add((during, event.sample))
                part = None if during == TRAINING else during
                self.log.event("data", "bad_sample", "WARNING", log.ANY_RANK, during=part, message=event)

            # The loader raises. Without the marker the clip would fail, unread, in every later process too.
            fatal = self._first_is_fatal and during == TRAINING and (event.timeout or event.crashed)
            if fatal and not self._stopped:
                self._stop(step)

        if not self._stopped and sum(part == TRAINING for part, _ in self._logged) > self.limit:
            self._stop(step)  # the loader's ledger applies the same budget in its process and raises

    def resume(self, marker: files.Row) -> None:
        """Journal that this process resumes from a checkpoint (`resume_marker`). Called on one rank."""
        if _journal(self.exp):
            self.log.journal(JOURNAL, marker)

    def _stop(self, step: int) -> None:
        self._stopped = True
        self.log.journal(JOURNAL, {"stopped": step})

    def sum_up(self, step: int, epoch: int, *, enforce: bool = True) -> None:
        """Write the ledger at the end of an epoch, and one log line if there were bad samples.

        Args:
            step: finished iterations.
            epoch: the epoch that ends, counted from 1.
            enforce: check the budget.

        Raises:
            UserError: more videos were bad in this epoch than `bad_budget` allows. Videos do not count if an earlier
                process met them before it ended with this very error.
        """
        bad_rows = rows(self.exp)
        if bad_rows or (self.exp / LEDGER).exists():
            self._write(step, epoch, bad_rows)
        if not bad_rows:
            return

        # Clips are read ahead: those of the next epoch count in the next one.
        positions = range((epoch - 1) * self._epoch, epoch * self._epoch)
        here = [row for row in bad_rows if row["during"] == TRAINING and row["position"] in positions]
        bad = {row["sample"] for row in here}
        everywhere = {(row["during"] == VALIDATION, row["sample"]) for row in bad_rows}
        count = f"{len(bad)} of {self.videos} videos could not be read, {len(everywhere)} in the run so far"
        self.log.event("data", "bad_samples", "WARNING", epoch=epoch, message=f"{count}: {named(bad_rows)} ({LEDGER})")

        # The rows before a stop of the budget were reported then: they must not stop the run a second time.
        counted = {row["sample"] for row in here if not row["stopped"]}
        if len(bad) > self.limit >= len(counted):
            known = f"{len(bad - counted)} of them were known when data.bad_budget stopped the run"
            self.log.remark("data", f"{known}: it does not count them again", epoch=epoch)

        if enforce and len(counted) > self.limit:
            self._stop(step)
            raise UserError(
                f"{len(counted)} of {self.videos} videos could not be read in epoch {epoch}; data.bad_budget allows "
                f"{self.limit}; each is named in {self.exp / LEDGER}"
            )

    def _write(self, step: int, epoch: int, rows: list[files.Row]) -> None:
        target = self.exp / LEDGER
        target.parent.mkdir(parents=True, exist_ok=True)
        content = {"step": step, "epoch": epoch, "videos": self.videos, "bad": table(rows)}

        # Only this start uses this name. A later start removes it, so a frozen process cannot rename it.
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        with files.replacing(target, temporary=temporary) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", "utf-8", errors="backslashreplace")


def _journal(exp: Path) -> list[files.Row]:
    """Return the journal's rows without a torn last line; raise if it cannot be read, since it decides bits."""
    path, entries = exp / JOURNAL, []
    refuse_odd_file(path)

    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(text))
    return entries


def resume_marker(*, step: int, clips: int, validated: int) -> files.Row:
    """Return the journal's record of a resume.

    Args:
        step: finished iterations.
        clips: number of positions that these took; the next position is the first that is read again.
        validated: step of the last completed validation.
    """
    return {"resume": step, "clips": clips, "validated": validated}


def rows(exp: Path, marker: files.Row | None = None) -> list[files.Row]:
    """Read the journal, oldest first, without samples that a resumed process reads again: nothing counts twice.

    Args:
        exp: the experiment folder.
        marker: a resume that is not in the journal yet.

    Returns:
        Rows as `BadSamples.note` writes them, plus ``during`` and ``stopped``: the budget ended a process after the
        row.
    """
    kept: dict[tuple[object, ...], files.Row] = {}
    stopped = False

    for row in [*_journal(exp), *([marker] if marker else [])]:
        if "resume" in row:
            for old in kept.values() if stopped else ():  # other ranks journalled until they ended too
                old["stopped"] = True
            kept = {key: old for key, old in kept.items() if not _is_read_again(old, row)}
            stopped = False
        elif "stopped" in row:
            stopped = True
        else:
            row |= {"during": row.get("during", TRAINING), "stopped": False}
            # In training a position occurs once. Other parts of the run read the same positions in each round.
            during = row["during"]
            kept.setdefault((during, row["sample"], row["position"], during == TRAINING or row["step"]), row)

    return list(kept.values())


def given_up(
    exp: Path, during: str = TRAINING, step: int | None = None, marker: files.Row | None = None
) -> set[tuple[int, int]]:
    """Return (position, sample) of the clips that must fail again when that part of the run is repeated.

    They were late or ended their reader process twice. Both depend on the machine as much as on the file, so a
    second try could succeed and change the bits of the run.

    Args:
        exp: the experiment folder.
        during: the part of the run.
        step: only clips that failed after this many finished iterations; None for all.
        marker: a resume that is not in the journal yet.
    """
    kept = [row for row in rows(exp, marker) if _is_kept(row) and row["during"] == during]
    return {(row["position"], row["sample"]) for row in kept if step is None or row["step"] == step}


def _is_read_again(row: files.Row, marker: files.Row) -> bool:
    """Return True if the resumed process reads this sample again."""
    if _is_kept(row) and row["during"] != VALIDATION:
        return False  # it fails again without being read
    if row["during"] == TRAINING:
        return row["position"] >= marker["clips"]
    return row["step"] > max(marker["resume"] - 1, marker["validated"])  # an owed validation is repeated


def _is_kept(row: files.Row) -> bool:
    """Return True if the row's failure is repeated after a resume instead of reading the clip again."""
    return bool(row["late"] or row.get("crashed")) and not row["stopped"]


def table(rows: list[files.Row]) -> list[files.Row]:
    """Return path, sample, during, times, late, reasons per file and part of the run, the most frequent first."""
    by_file: dict[tuple[str, str], files.Row] = {}
    for row in rows:
        key = (row["during"], row["path"])
        entry = {"path": row["path"], "sample": row["sample"], "during": row["during"], "times": 0, "late": 0}
        entry = by_file.setdefault(key, entry | {"reasons": []})
        entry["times"] += 1
        entry["late"] += bool(row["late"])
        if row["reason"] not in entry["reasons"]:
            entry["reasons"].append(row["reason"])

    return sorted(by_file.values(), key=lambda entry: (-entry["times"], entry["during"], entry["path"]))


def named(rows: list[files.Row]) -> str:
    """Name the files that failed most often, with their reasons, in one line."""
    times = Counter(row["path"] for row in rows)
    reasons = {row["path"]: row["reason"] for row in reversed(rows)}  # reversed: the first reason of a file wins
    worst = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    text = "; ".join(f"{path} ({reasons[path]}, {count}x)" for path, count in worst[:_NAMED])
    return text + (f"; and {len(worst) - _NAMED} more" if len(worst) > _NAMED else "")
