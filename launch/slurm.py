"""PARTITION = one of SLURM's: a job with one task per GPU, written and submitted by submitit.

The script exports MASTER_ADDR and MASTER_PORT (the ranks meet there, and need no scontrol), changes into the job's own
copy of the code, and starts one task per GPU with srun. A task unpickles a `launch.job.Run` and calls main.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import cluster, job, memcached
from utils.faults import UserError, did_you_mean

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = "slurm"  # submitit's folder in <exp>/jobs
# Of a shell that is itself inside a job or below torchrun; and what would overrule the script's own lines.
_FOREIGN = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "ZOETROPE_EXIT_FILE",
    "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip
_OVERRULE = {
    f"SBATCH_{name}"
    for name in (
        "EXPORT", "GPUS_PER_NODE", "GRES", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "PARTITION", "REQUEUE",
        "SIGNAL", "TIMELIMIT",
    )
}  # fmt: skip
_KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
_QUIET_START = 'trap "" USR1 USR2; exec "$0" "$@"'  # while Python itself starts, a signal would kill the task


@dataclasses.dataclass(frozen=True)
class Request:
    """One job.

    Attributes:
        verb: train or eval.
        exp: experiment folder, absolute.
        partition: SLURM's partition.
        nodes, tasks: nodes, and tasks on each of them; one task per GPU.
        settings: the partition's settings.
        words: what main.py is called with.
        memcached: memory of a memcached server on each node [MB]; 0 = none is started.
    """

    verb: str
    exp: str
    partition: str
    nodes: int
    tasks: int
    settings: cluster.Settings
    words: tuple[str, ...]
    memcached: int = 0

    @property
    def ranks(self) -> int:
        """Tasks of the whole job."""
        return self.nodes * self.tasks

    @property
    def name(self) -> str:
        """The job's name: nothing but letters, digits and _ . -"""
        return re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.verb}-{os.path.basename(self.exp)}")[:80]

    @property
    def output(self) -> Path:
        """Where submitit keeps the script, the pickle and the output of the ranks."""
        return Path(self.exp) / "jobs" / OUTPUT


def request(
    verb: str,
    exp: Path,
    partition: str,
    ranks: int,
    words: Sequence[str],
    flags: Mapping[str, Any],
    *,
    ask: bool = True,
) -> Request:
    """Check everything that will stand in the script.

    Args:
        ranks: N.
        words: verb, experiment and options for main.py.
        flags: fields of `cluster.Settings` given on the command line; None where not given.
        ask: ask SLURM whether it has the partition.

    Raises:
        UserError: a value is not allowed, there is no such partition, or N does not fit the nodes.
    """
    folder = os.path.abspath(exp)
    wrong = cluster.check("partition", partition)
    if wrong:
        raise UserError(f"PARTITION: {wrong}")
    if not folder.isprintable() or any(sign in folder for sign in "%\\"):
        raise UserError(f"{folder!r}: SLURM cannot write to a folder with a control character, % or \\ in its path")
    site = cluster.load()
    settings = site.settings(partition, flags)
    if ask:
        _see_partition(partition, [*site.partitions, "local"])
    nodes, tasks = split(ranks, settings.gpus_per_node)
    return Request(verb, folder, partition, nodes, tasks, settings, tuple(words))


def split(ranks: int, per_node: int) -> tuple[int, int]:
    """(nodes, tasks on each) for N ranks.

    Raises:
        UserError: N is neither below a node nor a multiple of it.
    """
    if ranks < 1:
        raise UserError("N must be 1 or more on a partition; `local 0` runs one process without a GPU on this machine")
    if ranks <= per_node:
        return 1, ranks
    if ranks % per_node:
        below = ranks // per_node * per_node
        raise UserError(
            f"{ranks} ranks do not fill nodes of {per_node} GPUs: ask for {below} or {below + per_node} "
            f"({below // per_node} or {below // per_node + 1} nodes), or {per_node} and fewer for a part of one node"
        )
    return ranks // per_node, per_node


def setup_lines(wanted: Request, code: str) -> list[str]:
    """The shell lines between the #SBATCH header and srun."""
    settings = wanted.settings
    path = os.pathsep.join([code, *_foreign_path()])
    return [
        f"unset {' '.join(_FOREIGN)}",
        f"export PYTHONPATH={shlex.quote(path)} PYTHONSAFEPATH=1 ZOETROPE_RANKS={wanted.ranks}",
        f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{settings.cpus_per_gpu}}}"',
        *(f"export {name}={shlex.quote(value)}" for name, value in settings.environment.items()),
        *settings.setup,
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        '[ -n "$MASTER_ADDR" ] || { echo "error: scontrol does not name the first node of this job" >&2; exit 1; }',
        'export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"',
        f"cd {shlex.quote(code)} || exit 1",
        *(_servers(wanted) if wanted.memcached else ()),
    ]


def _servers(wanted: Request) -> list[str]:
    folder = os.path.join(wanted.exp, "jobs", "memcached")
    return memcached.job_lines(folder, nodes=wanted.nodes, megabytes=wanted.memcached)


