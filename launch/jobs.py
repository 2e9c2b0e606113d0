"""The jobs of an experiment: `jobs/jobs.jsonl`, and what squeue and scontrol say about them. sacct is never asked."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch import progress
from utils.faults import UserError

FILE = Path("jobs/jobs.jsonl")
ROOT = Path(__file__).resolve().parents[1]
_ID = re.compile(r"[0-9]+(?:_[0-9]+)?")
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT",
}  # fmt: skip


def record(exp: Path, row: dict[str, Any]) -> None:
    """Append a job to the experiment's list, and the experiment to the user's list of experiments."""
    progress.append_row(exp / FILE, row)
    listed = _registry()
    try:
        if str(exp) not in {str(entry.get("exp")) for entry in progress.read_rows(listed)}:
            progress.append_row(listed, {"exp": str(exp)})
    except OSError:
        return  # no home that can be written: `launch list` then finds only what stands in exps/


def submitted(exp: Path) -> list[dict[str, Any]]:
    """The jobs of an experiment, oldest first."""
    rows = progress.read_rows(exp / FILE)
    return [row for row in rows if isinstance(row.get("job"), str) and _ID.fullmatch(row["job"])]


def experiments(folders: Iterable[Path]) -> list[Path]:
    """Experiments with jobs below `folders`; without folders those in exps/ and those that the user has submitted."""
    given = list(folders)
    found = {file.parent.parent.resolve() for folder in given or [ROOT / "exps"] for file in folder.rglob(str(FILE))}
    if not given:
        listed = {Path(str(row.get("exp"))) for row in progress.read_rows(_registry())}
        found |= {exp.resolve() for exp in listed if (exp / FILE).is_file()}
    return sorted(found)


def states(jobs: Iterable[str]) -> dict[str, str]:
    """State of each job that SLURM still has in its queue, such as ``RUNNING`` or ``PENDING (Resources)``.

    Raises:
        UserError: squeue cannot be asked.
    """
    wanted = sorted({job.partition("_")[0] for job in jobs})
    if not wanted:
        return {}
    done = run("squeue", "--noheader", "--jobs", ",".join(wanted), "--format", "%i|%F|%T|%r")
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return {}
        raise UserError(f"squeue does not answer: {done.stderr.strip()[-300:] or done.returncode}")
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        job, array, state, reason = (line.split("|") + [""] * 3)[:4]
        if not state:
            continue
        text = state if reason in ("None", "") or state != "PENDING" else f"{state} ({reason})"
        found[job] = found[array] = text
    return {job: state for job, state in found.items() if state.split()[0] not in _ENDED}


def details(job: str) -> dict[str, str]:
    """What `scontrol show job -o` says; nothing once SLURM has forgotten the job."""
    done = run("scontrol", "show", "job", "-o", job)
    first = done.stdout.splitlines()[:1] if done.returncode == 0 else []
    return dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", first[0])) if first else {}


def live(exp: Path, verb: str | None = None) -> dict[str, str]:
    """Jobs of the experiment that wait or run: id -> state."""
    own = [row["job"] for row in submitted(exp) if verb in (None, row.get("verb"))]
    found = states(own)
    return {job: found[job] for job in own if job in found}


def outcome(job: str) -> str:
    """State of a job that has left the queue, in a few words."""
    known = details(job)
    if not known:
        return "ended"
    restarts = known.get("Restarts", "0")
    code = known.get("ExitCode", "0:0")
    return (
        known["JobState"]
        + (f" code {code}" if code != "0:0" else "")
        + (f" restarts {restarts}" if restarts != "0" else "")
    )


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """One of SLURM's commands.

    Raises:
        UserError: it is not here, or it hangs.
    """
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=60, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise UserError(f"{argv[0]} is not here: run this on a machine with SLURM's commands") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{argv[0]} did not answer within a minute") from error


def _registry() -> Path:
    folder = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(folder).expanduser() / "zoetrope" / "experiments.jsonl"
