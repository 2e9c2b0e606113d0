"""SLURM: a job with one task per GPU, written and submitted by submitit; squeue and scontrol do the rest.

The script exports MASTER_ADDR and MASTER_PORT (the ranks meet there and need no scontrol), changes into the job's copy
of the code, and starts one task per GPU with srun. A task unpickles the submitted `Task` and calls it. sacct is never
used: many clusters have no accounting.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, did_you_mean
from utils.schedulers import FIRST_PORT, PORTS, Outcome, Place, Request, Scheduler, Task, integer, run

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmExecutor

ROOT = Path(__file__).resolve().parents[2]
# Variables of a shell that is itself in a job or below torchrun, and those that would override the script's own lines.
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
# Which cluster to submit to, and the right to do so
_KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
_QUIET_START = 'trap "" USR1 USR2; exec "$0" "$@"'  # a signal would kill a task whose Python is still starting
_ID = re.compile("[0-9]+(?:_[0-9]+)?")
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT",
}  # fmt: skip
_HAS_PROCESSES = {
    "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "CONFIGURING", "RESIZING",
}  # fmt: skip


class Slurm(Scheduler):
    """SLURM, through its commands."""

    name = "slurm"
    job_in_shell = "$SLURM_JOB_ID"

    def check(self, request: Request) -> None:
        """Refuse a folder that SLURM's patterns of file names cannot express."""
        folder = str(request.folder)
        if not folder.isprintable() or any(sign in folder for sign in "%\\"):
            raise UserError(f"{folder!r}: SLURM cannot write to a folder with a control character, % or \\ in its path")

    def require_partition(self, partition: str, known: Sequence[str]) -> None:
        """Refuse a partition that sinfo does not list."""
        say = f"no partition called {partition}{did_you_mean(partition, known)}"
        if shutil.which("sbatch") is None:
            raise UserError(f"{say}: there is no SLURM here (no sbatch); PARTITION = local runs on this machine")
        try:
            done = run("sinfo", "--noheader", "--format", "%R")
        except UserError as error:
            raise UserError(f"{say}: {error}") from error
        if done.returncode:
            raise UserError(f"{say}: SLURM does not answer ({done.stderr.strip()[-300:]})")

        names = done.stdout.split()
        if partition not in names:
            near = did_you_mean(partition, [*names, "local"])
            raise UserError(f"no partition called {partition}{near}; SLURM has {', '.join(names) or 'none'}")

    def on_each_node(self, nodes: int) -> str:
        """Return a step of one task per node that takes no GPU and no whole core from the ranks."""
        # srun takes the job's GPUs from these variables, and then refuses --gres=none.
        forget = "".join(f"-u SLURM_{name} " for name in ("GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "TRES_PER_TASK"))
        step = f"env {forget}srun --overlap --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task=1"
        return f"{step} --gres=none"

    def preview(self, request: Request, task: Task, code: str) -> str:
        """Return the text of the sbatch script."""
        executor = _executor(request, code)
        return executor._make_submission_file_text(executor._submitit_command_str, "dry-run").rstrip("\n")

    def submit(self, request: Request, tasks: Sequence[Task], code: Path, *, parallel: int | None = None) -> list[str]:
        """Submit one job, or with `parallel` an array, whose ids are ARRAY_TASK."""
        with _refusals_named(request):
            executor = _executor(request, str(code))
            if parallel is None:
                return [executor.submit(task).job_id for task in tasks]
            executor.update_parameters(array_parallelism=parallel)
            return [job.job_id for job in executor.submit_array(tasks)]

    def states(self, jobs: Iterable[str]) -> dict[str, str]:
        """Return states such as ``RUNNING`` or ``PENDING (Resources)``, in squeue's words."""
        requested = sorted({job for job in jobs if _ID.fullmatch(job)})
        if not requested:
            return {}

        # Ask for whole arrays: squeue shows their waiting tasks in one line
        arrays = sorted({job.partition("_")[0] for job in requested})
        done = run("squeue", "--noheader", "--jobs", ",".join(arrays), "--format", "%i|%F|%T|%r|%A")
        if done.returncode:
            if "Invalid job id" in done.stderr:  # SLURM has forgotten all of them
                return {}
            raise UserError(f"squeue does not answer: {done.stderr.strip()[-300:] or done.returncode}")

        states: dict[str, str] = {}
        for line in done.stdout.splitlines():
            # A running task of an array has three names: ARRAY_TASK, the id of its array, and its own job id
            listed, array, state, reason, job_id = (line.split("|") + [""] * 4)[:5]
            if not state or state in _ENDED:
                continue
            text = state if reason in ("None", "") or state != "PENDING" else f"{state} ({reason})"
            states |= {job: text for job in requested if job in (listed, array, job_id) or _is_among(job, listed)}
        return states

    def outcome(self, job: str) -> Outcome:
        """Return the state of a job that scontrol still remembers."""
        known = _details(job)
        if not known:
            return Outcome("ended", 0)

        state, restarts, exit_code = known["JobState"], known.get("Restarts", "0"), known.get("ExitCode", "0:0")
        text = state + (f" code {exit_code}" if exit_code != "0:0" else "")

        # "CODE:SIGNAL"; a job without either has failed if it is not COMPLETED
        code, _, number = exit_code.partition(":")
        by_signal = 128 + int(number) if number not in ("", "0") else int(state != "COMPLETED")
        return Outcome(text + (f" restarts {restarts}" if restarts != "0" else ""), int(code) or by_signal)

    def cancel(self, job: str) -> None:
        """End a job by scancel."""
        done = run("scancel", job)
        if done.returncode:
            raise UserError(f"scancel {job}: {done.stderr.strip()}")

    def requeue(self, job: str) -> None:
        """Requeue a job. SLURM restarts a cancelled job too: check its state first."""
        done = run("scontrol", "requeue", job)
        if done.returncode:
            raise UserError(done.stderr.strip() or f"exit code {done.returncode}")

    def is_alive(self, job: str) -> bool | None:
        """Return whether squeue lists the job in a state with processes."""
        if not _ID.fullmatch(job):
            return None
        try:
            state = self.states([job]).get(job, "")
        except UserError:
            return None
        return state.partition(" ")[0] in _HAS_PROCESSES

    def place(self, env: Mapping[str, str]) -> Place | None:
        """Return the place of a task in its step; in the batch script itself rank 0 of 1."""
        is_task = bool(env.get("SLURM_PROCID") and env.get("SLURM_STEP_ID"))
        job = env.get("SLURM_JOB_ID", "")
        if env.get("SLURM_ARRAY_JOB_ID") and env.get("SLURM_ARRAY_TASK_ID"):
            # The id of one task of an array: a requeue by the job's own id could reach its neighbours
            job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"

        if not is_task and not job:
            return None
        restarts, nodes = int(env.get("SLURM_RESTART_COUNT") or 0), env.get("SLURM_JOB_NODELIST", "")

        if not is_task:
            return Place(self.name, job, restarts, nodes=nodes)

        rank, size = integer(env, "SLURM_PROCID"), int(env.get("SLURM_NTASKS") or 0)
        local_rank = integer(env, "SLURM_LOCALID") if env.get("SLURM_LOCALID") else rank
        return Place(self.name, job, restarts, rank, size, local_rank, nodes)

    def rendezvous(self, place: Place, env: Mapping[str, str]) -> tuple[str, int]:
        """Return host and port that the batch script exported, else the step's first host and the job's port."""
        # The script has asked scontrol on the node: containers lack it
        host = env.get("MASTER_ADDR") or _first_host(env)
        if env.get("MASTER_PORT"):
            return host, integer(env, "MASTER_PORT")
        if not env.get("SLURM_JOB_ID"):
            raise UserError("MASTER_PORT is not set: start the ranks with train.sh or torchrun")
        return host, FIRST_PORT + integer(env, "SLURM_JOB_ID") % PORTS  # two jobs on one node get two ports


SCHEDULER = Slurm()


def setup_lines(request: Request, code: str) -> list[str]:
    """Return the shell lines between the #SBATCH header and srun."""
    # The order matters: forget the shell's variables first; the user's environment precedes `setup`, which may use it
    settings = request.settings
    path = os.pathsep.join([code, *_foreign_path()])
    return [
        f"unset {' '.join(_FOREIGN)}",
        f"export PYTHONPATH={shlex.quote(path)} PYTHONSAFEPATH=1 ZOETROPE_RANKS={request.ranks}",
        f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{settings.cpus_per_gpu}}}"',
        *(f"export {name}={shlex.quote(value)}" for name, value in settings.environment.items()),
        *settings.setup,
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        '[ -n "$MASTER_ADDR" ] || { echo "error: scontrol does not name the first node of this job" >&2; exit 1; }',
        f'export MASTER_ADDR MASTER_PORT="${{MASTER_PORT:-$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))}}"',
        f"cd {shlex.quote(code)} || exit 1",
        *request.servers,
    ]


