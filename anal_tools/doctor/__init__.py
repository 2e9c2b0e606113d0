"""`python main.py doctor [EXP]`: find what would stop or slow a run, on this machine or in this experiment.

Each check is a small function that takes a `Subject` and yields one `Finding` per result: ok, warning or error.
Warnings and errors also give advice. `ok (none)` means that something is absent and not needed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from anal_tools.doctor import codecs, experiment, gpu, machine, site, storage
from anal_tools.doctor.finding import NONE, Finding, Subject, error, warning
from utils.errors import UserError
from utils.options import Parser

Check = Callable[[Subject], Iterable[Finding]]

SECONDS = 19.0  # for all checks together
# Seconds of a check; 5 for all others. The first check that imports PyTorch from a cold disk waits for it.
LONGEST = {"gpu": 10.0, "nccl": 10.0, "memory": 10.0, "weights": 8.0, "run": 8.0, "readers": 10.0}

# The order matters: `config` and `files` fill in the config and the lists that later checks look at.
CHECKS: dict[str, Check] = {
    "python": machine.python,
    "codecs": codecs.codecs,
    "gpu": gpu.gpu,
    "nccl": gpu.nccl,
    "nvdec": gpu.nvdec,
    "config": experiment.config,
    "files": experiment.files,
    "classes": experiment.classes,
    "packages asked for": machine.extras,
    "threads": machine.threads,
    "limits": machine.limits,
    "shared memory": machine.shared_memory,
    "clock": machine.clock,
    "cluster file": site.cluster_file,
    "slurm": site.slurm,
    "ports": site.ports,
    "memcached": site.memcached,
    "weights": experiment.weights,
    "disk": storage.disk,
    "data": storage.data,
    "memory": experiment.memory,
    "run": experiment.run,
    "readers": experiment.feed,
}

# The checks that `start` runs: the machine before it reads the videos, the experiment before it trains it here.
OF_THE_MACHINE = ("python", "codecs", "gpu", "threads", "limits", "shared memory", "clock")
OF_THE_EXPERIMENT = ("config", "files", "classes", "packages asked for", "limits", "weights", "disk", "memory")


def main(argv: Sequence[str]) -> int:
    """Print a line for each finding. Return 2 if one is an error, which would stop a run or make its numbers wrong."""
    parser = Parser(prog="main.py doctor", description="Check this machine and an experiment before you start a run.")
    parser.add_argument("exp", nargs="?", type=Path, help="experiment folder; without it, only the machine is checked")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    args = parser.parse_args(argv)

    if args.exp is not None and not args.exp.is_dir():
        raise UserError(f"{args.exp}: there is no such experiment folder; `main.py list` shows all")

    began, rows = time.monotonic(), []
    # Print each line as it comes: some checks take seconds
    for name, finding in look(Subject(args.exp, tuple(args.set)), CHECKS):
        rows.append({"check": name, **asdict(finding)})
        if not args.json:
            print(as_line(name, finding), flush=True)

    levels = [row["level"] for row in rows]
    seconds = round(time.monotonic() - began, 1)

    if args.json:
        print(json.dumps({"schema": 1, "seconds": seconds, "findings": rows}))
    else:
        print(f"{levels.count('error')} error(s), {levels.count('warning')} warning(s), {seconds:.1f} s")
    sys.stdout.flush()
    return 2 if "error" in levels else 0


def consult(subject: Subject, names: Iterable[str]) -> None:
    """Run some of the checks before a verb does its work: print their warnings, stop at their errors.

    Raises:
        UserError: at least one error; its text names each one and what to do about it.
    """
    wrong = []
    for name, finding in look(subject, {name: CHECKS[name] for name in names}):
        if finding.level == "warning":
            print(f"doctor: {as_line(name, finding)}", flush=True)
        elif finding.level == "error":
            wrong.append(f"  {name}: {finding}")

    if wrong:
        raise UserError(
            "\n".join(["the doctor found problems that would stop this run (--no-doctor starts it anyway):", *wrong])
        )


def as_line(name: str, finding: Finding) -> str:
    """Return a finding as the line that is printed for it."""
    text = str(finding)
    shown = f"{finding.level} ({NONE})" if text == NONE else f"{finding.level}: {text}"
    return f"{name:<18}  {shown}"


def look(
    subject: Subject, checks: Mapping[str, Check] = CHECKS, seconds: float = SECONDS
) -> Iterable[tuple[str, Finding]]:
    """Run the checks one after the other; yield (name, finding) as they come.

    Each check runs on its own thread and is abandoned when its time is up. A file server or a scheduler that does
    not answer then becomes a finding too.
    """
    end = time.monotonic() + seconds
    for name, check in checks.items():
        # A slow check shortens those after it, so that the doctor ends in time as a whole
        left = min(LONGEST.get(name, 5.0), end - time.monotonic())
        if left < 0.2:
            yield name, warning(f"not checked: the {seconds:.0f} s are up", "run it again on a quieter machine")
            continue

        subject.deadline = time.monotonic() + left
        findings: list[Finding] = []
        # A daemon: a thread that hangs in a system call must not keep the process alive
        thread = threading.Thread(target=_collect, args=(check, subject, findings), daemon=True)
        thread.start()
        thread.join(left)
        # A copy: an abandoned thread may still append
        yield from ((name, finding) for finding in list(findings))
        if thread.is_alive():
            yield name, warning(f"no answer within {left:.0f} s", ADVICE.get(name, "a busy machine, or a stalled disk"))


# Likely causes when a check does not answer in time
ADVICE = {
    "slurm": "SLURM's controller is slow or down: ask the administrator",
    "readers": "a step takes long here, so readers are not the limit; `main.py benchmark data EXP` measures in full",
    "files": "a file server does not answer: try `ls` on the roots of the config",
    "data": "a file server does not answer: try `ls` on the roots of the config",
}


def _collect(check: Check, subject: Subject, findings: list[Finding]) -> None:
    """Run one check. Turn its exceptions into findings."""
    try:
        findings.extend(check(subject))
    except UserError as problem:
        findings += [error(line, "") for line in str(problem).splitlines()]
    except ImportError as problem:
        findings.append(error(f"{problem.name or 'a package'} cannot be imported: {problem}", "install it again"))
    except OSError as problem:
        place = f"{problem.filename}: " if problem.filename else ""
        findings.append(error(f"{place}{problem.strerror or problem}", "look at the file and its permissions"))
    except Exception as problem:  # noqa: BLE001  one check that fails must not hide what the others find
        findings.append(error(f"the check failed: {type(problem).__name__}: {problem}", "please report it"))
