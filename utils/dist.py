"""Which rank this process is, and the few collectives we use."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, Queue
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from utils import faults, schedulers, transfer
from utils.faults import AgreedError, LostRank, UserError
from utils.reduce import AveragedGradients
from utils.schedulers import Place, integer

JOIN_SECONDS = 300.0  # how long the ranks wait for each other at the start; $ZOETROPE_JOIN_SECONDS overrides
_ANSWER_SECONDS = 2.0  # for the answer of the store when the time to join is over
COLLECTIVE_SECONDS = 1800.0  # after this long a frozen peer counts as lost; $ZOETROPE_COLLECTIVE_SECONDS overrides
TORCHRUN = "torchrun"

T = TypeVar("T")

# What gloo says when a peer has died or stays silent: in plain RuntimeErrors, where NCCL has an exception class.
_LOST_SIGNS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "Application timeout caused pair closure",  # a further operation on a connection that has timed out
)


@dataclass(frozen=True)
class World:
    """The ranks of this run as one of them sees it; made by `join`.

    Attributes:
        rank: 0 .. size - 1.
        size: number of ranks.
        local_rank: number of this rank on its machine.
        device: where this rank computes.
        backend: "nccl", "gloo" or None (a single process: every collective below is a no-op).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    backend: str | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and logs."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a contiguous tensor over all ranks, in place; the same bits on every rank. Raises LostRank."""
        if self.size > 1:
            with contact(self):
                dist.all_reduce(tensor)
        return tensor

    def sum_async(self, tensor: torch.Tensor) -> Pending:
        """Start `sum_` and the copy of the sum to the host; leave the tensor alone until `read()` of the handle."""
        with contact(self):
            work = None if self.size == 1 else dist.all_reduce(tensor, async_op=True)
            return Pending(self, transfer.Readback(tensor, work))

    def broadcast_(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Copy rank `src`'s contiguous tensor over everybody's, in place. Raises LostRank."""
        if self.size > 1:
            with contact(self):
                dist.broadcast(tensor, src)
        return tensor

    def any(self, wish: bool) -> bool:
        """Does any rank wish it? The same answer on every rank. Raises LostRank."""
        return wish if self.size == 1 else bool(self.sum_(torch.tensor([int(wish)], device=self.device)).item())

    def on_main(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 while the others wait.

        Raises:
            UserError: what the action raised, on rank 0; on the others an AgreedError, which nobody prints.
        """
        failure: UserError | None = None
        if self.is_main:
            try:
                action()
            except UserError as error:
                failure = error
        failed = self.any(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise AgreedError("rank 0 could not go on")

    def barrier(self) -> None:
        """Return when every rank has come here. Raises LostRank."""
        if self.size > 1:
            with contact(self):
                dist.barrier(device_ids=[self.device.index] if self.backend == "nccl" else None)


@dataclass(frozen=True)
class Pending:
    """A sum over the ranks that is under way."""

    world: World
    readback: transfer.Readback

    def read(self) -> torch.Tensor:
        """Wait for the sum and return it, on the CPU. On a GPU later work is not waited for. Raises LostRank."""
        with contact(self.world):
            return self.readback.read()


@contextlib.contextmanager
def contact(world: World) -> Iterator[None]:
    """Turn the errors that a dead peer causes into LostRank. Wrap the training loop in it: DDP raises gloo's own."""
    try:
        yield
    except LostRank:
        raise
    except RuntimeError as error:
        if world.size == 1 or not _is_lost(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise LostRank(
            f"rank {world.rank} lost contact with another rank ({reason}): see which failed first"
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return any(sign in str(error) for sign in _LOST_SIGNS)


def join(expected: int | None = None, *, seconds: float | None = None, device: str | None = None) -> World:
    """Find the other ranks and meet them: torchrun's variables, else the scheduler's, else a world of one.

    torchrun goes first, so that it wins inside an allocation. Either all ranks join or everyone gets an error:
    never a smaller world.

    Args:
        expected: the number of ranks that was asked for; None: $ZOETROPE_RANKS, and if that is absent no check.
        seconds: how long to wait for the others; None: $ZOETROPE_JOIN_SECONDS, else 5 minutes.
        device: "cpu" or "cuda"; None: CUDA where there is any.

    Raises:
        UserError: another number of ranks than asked for, ranks missing, or no GPU for this rank.
    """
    place = _place(os.environ)
    if expected is None and os.environ.get("ZOETROPE_RANKS"):
        expected = integer(os.environ, "ZOETROPE_RANKS")
    if expected is not None and expected != place.size:
        raise UserError(
            f"{expected} ranks were asked for but {place.scheduler or 'this command'} started {place.size}: "
            f"start {expected} processes (train.sh does), or ask for {place.size} with ZOETROPE_RANKS={place.size}"
        )
    where = _device(place, device)
    if place.size == 1:
        return World(0, 1, place.local_rank, where, None)
    if seconds is None:
        seconds = _seconds("ZOETROPE_JOIN_SECONDS", JOIN_SECONDS)
    backend = "nccl" if where.type == "cuda" else "gloo"
    store = _meet(place, seconds)
    world = World(place.rank, place.size, place.local_rank, where, backend)
    with contact(world):
        dist.init_process_group(
            backend,
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=collective_timeout(),
            # NCCL then connects at once: errors come now and not in the first step, and further groups are split off.
            device_id=where if backend == "nccl" else None,
        )
    return world


def data_parallel(model: torch.nn.Module, world: World) -> AveragedGradients:
    """Wrap a model so that gradients are averaged over the ranks; buffers are kept equal by utils/sync_bn.py."""
    return AveragedGradients(model, world)


def leave(error: type[BaseException] | None = None, *_: object) -> None:
    """Destroy the process group after a clean end. Push it on an ExitStack, which passes the error on.

    After an error on this rank the other ranks may be in a collective that never ends. With NCCL the destruction waits
    for it, and so does the teardown of the interpreter. The group then stays, and `faults.finish` ends the process
    without either.
    """
    if not dist.is_initialized():
        return
    if error is not None:
        faults.end_at_once()
        return
    with contextlib.suppress(RuntimeError):  # a peer is gone already
        dist.destroy_process_group()


def collective_timeout() -> timedelta:
    """How long a collective may wait for a frozen peer (every process group of ours gets it)."""
    return timedelta(seconds=_seconds("ZOETROPE_COLLECTIVE_SECONDS", COLLECTIVE_SECONDS))


def _place(env: Mapping[str, str]) -> Place:
    """Rank, size and local rank from the environment, in the order torchrun, scheduler, single."""
    if all(env.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        rank, size = integer(env, "RANK"), integer(env, "WORLD_SIZE")
        local_rank = integer(env, "LOCAL_RANK") if env.get("LOCAL_RANK") else rank
        place = Place(TORCHRUN, rank=rank, size=size, local_rank=local_rank)
    else:
        place = schedulers.here(env) or Place("")
    if not 0 <= place.rank < place.size:
        raise UserError(
            f"{place.scheduler} gave RANK={place.rank} of {place.size} ranks: start with train.sh or torchrun"
        )
    return place


def _device(place: Place, wanted: str | None) -> torch.device:
    count = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if count == 0:
        if wanted == "cuda":
            raise UserError(
                f"rank {place.rank}: no CUDA GPU on this machine: ask for the CPU; `python main.py doctor` says "
                "what is wrong with driver and torch"
            )
        return torch.device("cpu")
    # A scheduler can bind one GPU to each task, which then is number 0 for every one of them.
    index = 0 if place.scheduler != TORCHRUN and count == 1 else place.local_rank
    if index >= count:
        raise UserError(
            f"rank {place.rank} is number {place.local_rank} on its machine, which shows {count} GPUs: "
            f'start one rank per GPU (or use none: CUDA_VISIBLE_DEVICES="")'
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _meet(place: Place, seconds: float) -> Store:
    """A store that all ranks have reached, or a UserError on every rank that says who is missing."""
    scheduler = schedulers.Scheduler() if place.scheduler == TORCHRUN else schedulers.named(place.scheduler)
    host, port = scheduler.rendezvous(place, os.environ)
    deadline = time.monotonic() + seconds
    # torchrun's agent already holds the store, for several attempts if it restarts the ranks.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    where = f"rank {place.rank} of {place.size}"
    try:
        timeout, hosts = timedelta(seconds=seconds), place.rank == 0 and not agent
        server = _within(deadline, lambda: TCPStore(host, port, None, hosts, timeout, wait_for_workers=False))
        store = PrefixStore(f"zoetrope/{attempt}", server)
        size = _within(deadline, lambda: store.compare_set("size", "", str(place.size))).decode()
        arrived = _within(deadline, lambda: store.add(f"rank{place.rank}", 1))
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise UserError(f"{where}: port {port} is taken on {host}: set MASTER_PORT to a free one") from error
        raise UserError(f"{where} could not reach rank 0 at {host}:{port} within {seconds:g} s: see its log") from error
    if size != str(place.size):
        raise UserError(f"{where}: others at {host}:{port} count {size} ranks: do two jobs share MASTER_PORT?")
    if arrived != 1:
        raise UserError(f"two processes say they are {where} at {host}:{port}: do two jobs share MASTER_PORT?")
    keys = [f"rank{rank}" for rank in range(place.size)]
    try:
        left = timedelta(seconds=max(deadline - time.monotonic(), 0.1))
        _within(deadline + _ANSWER_SECONDS, lambda: store.wait(keys, left))
    except RuntimeError as error:
        raise UserError(f"{where}: {_absent(store, keys)} within {seconds:g} s: see the logs of the others") from error
    store.set_timeout(min(timedelta(seconds=seconds), collective_timeout()))
    return store


def _within(deadline: float, action: Callable[[], T]) -> T:
    """Return the result of a request to a store, or raise RuntimeError at a time of the monotonic clock.

    A request to a machine that has become unreachable lasts longer than its own timeout: torch then cancels it, and
    waits as long again for the answer to that.
    """
    done: Queue[tuple[T, None] | tuple[None, BaseException]] = Queue()

    def run() -> None:
        try:
            done.put((action(), None))
        except BaseException as error:  # noqa: BLE001  raised by the caller's thread
            done.put((None, error))

    threading.Thread(target=run, name="request to the store", daemon=True).start()
    try:
        result, error = done.get(timeout=max(deadline - time.monotonic(), 0.1))
    except Empty:
        faults.end_at_once()  # the thread cannot be stopped
        raise RuntimeError("no answer") from None
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def _absent(store: Store, keys: list[str]) -> str:
    """How many joined and who is missing, as far as can be told: rank 0 may have taken the store down already."""
    try:
        deadline = time.monotonic() + _ANSWER_SECONDS
        missing = [rank for rank, key in enumerate(keys) if not _within(deadline, lambda key=key: store.check([key]))]
    except RuntimeError:
        return f"not all of {len(keys)} ranks joined"
    names = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    return f"only {len(keys) - len(missing)} of {len(keys)} ranks joined, missing: {names}"


def _seconds(name: str, default: float) -> float:
    try:
        seconds = float(os.environ.get(name) or default)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise UserError(f"the environment variable {name}={os.environ[name]!r} must be a number of seconds above 0")
    return seconds