def _executor(request: Request, code: str) -> SlurmExecutor:
    """Return submitit's executor of a request: `submit(task)`, or `submit_array(tasks)` for an array."""
    from submitit.slurm import slurm as submitit_slurm

    class Executor(submitit_slurm.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:  # submitit would look for srun here, which --dry-run does not need
            return 2

    # Options of the header that submitit has no arguments for
    settings = request.settings
    more: dict[str, object] = {"requeue": True, "signal": f"USR2@{settings.signal_seconds}"}

    # GPUs: clusters differ in the kind of request that they accept
    if settings.gpu_request == "gres" or (settings.gpu_type and settings.gpu_request != "none"):
        more["gres"] = ":".join(filter(None, ["gpu", settings.gpu_type, str(request.tasks)]))
    elif settings.gpu_request == "gpus-per-node":
        more["gpus-per-node"] = request.tasks

    names = ("account", "qos", "constraint", "exclude", "nodelist", "reservation", "dependency")
    more |= {name: getattr(settings, name) for name in names if getattr(settings, name)}
    if settings.exclusive:
        more["exclusive"] = True
    if settings.mem:
        more["mem"] = _share(settings.mem, request.tasks, settings.gpus_per_node)

    # submitit must not count time limits: a job requeues as often as it needs. A task ignores signals until Python runs
    executor = Executor(
        request.folder, max_num_timeout=10_000, python=shlex.join(["sh", "-c", _QUIET_START, sys.executable])
    )
    executor.update_parameters(
        job_name=request.name,
        partition=request.partition,
        time=settings.time,
        nodes=request.nodes,
        ntasks_per_node=request.tasks,
        cpus_per_task=settings.cpus_per_gpu,
        wckey=settings.wckey,
        setup=setup_lines(request, code),
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={settings.cpus_per_gpu}"],
        additional_parameters=more,
    )
    return executor


@contextlib.contextmanager
def _refusals_named(request: Request) -> Iterator[None]:
    """Give a submission a clean environment, and turn its failure into one sentence."""
    from submitit.core import utils as submitit_utils

    for name in list(os.environ):  # variables that would override the script, or belong to another job
        if name in _OVERRULE or name in _FOREIGN or (name.startswith("SLURM_") and name not in _KEPT):
            del os.environ[name]

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or error}: not found; is SLURM installed on this machine?") from error
    except OSError as error:
        raise UserError(f"{request.folder}: cannot be written ({error.strerror or error})") from error
    except (submitit_utils.FailedJobError, submitit_utils.FailedSubmissionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "sbatch:" in line]
        raise UserError(f"SLURM refused the job: {'; '.join(lines) or str(error).strip()[-500:]}") from error