def parameters(wanted: Request, code: str) -> dict[str, Any]:
    """What submitit is given."""
    settings = wanted.settings
    more: dict[str, Any] = {"requeue": True, "signal": f"USR2@{settings.signal_seconds}"}
    if settings.gpu_request == "gres" or (settings.gpu_type and settings.gpu_request != "none"):
        more["gres"] = ":".join(filter(None, ["gpu", settings.gpu_type, str(wanted.tasks)]))
    elif settings.gpu_request == "gpus-per-node":
        more["gpus-per-node"] = wanted.tasks
    names = ("account", "qos", "constraint", "exclude", "nodelist", "reservation", "dependency")
    more |= {name: getattr(settings, name) for name in names if getattr(settings, name)}
    if settings.exclusive:
        more["exclusive"] = True
    if settings.mem:
        more["mem"] = _share(settings.mem, wanted.tasks, settings.gpus_per_node)
    return {
        "job_name": wanted.name,
        "partition": wanted.partition,
        "time": settings.time,
        "nodes": wanted.nodes,
        "ntasks_per_node": wanted.tasks,
        "cpus_per_task": settings.cpus_per_gpu,
        "wckey": settings.wckey,
        "setup": setup_lines(wanted, code),
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={settings.cpus_per_gpu}"],
        "additional_parameters": more,
    }


def executor(wanted: Request, code: str) -> Any:
    """The SlurmExecutor of submitit for a request; `submit(run)`, or `submit_array(runs)` for an array.

    Args:
        code: folder from which the job runs.
    """
    from submitit.slurm import slurm as submitit_slurm

    class Executor(submitit_slurm.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:  # submitit asks for srun already here, and --dry-run needs none
            return 2

    python = shlex.join(["sh", "-c", _QUIET_START, sys.executable])
    made = Executor(wanted.output, max_num_timeout=10_000, python=python)
    made.update_parameters(**parameters(wanted, code))
    return made


def task(wanted: Request) -> job.Run:
    """The callable of every task."""
    old_run = job.mark_of_run(Path(wanted.exp)) if "--fresh" in wanted.words else None
    limits = {"max_restarts": wanted.settings.max_restarts, "max_stalled": wanted.settings.max_stalled}
    return job.Run(wanted.exp, wanted.words, old_run=old_run, **limits)


def script(wanted: Request, code: str) -> str:
    """The text of the sbatch script."""
    made = executor(wanted, code)
    return made._make_submission_file_text(made._submitit_command_str, "dry-run")


def submit(wanted: Request, code: str) -> str:
    """Submit one job; returns its id.

    Raises:
        UserError: sbatch refused it, or is not here.
    """
    with _refusals_named(wanted):
        return executor(wanted, code).submit(task(wanted)).job_id


def submit_array(wanted: Request, code: str, runs: Sequence[Callable[[], None]], parallel: int) -> list[str]:
    """Submit one job array with a task for each of `runs`, at most `parallel` at a time.

    Returns:
        Their ids, ARRAY_TASK (of a single one: the job's own).

    Raises:
        UserError: sbatch refused it, or is not here.
    """
    with _refusals_named(wanted):
        made = executor(wanted, code)
        made.update_parameters(array_parallelism=parallel)
        return [one.job_id for one in made.submit_array(runs)]


@contextlib.contextmanager
def _refusals_named(wanted: Request) -> Iterator[None]:
    """Around a submission: a clean environment before it, and one clear sentence if it fails."""
    from submitit.core import utils as submitit_utils

    clean_environment()
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or error}: not found; is SLURM installed on this machine?") from error
    except OSError as error:
        raise UserError(f"{wanted.output}: cannot be written ({error.strerror or error})") from error
    except (submitit_utils.FailedJobError, submitit_utils.FailedSubmissionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "sbatch:" in line]
        raise UserError(f"SLURM refused the job: {'; '.join(lines) or str(error).strip()[-500:]}") from error


def clean_environment() -> None:
    """Take what would overrule the script, or is another job's, out of this process's environment."""
    for name in list(os.environ):
        if name in _OVERRULE or name in _FOREIGN or (name.startswith("SLURM_") and name not in _KEPT):
            del os.environ[name]


def dry_run(wanted: Request) -> str:
    """What would be submitted: the script, and a task's words."""
    code = f"{wanted.exp}/jobs/code/<UTC time>-<revision>"
    return "\n".join(
        [
            script(wanted, code).rstrip("\n"),
            "",
            f"# {wanted.ranks} tasks: {wanted.nodes} node(s) x {wanted.tasks}; each runs, in its copy of the code:",
            f"# {shlex.join(['main.py', *wanted.words])}",
        ]
    )


def _see_partition(partition: str, known: Sequence[str]) -> None:
    """Refuse a partition that SLURM does not have, before anything is written."""
    say = f"no partition called {partition}{did_you_mean(partition, known)}"
    if shutil.which("sbatch") is None:
        raise UserError(f"{say}: there is no SLURM here (no sbatch); PARTITION = local runs on this machine")
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format", "%R"],
            capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{say}: sinfo cannot be asked ({error})") from error
    if done.returncode:
        raise UserError(f"{say}: SLURM does not answer ({done.stderr.strip()[-300:]})")
    names = done.stdout.split()
    if partition not in names:
        near = did_you_mean(partition, [*names, "local"])
        raise UserError(f"no partition called {partition}{near}; SLURM has {', '.join(names) or 'none'}")


def _share(mem: str, tasks: int, per_node: int) -> str:
    """The part of a node's memory that goes with `tasks` of its `per_node` GPUs."""
    if tasks == per_node:
        return mem
    number, unit = re.fullmatch(r"(\d+)([KMGT]?)", mem).groups()  # pyright: ignore[reportOptionalMemberAccess]
    megabytes = int(number) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[unit]
    return f"{max(1, math.ceil(megabytes * tasks / per_node))}M"


def _foreign_path() -> list[str]:
    """PYTHONPATH without our own repository, which the copy of the code takes the place of."""
    own = {str(ROOT), ""}
    return [
        part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part not in own and part.isprintable()
    ]
