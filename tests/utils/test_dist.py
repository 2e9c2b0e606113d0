"""Joining, the collectives, losing a rank, and the shards of the global batch."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.ranks import ROOT, RankError, Ranks, run_ranks
from utils import dist, schedulers
from utils.dist import World
from utils.errors import UserError
from utils.schedulers import Place
from utils.schedulers.slurm import SCHEDULER
from utils.shards import ShardPlan, legal_ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ZOETROPE_RANKS",
         "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_JOB_ID")  # fmt: skip
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "somewhere"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "40007"}


# What the ranks run (tests/ranks.py calls these by name).


def collectives(world: World) -> dict[str, object]:
    summed = world.sum_(torch.tensor([world.rank, 1.0]))
    handle = world.sum_async(torch.full((1000,), float(world.rank), dtype=torch.float64))
    sent = world.broadcast_(torch.full((3,), float(world.rank)), src=world.size - 1)
    world.barrier()
    wishes: list[object] = [world.any(world.rank == 1), world.any(False)]
    ran: list[int] = []
    world.on_main(lambda: ran.append(world.rank))
    try:
        world.on_main(refuse)
    except UserError as error:
        wishes.append(f"{type(error).__name__}: {error}")
    results_of = {"sum": summed, "async": handle.read(), "sent": sent, "rank": world.rank, "main": world.is_main}
    return {**results_of, "wishes": wishes, "ran": ran}


def refuse() -> None:
    raise UserError("no such folder")


def one_dies(world: World) -> None:
    world.sum_(torch.zeros(1))
    try:
        with dist.contact(world):
            for _ in range(10000):
                if world.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                torch.distributed.all_reduce(torch.zeros(1000))
    except dist.RankLostError as error:
        print(error, file=sys.stderr)
        dist.leave()
        raise SystemExit(1) from None


def freezes(world: World) -> None:
    world.sum_(torch.zeros(1))
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        world.sum_async(torch.zeros(3)).read()
    except dist.RankLostError as error:
        print(error, file=sys.stderr)
        dist.leave()
        raise SystemExit(1) from None


def fails(world: World) -> None:
    if world.rank == 2:
        raise ValueError("rank 2 is unwell")
    time.sleep(200)


# Where a process finds its rank.


@pytest.fixture
def clean_env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_env(env: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        env.setenv(name, value)


def test_a_single_process_is_a_world_of_one(clean_env: pytest.MonkeyPatch) -> None:
    world = dist.join(1, device="cpu")
    assert world == World(0, 1, 0, torch.device("cpu"), None)
    tensor = torch.arange(3.0)
    assert world.sum_(tensor) is tensor
    assert world.sum_async(tensor).read() is tensor
    assert world.broadcast_(tensor) is tensor
    world.barrier()
    dist.leave()
    assert world.is_main


def test_torchrun_wins_over_slurm_and_slurm_over_single(clean_env: pytest.MonkeyPatch) -> None:
    set_env(clean_env, SLURM)
    place = dist._place(os.environ)
    assert (place.scheduler, place.rank, place.size, place.local_rank) == ("slurm", 5, 8, 1)
    set_env(clean_env, TORCHRUN)
    place = dist._place(os.environ)
    assert (place.scheduler, place.rank, place.size, place.local_rank) == ("torchrun", 2, 4, 0)
    clean_env.delenv("RANK")  # MASTER_ADDR alone does not mean torchrun: batch scripts export it too
    assert dist._place(os.environ).scheduler == "slurm"
    clean_env.delenv("SLURM_STEP_ID")  # the batch script itself, outside srun
    assert dist._place(os.environ).size == 1


def test_ports_of_jobs_and_of_their_next_calls_are_apart_and_below_those_of_connections() -> None:
    environments = [{"SLURM_JOB_ID": str(job), "MASTER_ADDR": "n1"} for job in range(1, 12_001)]
    first = {SCHEDULER.rendezvous(Place("slurm", ""), env)[1] for env in environments}
    following = {schedulers.port_after(port) for port in first}
    assert (min(first), max(first)) == (20_000, 25_999)
    assert len(first) == len(following) == 6_000
    assert not first & following
    assert max(following) < 32_768  # where Linux's own range begins
    assert [schedulers.port_after(port) for port in (77, 29_500, 65_535)] == [78, 29_501, 65_534]


@pytest.mark.system
def test_slurm_address_is_exported_or_the_first_host_of_the_step(clean_env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_env(clean_env, SLURM)
    place = dist._place(os.environ)
    assert SCHEDULER.rendezvous(place, {**os.environ, "MASTER_ADDR": "n1", "MASTER_PORT": "77"}) == ("n1", 77)
    assert SCHEDULER.rendezvous(place, {**os.environ, "MASTER_ADDR": "n1"}) == ("n1", 20000 + 40007 % 6000)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && [ "$3" = "gpu[7-8]" ] && printf "gpu7\\ngpu8\\n"\n'
    )
    scontrol.chmod(0o755)
    clean_env.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert SCHEDULER.rendezvous(place, {**os.environ, "SLURM_STEP_NODELIST": "gpu[7-8]"})[0] == "gpu7"
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        SCHEDULER.rendezvous(place, {**os.environ, "SLURM_STEP_NODELIST": "other"})
    clean_env.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        SCHEDULER.rendezvous(place, {**os.environ, "SLURM_STEP_NODELIST": "gpu[7-8]"})


def test_another_number_of_ranks_than_asked_for(clean_env: pytest.MonkeyPatch) -> None:
    clean_env.setenv("ZOETROPE_RANKS", "4")
    with pytest.raises(UserError, match="4 ranks were requested, but this command started 1"):
        dist.join(device="cpu")
    set_env(clean_env, SLURM)
    with pytest.raises(UserError, match="2 ranks were requested, but slurm started 8"):
        dist.join(2, device="cpu")


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("RANK", "4"), ("ZOETROPE_RANKS", "two")])
def test_environment_that_makes_no_sense(clean_env: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_env(clean_env, {**TORCHRUN, name: value})
    with pytest.raises(UserError, match=name):
        dist.join(device="cpu")


# Several processes.


def test_collectives_on_three_ranks() -> None:
    for rank, got in enumerate(run_ranks(__file__, "collectives", 3)):
        assert got["rank"] == rank
        assert got["main"] == (rank == 0)
        assert got["sum"].tolist() == [3.0, 3.0]
        assert torch.equal(got["async"], torch.full((1000,), 3.0, dtype=torch.float64))
        assert got["sent"].tolist() == [2.0] * 3
        assert got["wishes"][:2] == [True, False]
        assert got["ran"] == ([0] if rank == 0 else [])
        wish = "UserError: no such folder" if rank == 0 else "AgreedError: rank 0 could not continue"
        assert got["wishes"][2] == wish


def test_torchrun_starts_two_ranks() -> None:
    code = "from utils import dist; w = dist.join(2); print(f'{w.rank}/{w.size}\\n', end=''); w.barrier(); dist.leave()"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["0/2", "1/2"]


def test_a_missing_rank_is_an_error_on_all_the_others() -> None:
    began = time.monotonic()
    with Ranks(__file__, "collectives", 3, env={"ZOETROPE_JOIN_SECONDS": "8"}, start=[0, 2]) as ranks:
        codes = ranks.wait(60, stop_at_failure=False)
        assert all(codes.values())
        for rank in (0, 2):
            assert "UserError" in ranks.output(rank)
            assert "only 2 of 3 ranks joined, missing: 1 within 8 s" in ranks.output(rank)
    assert time.monotonic() - began < 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def slurm_ranks(ranks: list[int], size: int, port: int, seconds: float) -> list[tuple[int | None, str]]:
    """Ranks as srun starts them, rank 0 holding the store: (exit code, output) of each."""
    code = (
        "from utils import dist; w = dist.join(); w.sum_(__import__('torch').ones(1)); print('joined', w); dist.leave()"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_", "MASTER_", "TORCHEL"))}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "ZOETROPE_JOIN_SECONDS": str(seconds)}
    env |= {"SLURM_NTASKS": str(size), "SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        forked.Process(
            [sys.executable, "-c", code],
            env=env | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        for rank in ranks
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_slurm_ranks_meet_at_rank_0() -> None:
    for code, output in slurm_ranks([1, 0], 2, free_port(), 30):
        assert code == 0, output
        assert "joined" in output


def test_rank_0_missing_and_one_rank_twice() -> None:
    ((code, output),) = slurm_ranks([1], 2, free_port(), 2)
    assert code
    assert "could not reach rank 0" in output
    results = slurm_ranks([0, 1, 1], 3, free_port(), 10)
    assert all(code for code, _ in results)
    assert any("two processes claim to be rank 1 of 3" in output for _, output in results)


def test_a_killed_rank_ends_the_others_with_one_clear_line() -> None:
    began = time.monotonic()
    with Ranks(__file__, "one_dies", 3) as ranks:
        codes = ranks.wait(60, stop_at_failure=False)
        assert codes == {0: 1, 1: -signal.SIGKILL, 2: 1}, ranks.outputs()
        for rank in (0, 2):
            assert f"rank {rank} lost contact with another rank" in ranks.output(rank)
            assert "Traceback" not in ranks.output(rank)
    assert time.monotonic() - began < 60


def test_a_frozen_rank_counts_as_lost_after_the_time_out() -> None:
    with Ranks(__file__, "freezes", 2, env={"ZOETROPE_COLLECTIVE_SECONDS": "3"}) as ranks:
        end = time.monotonic() + 40
        while ranks.processes[0].poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert ranks.processes[0].poll() == 1, ranks.outputs()
        assert "rank 0 lost contact with another rank" in ranks.output(0)


def test_run_ranks_reports_the_failing_rank_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 2 is unwell"):
        run_ranks(__file__, "fails", 3)
    assert time.monotonic() - began < 60


# Shards.


def legal(total: int, group: int, world: int) -> bool:
    return total % world == 0 and total % group == 0 and (world % group == 0 or group % world == 0)


def test_every_legal_plan_covers_the_global_batch_once_in_whole_groups() -> None:
    checked = 0
    for total, batch, group, world in itertools.product(range(1, 17), (1, 3), range(1, 17), range(1, 17)):
        if not legal(total, group, world):
            continue
        checked += 1
        plans = [ShardPlan(total, batch, world, rank, group) for rank in range(world)]
        step = 5
        got = [p for plan in plans for mine in plan.micro_batches for s in mine for p in plan.positions(step, s)]
        assert sorted(got) == list(range(step * total * batch, (step + 1) * total * batch))
        assert plans[0].global_batch == total * batch
        assert len({len(plan.micro_batches) for plan in plans}) == 1  # equal rounds on all ranks
        for rank, plan in enumerate(plans):
            assert [s for mine in plan.micro_batches for s in mine] == list(range(rank, total, world))
            assert {len(mine) for mine in plan.micro_batches} == {1 if group <= world else group // world}
        for together in zip(*(plan.micro_batches for plan in plans), strict=True):
            shards = sorted(shard for mine in together for shard in mine)
            members = {plans[0].group_of(shard) for shard in shards}
            whole = sorted(g * group + i for g in members for i in range(group))
            assert shards == whole  # whole groups, each of neighbouring shards
        assert plans[0].num_groups == total // group
    assert checked > 300


def test_illegal_plans_list_the_legal_numbers_of_ranks() -> None:
    with pytest.raises(UserError, match="3 ranks cannot share 4 shards .* use 1, 2, 4 ranks"):
        ShardPlan(4, 8, world=3)
    with pytest.raises(UserError, match="2 ranks cannot share 1 shard with .*: use 1 rank; .* `shards: 4`"):
        ShardPlan(1, 8, world=2)
    assert all(ShardPlan(4, 8, world=ranks).total == 4 for ranks in (1, 2, 4))  # as that sentence says
    with pytest.raises(UserError, match="3 ranks cannot share 6 shards with bn_group_size = 2: use 1, 2, 6 ranks"):
        ShardPlan(6, 8, world=3, group_size=2)
    with pytest.raises(UserError, match="bn_group_size = 3 does not divide the 4 shards .* use one of 1, 2, 4"):
        ShardPlan(4, 8, world=2, group_size=3)
    for total, group, world in itertools.product(range(1, 13), repeat=3):
        if legal(total, group, world):
            assert world in legal_ranks(total, group)
        else:
            with pytest.raises(UserError):
                ShardPlan(total, 2, world, 0, group)
    with pytest.raises(ValueError, match="not a shard plan"):
        ShardPlan(4, 8, world=2, rank=2)


SILENT_STORE = """
import os, signal, sys
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
print(store.port, flush=True)
if sys.argv[1] == "waiting":
    store.wait(["zoetrope/0/rank1"], timedelta(seconds=60))
os.kill(os.getpid(), signal.SIGSTOP)
"""
LATE_RANK = """
import os, sys, time
from utils import dist, errors
began = time.monotonic()
def run():
    try:
        dist.join(seconds=float(sys.argv[1]), device="cpu")
    finally:
        print(time.monotonic() - began, flush=True)
    return 0
errors.leave_process(lambda: errors.leave_exit_code(errors.run_cli(run)))
"""


@pytest.mark.parametrize("moment", ["connecting", "waiting"])
def test_a_meeting_point_that_falls_silent_costs_the_time_to_join_once(moment: str) -> None:
    """The store's machine is cut off while a rank connects, or waits there: torch waits twice as long, or for ever."""
    words = [sys.executable, "-c", SILENT_STORE, moment]
    store = forked.Process(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert store.stdout is not None
    port = store.stdout.readline().strip()
    env = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {**os.environ, **env, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-c", LATE_RANK, "4"]
    rank = forked.Process(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = rank.communicate(timeout=90)
    finally:
        for process in (store, rank):
            process.kill()
            process.communicate()
    assert rank.returncode == 2, err
    assert "rank 1 of 3" in err
    assert "within 4 s" in err
    assert float(out) <= 4 + 6
