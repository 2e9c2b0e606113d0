"""The interface to schedulers: one file of this folder each, chosen by name in `cluster.yaml`.

A file defines `SCHEDULER`, an object of a subclass of `Scheduler`. The launcher submits jobs through it. The ranks use
it to find their place in a job and to see which job is alive, so it imports neither the launcher nor torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from utils.errors import UserError

if TYPE_CHECKING:
    from utils.cluster import PartitionSettings

JOB = "ZOETROPE_JOB"  # NAME:ID of the job, for the ranks of a scheduler that sets no variables
RESTARTS = "ZOETROPE_RESTARTS"
# The port where the ranks of a job meet is FIRST_PORT + its id modulo PORTS; if the job calls main.py again, PORTS
# higher. Both ranges end below 32768: above it, Linux uses ports for outgoing connections. Such a connection, of any
# process on the node, could hold the port of a job at the moment when the job starts.
FIRST_PORT, PORTS = 20_000, 6_000


@dataclass(frozen=True)
class Request:
    """The resources of a job, checked.

    Attributes:
        name: of the job; letters, digits and _ . -
        folder: where the scheduler keeps its files and the output of the ranks; absolute.
        partition: a queue of the scheduler.
        nodes, tasks: nodes, and ranks on each of them; one rank per GPU.
        settings: limits and options of the partition.
        servers: shell lines that start servers alongside the ranks; see `Scheduler.on_each_node`.
    """

    name: str
    folder: Path
    partition: str
    nodes: int
    tasks: int
    settings: PartitionSettings
    servers: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """The number of ranks of the whole job."""
        return self.nodes * self.tasks


class Task(Protocol):
    """The program of every rank of a job: call it in the rank's process, or start its command. It can be pickled."""

    def __call__(self) -> None:
        """Run in this process, and leave it with the exit code of the rank."""
        ...

    def command(self) -> list[str]:
        """Return the command of one rank."""
        ...

    def on_this_machine(self, ranks: int) -> list[str]:
        """Return one command that starts all ranks on this machine and waits for them."""
        ...


@dataclass(frozen=True)
class Place:
    """The place of a process in its job.

    Attributes:
        scheduler: name of the scheduler.
        job: id of the job; "" outside one.
        restarts: how often the scheduler has restarted the job.
        rank, size, local_rank: of this process; size 1 outside a step of several ranks.
        nodes: of the job, as the scheduler writes them; "" if it does not.
    """

    scheduler: str
    job: str = ""
    restarts: int = 0
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    nodes: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a job ended: a few words, and an exit code."""

    text: str
    code: int


class Scheduler:
    """One scheduler. A subclass writes `submit`, `states`, `cancel` and `requeue`; all else has a default.

    The defaults fit a scheduler that gives its ranks torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
    MASTER_PORT) and the two variables named above.
    """

    name = ""
    job_in_shell = ""  # text that the shell expands to the job's id in a line of `Request.servers`

    # For the launcher.

    def check(self, request: Request) -> None:
        """Raise a UserError for a request that this scheduler cannot run. Start no command."""

    def require_partition(self, partition: str, known: Sequence[str]) -> None:
        """Raise a UserError if there is no such queue, with a hint among the `known` names."""

    def on_each_node(self, nodes: int) -> str | None:
        """Return the shell words that run a command once on every node, alongside the ranks; None if it cannot."""
        return None

    def preview(self, request: Request, task: Task, code: str) -> str:
        """Return a readable form of the job that `submit` would submit."""
        return "\n".join([f"# {request.ranks} ranks, each runs in {code}:", " ".join(task.command())])

    def submit(self, request: Request, tasks: Sequence[Task], code: Path, *, parallel: int | None = None) -> list[str]:
        """Submit one job for each task, at most `parallel` at a time. Return their ids.

        A job has the environment, setup, servers, time and memory of the request. It gets a signal `signal_seconds`
        before its limit, and appends its output to `output`. An id has at most 64 letters, digits, and `_ . -`.

        Args:
            code: folder that the ranks run in, the job's copy of the repository, on PYTHONPATH.

        Raises:
            UserError: the scheduler refused the jobs, or is not installed here.
        """
        raise NotImplementedError

    def states(self, jobs: Iterable[str]) -> dict[str, str]:
        """Return the states of those jobs that are pending (``PENDING...``) or running (exactly ``RUNNING``).

        Raises:
            UserError: the scheduler does not answer.
        """
        raise NotImplementedError

    def outcome(self, job: str) -> Outcome:
        """Return how a job ended; it must be neither pending nor running."""
        return Outcome("ended", 0)

    def cancel(self, job: str) -> None:
        """End a job, with a signal that lets its ranks save. Raise a UserError if that fails."""
        raise NotImplementedError

    def requeue(self, job: str) -> None:
        """End a job and restart it under its id; the launcher or a rank calls this. Raise a UserError if that fails."""
        raise NotImplementedError

    def output(self, folder: Path, job: str, rank: int = 0, end: str = "out") -> Path:
        """Return the file of a rank's output (end "out") or errors ("err"); restarts append to it."""
        return folder / f"{job}_{rank}_log.{end}"

    # For the ranks.

    def is_alive(self, job: str) -> bool | None:
        """Return whether processes of a job may be running; None if the scheduler does not answer."""
        try:
            # A job that is not listed counts as PENDING: it has no processes either
            return not self.states([job]).get(job, "PENDING").startswith("PENDING")
        except UserError:
            return None

    def place(self, env: Mapping[str, str]) -> Place | None:
        """Return the place of this process; None if this scheduler has not started it."""
        name, _, job = env.get(JOB, "").partition(":")
        if name != self.name:
            return None
        return Place(self.name, job, int(env.get(RESTARTS) or 0), int(env.get("RANK") or 0))

    def rendezvous(self, place: Place, env: Mapping[str, str]) -> tuple[str, int]:
        """Return host and port where the ranks of this job meet; rank 0 listens there. Raise a UserError."""
        if not env.get("MASTER_ADDR") or not env.get("MASTER_PORT"):
            raise UserError("MASTER_ADDR and MASTER_PORT are not set: start the ranks with train.sh or torchrun")
        return env["MASTER_ADDR"], integer(env, "MASTER_PORT")


def port_after(port: int) -> int:
    """Return the port where the ranks meet for the next call of main.py, which no other job uses first.

    Rank 0 of the call before may still listen at the old port when the first rank of the next call connects.
    """
    if FIRST_PORT <= port < FIRST_PORT + PORTS:
        return port + PORTS
    return port + 1 if port < 65_535 else port - 1  # the user's own MASTER_PORT


def names() -> list[str]:
    """Return the names of all schedulers."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@functools.cache
def named(name: str) -> Scheduler:
    """Return the scheduler of this name.

    Raises:
        UserError: there is none.
    """
    if name not in names():
        raise UserError(f"no scheduler called {name!r}; choose one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").SCHEDULER


def here(env: Mapping[str, str] | None = None) -> Place | None:
    """Return the place of this process in the job of the scheduler that started it; None if none has."""
    env = os.environ if env is None else env
    places = (named(name).place(env) for name in names())
    return next((place for place in places if place is not None), None)


def integer(env: Mapping[str, str], name: str) -> int:
    """Return the whole number in a variable of the environment. Raise a UserError for anything else."""
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UserError(f"the environment variable {name}={env.get(name)!r} must be a whole number") from None


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command of a scheduler, for at most a minute.

    Raises:
        UserError: the command is not installed, or hangs.
    """
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=60, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise UserError(f"{argv[0]} is not installed here: run this on a machine with {argv[0]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{argv[0]} did not answer ({error})") from error