def _is_among(job: str, listed: str) -> bool:
    """Return True if squeue's line for the waiting tasks of an array, such as 12_[3-5,7%2], contains a job."""
    array, _, task = job.partition("_")
    if not task or not listed.startswith(f"{array}_["):
        return False

    # % precedes the number of tasks that may run at a time
    numbers = re.split(r"[%\]]", listed.partition("[")[2])[0]
    ranges = re.findall(r"(\d+)(?:-(\d+))?", numbers)
    return any(int(first) <= int(task) <= int(last or first) for first, last in ranges)


def _details(job: str) -> dict[str, str]:
    """Return the fields of `scontrol show job -o`; none once SLURM has forgotten the job."""
    done = run("scontrol", "show", "job", "-o", job)
    first = done.stdout.splitlines()[:1] if done.returncode == 0 else []
    return dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", first[0])) if first else {}


def _first_host(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    advice = "export MASTER_ADDR (the first host of the job) in the batch script"
    try:
        done = run("scontrol", "show", "hostnames", nodes)
    except UserError as error:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} could not be expanded ({error}): {advice}") from error

    hosts = done.stdout.split()
    if done.returncode or not hosts:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no host ({done.stderr.strip()}): {advice}")
    return hosts[0]


def _share(mem: str, tasks: int, per_node: int) -> str:
    """Return the share of a node's memory that belongs to `tasks` of its `per_node` GPUs."""
    if tasks == per_node:
        return mem
    number, unit = re.fullmatch(r"(\d+)([KMGT]?)", mem).groups()  # pyright: ignore[reportOptionalMemberAccess]
    megabytes = int(number) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[unit]
    return f"{max(1, math.ceil(megabytes * tasks / per_node))}M"


def _foreign_path() -> list[str]:
    """Return PYTHONPATH without our own repository, which the job's copy of the code replaces."""
    skip = {str(ROOT), ""}
    return [
        part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part not in skip and part.isprintable()
    ]
