"""Check the site: the cluster file, SLURM's partitions, memcached servers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from anal_tools.doctor.finding import NONE, Finding, Subject, ok, warning
from anal_tools.doctor.finding import error as bad
from utils import cluster, schedulers
from utils.errors import UserError

MEMCACHED_SECONDS = 1.0  # longest wait for one server


def cluster_file(subject: Subject) -> Iterator[Finding]:
    """Read the cluster file and the settings of each of its partitions."""
    site = cluster.load()  # its UserError names each wrong line
    for name in site.partitions:
        site.settings(name, {})  # raises UserError if they make no sense
    yield ok(f"{site.file}, {len(site.partitions)} partition(s)" if site.file != cluster.SHIPPED else NONE)


def slurm(subject: Subject) -> Iterator[Finding]:
    """Compare the partitions of the cluster file with SLURM's."""
    try:
        site = cluster.load()
    except UserError:
        return  # the check `cluster file` reports it

    named = {name: site.settings(name, {}) for name in site.partitions}
    named = {name: settings for name, settings in named.items() if settings.scheduler == "slurm"}
    if shutil.which("sinfo") is None:
        if named:
            text = f"{site.file} has partitions of SLURM, and there is no sinfo here"
            yield bad(text, "submit from a login node, or put SLURM's commands on PATH")
        else:
            yield ok(NONE)
        return

    # Partition, availability, CPUs, generic resources (GPUs)
    done = schedulers.run("sinfo", "--noheader", "--format", "%R|%a|%c|%G")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield (bad if named else warning)(
            f"SLURM does not answer: {reason}", "look at SLURM_CONF; ask the administrator"
        )
        return

    # Pad rows that lack columns
    rows = [(line.split("|") + [""] * 3)[:4] for line in done.stdout.splitlines() if line.strip()]
    yield ok(f"partitions {', '.join(sorted({row[0] for row in rows})) or NONE}")
    for name, settings in named.items():
        nodes = [row for row in rows if row[0] == name]
        if not nodes:
            yield bad(f"{site.file}: SLURM has no partition {name}", "correct the name, or remove the section")
            continue
        yield from _fits(f"{site.file}: partitions.{name}", settings, nodes)


def ports(
    subject: Subject,
    taken: Path = Path("/proc/sys/net/ipv4/ip_local_port_range"),
    kept: Path = Path("/proc/sys/net/ipv4/ip_local_reserved_ports"),
) -> Iterator[Finding]:
    """Compare the ports at which the ranks of jobs meet with those that this machine uses for outgoing connections."""
    first, last = schedulers.FIRST_PORT, schedulers.FIRST_PORT + 2 * schedulers.PORTS - 1
    if shutil.which("sinfo") is None or not taken.is_file():
        yield ok(NONE)
        return

    # The kernel never hands out reserved ports: "8080,20000-20100"
    low, high = map(int, taken.read_text("utf-8").split()[:2])
    reserved: set[int] = set()
    for part in filter(None, kept.read_text("utf-8").strip().split(",") if kept.is_file() else []):
        begin, _, end = part.partition("-")
        reserved.update(range(int(begin), int(end or begin) + 1))

    if any(low <= port <= high and port not in reserved for port in range(first, last + 1)):
        text = f"ranks of jobs meet at ports {first} to {last}, and this machine uses {low} to {high} for connections"
        yield warning(text, f"ask the administrator for net.ipv4.ip_local_reserved_ports = {first}-{last}")
    else:
        yield ok(f"jobs meet at {first} to {last}, connections use {low} to {high}")


def _fits(where: str, settings: cluster.PartitionSettings, nodes: list[list[str]]) -> Iterator[Finding]:
    """Compare the settings of a partition with its nodes; rows are those of `slurm`."""
    if all(row[1] != "up" for row in nodes):
        yield warning(f"{where}: the partition is {nodes[0][1]}", "jobs wait until the administrator opens it")
    # CPUs; "64+" means nodes of 64 and more
    most = max(int(re.match(r"\d*", row[2])[0] or 0) for row in nodes)  # pyright: ignore[reportOptionalSubscript]
    cpus = settings.gpus_per_node * settings.cpus_per_gpu
    if most and cpus > most:
        text = f"{where}: {settings.gpus_per_node} x {settings.cpus_per_gpu} cores, and its nodes have {most}"
        yield bad(text, f"set cpus_per_gpu to {max(1, most // settings.gpus_per_node)}")
    # GPUs; "gpu:a100:8(S:0-1)" or "gpu:8"
    counts = [int(number) for row in nodes for number in re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", row[3])]
    if counts and settings.gpu_request != "none" and settings.gpus_per_node > max(counts):
        text = f"{where}: gpus_per_node is {settings.gpus_per_node}, and its nodes have {max(counts)}"
        yield bad(text, f"set gpus_per_node to {max(counts)}")


def memcached(subject: Subject) -> Iterator[Finding]:
    """Ask each memcached server of the config for its version."""
    settings = subject.cfg.data.memcached if subject.cfg and subject.cfg.data.reader == "memcached" else None
    if settings is None:
        yield ok(NONE)
        return
    if settings.servers == "auto":
        if shutil.which("memcached") is None:
            yield warning("memcached is not installed, so frames come from the disk", "apt install memcached")
        else:
            yield ok("memcached is installed; the launcher starts it")
        return

    from datasets.memcached.servers import servers_of
    from datasets.memcached.wire import Connection, read_secret

    values = servers_of(settings)
    secret = read_secret(values["secret_file"]) if values["secret_file"] else None

    alive = []
    for server in values["servers"]:
        connection = Connection(server, timeout=MEMCACHED_SECONDS, connect_timeout=MEMCACHED_SECONDS / 2, secret=secret)
        try:
            connection.version()
            alive.append(server)
        except Exception as error:  # noqa: BLE001  whatever is wrong with a server, it is not usable
            text = f"memcached server {server} does not answer ({error or type(error).__name__})"
            yield warning(text, "start it, or take it out of data.memcached.servers: its frames come from the disk")
        finally:
            connection.close()

    if alive:
        yield ok(f"memcached: {', '.join(alive)}")
