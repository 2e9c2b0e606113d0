"""Find the rank of this process, join the other ranks, and run the few collectives that a run needs."""

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

from utils import errors, schedulers, transfer
from utils.errors import AgreedError, RankLostError, UserError
from utils.reduce import AveragedGradients
from utils.schedulers import Place, integer

JOIN_SECONDS = 300.0  # how long the ranks wait for each other at the start; $ZOETROPE_JOIN_SECONDS overrides
_ANSWER_SECONDS = 2.0  # how long to wait for the store's answer once the time to join is over
COLLECTIVE_SECONDS = 1800.0  # after this long a frozen peer counts as lost; $ZOETROPE_COLLECTIVE_SECONDS overrides
TORCHRUN = "torchrun"

T = TypeVar("T")

# What gloo reports when a peer has died or is silent. It raises plain RuntimeErrors; NCCL has an exception class.
_LOST_SIGNS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "Application timeout caused pair closure",  # a second operation on a connection that has timed out
)


@dataclass(frozen=True)
class World:
    """The ranks of this run as one of them sees it; `join` creates it.

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
        """Sum a contiguous tensor over all ranks, in place, to the same bits on each. Raises RankLostError."""
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
        """Copy rank `src`'s contiguous tensor to all ranks, in place. Raises RankLostError."""
        if self.size > 1:
            with contact(self):
                dist.broadcast(tensor, src)
        return tensor

    def any(self, wish: bool) -> bool:
        """Return True on every rank if `wish` is true on any rank. Raises RankLostError."""
        return wish if self.size == 1 else bool(self.sum_(torch.tensor([int(wish)], device=self.device)).item())

    def on_main(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 while the others wait.

        Raises:
            UserError: on rank 0 the action's error; on the other ranks an AgreedError, which is not printed.
        """
        failure: UserError | None = None
        if self.is_main:
            try:
                action()
            except UserError as error:
                failure = error

        # Every rank must come here: one that raised before would leave the others waiting.
        failed = self.any(failure is not None)

        if failure is not None:
            raise failure
        if failed:
            raise AgreedError("rank 0 could not continue")

    def barrier(self) -> None:
        """Return when every rank has arrived. Raises RankLostError."""
        if self.size > 1:
            with contact(self):
                # Without device_ids NCCL guesses the GPU of a rank and may hang.
                dist.barrier(device_ids=[self.device.index] if self.backend == "nccl" else None)


@dataclass(frozen=True)
class Pending:
    """A sum over the ranks that is in progress."""

    world: World
    readback: transfer.Readback

    def read(self) -> torch.Tensor:
        """Wait for the sum and return it on the CPU; on a GPU, without waiting for later work. Raises RankLostError."""
        with contact(self.world):
            return self.readback.read()


@contextlib.contextmanager
def contact(world: World) -> Iterator[None]:
    """Turn errors caused by a dead peer into RankLostError. Wrap the training loop in it: DDP raises gloo's errors."""
    try:
        yield
    except RankLostError:
        raise
    except RuntimeError as error:
        if world.size == 1 or not _is_lost(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise RankLostError(
            f"rank {world.rank} lost contact with another rank ({reason}): see which failed first"
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return any(sign in str(error) for sign in _LOST_SIGNS)


def join(expected: int | None = None, *, seconds: float | None = None, device: str | None = None) -> World:
    """Find and join the other ranks: by torchrun's variables, else by the scheduler's, else as a world of one.

    torchrun comes first, so that it wins inside an allocation. Either all ranks join or each gets an error: the world
    is never smaller than requested.

    Args:
        expected: the requested number of ranks; None: $ZOETROPE_RANKS, or no check if that is absent.
        seconds: how long to wait for the others; None: $ZOETROPE_JOIN_SECONDS, else 5 minutes.
        device: "cpu" or "cuda"; None: CUDA if there is a GPU.

    Raises:
        UserError: a different number of ranks than requested, missing ranks, or no GPU for this rank.
    """
    # Compare the number of ranks with the number that the user asked for.
    place = _place(os.environ)
    if expected is None and os.environ.get("ZOETROPE_RANKS"):
        expected = integer(os.environ, "ZOETROPE_RANKS")
    if expected is not None and expected != place.size:
        raise UserError(
            f"{expected} ranks were requested, but {place.scheduler or 'this command'} started {place.size}: "
            f"start {expected} processes (train.sh does), or ask for {place.size} with ZOETROPE_RANKS={place.size}"
        )

    # A process alone needs no process group.
    where = _device(place, device)
    if place.size == 1:
        return World(0, 1, place.local_rank, where, None)

    # Meet on our own store first: its errors name the missing ranks, those of torch do not.
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
            # NCCL then connects at once: errors occur here and not in the first step, and later groups are split off.
            device_id=where if backend == "nccl" else None,
        )

    return world


def data_parallel(model: torch.nn.Module, world: World) -> AveragedGradients:
    """Wrap a model so that gradients are averaged over the ranks; utils/sync_bn.py keeps the buffers equal."""
    return AveragedGradients(model, world)


def leave(error: type[BaseException] | None = None, *_: object) -> None:
    """Destroy the process group after a clean end. Push it on an ExitStack, which passes the error on.

    After an error on this rank the other ranks may be in a collective that never ends. With NCCL, both the
    destruction of the group and the interpreter's teardown would wait for it. So the group is kept, and
    `errors.finish` ends the process without either.
    """
    if not dist.is_initialized():
        return
    if error is not None:
        errors.end_at_once()
        return
    with contextlib.suppress(RuntimeError):  # a peer has left already
        dist.destroy_process_group()


def collective_timeout() -> timedelta:
    """Return how long a collective may wait for a frozen peer; all process groups use it."""
    return timedelta(seconds=_seconds("ZOETROPE_COLLECTIVE_SECONDS", COLLECTIVE_SECONDS))


def _place(env: Mapping[str, str]) -> Place:
    """Return rank, size and local rank from the environment, in the order torchrun, scheduler, single process."""
    if all(env.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        rank, size = integer(env, "RANK"), integer(env, "WORLD_SIZE")
        # Other launchers set RANK without LOCAL_RANK; on one machine the two are equal.
        local_rank = integer(env, "LOCAL_RANK") if env.get("LOCAL_RANK") else rank
        place = Place(TORCHRUN, rank=rank, size=size, local_rank=local_rank)
    else:
        place = schedulers.here(env) or Place("")

    if not 0 <= place.rank < place.size:
        raise UserError(
            f"{place.scheduler} gave RANK={place.rank} of {place.size} ranks: start with train.sh or torchrun"
        )

    return place


def _device(place: Place, requested: str | None) -> torch.device:
    count = torch.cuda.device_count() if requested != "cpu" and torch.cuda.is_available() else 0

    if count == 0:
        if requested == "cuda":
            raise UserError(
                f"rank {place.rank}: no CUDA GPU on this machine: use the CPU; `python main.py doctor` shows "
                "what is wrong with driver and torch"
            )
        return torch.device("cpu")
    # A scheduler can bind one GPU to each task. It is then number 0 for every task.
    index = 0 if place.scheduler != TORCHRUN and count == 1 else place.local_rank
    if index >= count:
        raise UserError(
            f"rank {place.rank} is number {place.local_rank} on its machine, which shows {count} GPUs: "
            f'start one rank per GPU (or use none: CUDA_VISIBLE_DEVICES="")'
        )

    # The current device, because `.cuda()` and NCCL would otherwise use GPU 0 on every rank.
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _meet(place: Place, seconds: float) -> Store:
    """Return a store that all ranks have reached; raise a UserError that names the missing ranks on every rank."""
    scheduler = schedulers.Scheduler() if place.scheduler == TORCHRUN else schedulers.named(place.scheduler)
    host, port = scheduler.rendezvous(place, os.environ)
    deadline = time.monotonic() + seconds
    # torchrun's agent already runs the store and keeps it over several attempts, if it restarts the ranks.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    # The requests share one deadline, so that the whole start takes no longer than `seconds`.
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

    # Two jobs with the same port would otherwise train on each other's gradients.
    if size != str(place.size):
        raise UserError(f"{where}: others at {host}:{port} count {size} ranks: do two jobs share MASTER_PORT?")
    if arrived != 1:
        raise UserError(f"two processes claim to be {where} at {host}:{port}: do two jobs share MASTER_PORT?")

    # Wait for one key of each rank: the store knows who is missing if time runs out.
    keys = [f"rank{rank}" for rank in range(place.size)]
    try:
        left = timedelta(seconds=max(deadline - time.monotonic(), 0.1))
        _within(deadline + _ANSWER_SECONDS, lambda: store.wait(keys, left))
    except RuntimeError as error:
        raise UserError(f"{where}: {_absent(store, keys)} within {seconds:g} s: see the logs of the others") from error

    # The store later serves torch's own requests.
    store.set_timeout(min(timedelta(seconds=seconds), collective_timeout()))
    return store


def _within(deadline: float, action: Callable[[], T]) -> T:
    """Return the result of a request to a store, or raise RuntimeError at a time of the monotonic clock.

    A request to an unreachable machine lasts longer than its own timeout: torch then cancels it and waits as long
    again for the answer to the cancellation.
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
        errors.end_at_once()  # the thread cannot be stopped
        raise RuntimeError("no answer") from None

    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def _absent(store: Store, keys: list[str]) -> str:
    """Name the missing ranks as far as possible: rank 0 may have closed the store already."""
    try:
        deadline = time.monotonic() + _ANSWER_SECONDS
        missing = [rank for rank, key in enumerate(keys) if not _within(deadline, lambda key=key: store.check([key]))]
    except RuntimeError:
        return f"not all of {len(keys)} ranks joined"

    # With many ranks a few names show the pattern, such as all ranks of one node.
    names = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    return f"only {len(keys) - len(missing)} of {len(keys)} ranks joined, missing: {names}"


def _seconds(name: str, default: float) -> float:
    try:
        seconds = float(os.environ.get(name) or default)
    except ValueError:
        seconds = 0.0  # refused below, with the same message
    if not 0 < seconds < 1e7:
        raise UserError(f"the environment variable {name}={os.environ[name]!r} must be a number of seconds above 0")
    return seconds
