"""Turn the user's request into a job: check the request, submit it to its scheduler, record it.

The schedulers are files of `utils/schedulers/` (add a new one there); `cluster.yaml` names the scheduler of a
partition.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import job, jobs, memcached
from launch.job import RankTask
from utils import cluster, files, run_dir, schedulers
from utils.errors import UserError
from utils.log import utc_stamp
from utils.schedulers import Request, Scheduler

# Fields of `cluster.PartitionSettings` with a flag of the same name, besides --time.
FLAGS = ("exclude", "constraint", "qos", "account", "nodelist", "dependency")


def request(verb: str, folder: Path, partition: str, ranks: int, flags: cluster.Values, *, ask: bool = True) -> Request:
    """Check everything that the scheduler will be asked for.

    Args:
        verb: train or eval.
        folder: of the experiment or the sweep; the output goes to `jobs/` in it.
        ranks: N.
        flags: fields of `cluster.PartitionSettings` given on the command line; None if not given.
        ask: ask the scheduler whether it has the partition.

    Raises:
        UserError: a value is not allowed, the partition does not exist, or N does not fit the nodes.
    """
    wrong = cluster.check("partition", partition)
    if wrong:
        raise UserError(f"PARTITION: {wrong}")

    place = Path(os.path.abspath(folder))
    # Check values first, so that a typo is reported without asking the scheduler.
    site = cluster.load()
    settings = site.settings(partition, {name: flags.get(name) for name in ("time", *FLAGS)})
    scheduler = schedulers.named(settings.scheduler)
    if ask:
        scheduler.require_partition(partition, [*site.partitions, "local"])

    nodes, tasks = split(ranks, settings.gpus_per_node)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{verb}-{place.name}")[:80]  # it becomes part of the script
    new_request = Request(name, place / "jobs" / scheduler.name, partition, nodes, tasks, settings)
    scheduler.check(new_request)

    return new_request


def of(asked: Request) -> Scheduler:
    """Return the scheduler of a request."""
    return schedulers.named(asked.settings.scheduler)


def split(ranks: int, per_node: int) -> tuple[int, int]:
    """Return (nodes, tasks on each) for N ranks.

    Raises:
        UserError: N neither fits on one node nor fills whole nodes.
    """
    if ranks < 1:
        raise UserError("N must be 1 or more on a partition; `local 0` runs one process without a GPU on this machine")

    if ranks <= per_node:
        return 1, ranks

    if ranks % per_node:
        below = ranks // per_node * per_node
        raise UserError(
            f"{ranks} ranks do not fill nodes of {per_node} GPUs: ask for {below} or {below + per_node} "
            f"({below // per_node} or {below // per_node + 1} nodes), or at most {per_node} for a part of one node"
        )

    return ranks // per_node, per_node


def task(
    asked: Request, exp: str, argv: Sequence[str], *then: Sequence[str], sweep: str = "", trial: str = ""
) -> RankTask:
    """Return the task of every rank of the job: main.py with these arguments, as a trial of a sweep or by itself.

    Args:
        then: arguments of further calls of main.py, each after the previous one has succeeded.
    """
    # A requeued job must not move away the run that its own first start began.
    old_run = job.mark_of_run(Path(exp)) if "--fresh" in argv else None
    limits = {"max_restarts": asked.settings.max_restarts, "max_stalled": asked.settings.max_stalled}
    return RankTask(exp, argv, then=then, old_run=old_run, sweep=sweep, trial=trial, **limits)


def submit(
    asked: Request, tasks: Sequence[RankTask], code: Path, *, parallel: int | None = None, **more: str
) -> list[files.Row]:
    """Submit a job for each task, and record each in its experiment's list. Return the rows of the list."""
    ids = of(asked).submit(asked, tasks, code, parallel=parallel)
    about = {"scheduler": of(asked).name, "partition": asked.partition, "ranks": asked.ranks, "nodes": asked.nodes}
    about |= {"time": utc_stamp(), "revision": run_dir.revision(code), "code": str(code), **more}

    rows = [{"job": one, "verb": run.argv[0], **about, "argv": run.argv} for one, run in zip(ids, tasks, strict=True)]

    for run, row in zip(tasks, rows, strict=True):
        jobs.record(Path(run.exp), row)
    return rows


def preview(asked: Request, run: RankTask) -> str:
    """Return a preview of the submission: the scheduler's input, and the arguments of a rank."""
    code = f"{run.exp}/jobs/code/<UTC time>-<revision>"
    return "\n".join(
        [
            of(asked).preview(asked, run, code),
            "",
            f"# {asked.ranks} tasks: {asked.nodes} node(s) x {asked.tasks}; each runs, in its copy of the code:",
            f"# {shlex.join(['main.py', *run.argv])}",
        ]
    )


def server_lines(asked: Request, megabytes: int) -> tuple[str, ...]:
    """Return the shell lines that start memcached servers with the job; warn and return none if it cannot have any."""
    if not megabytes:
        return ()

    step = of(asked).on_each_node(asked.nodes)
    if step is None:
        print(f"WARNING: {asked.partition} starts no memcached servers; frames are read from the disk", file=sys.stderr)
        return ()

    folder = asked.folder.parent / "memcached"
    return memcached.job_lines(folder, of(asked).job_in_shell, step, nodes=asked.nodes, megabytes=megabytes)
