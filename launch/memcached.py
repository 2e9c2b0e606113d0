"""Run memcached servers for one job: one on every node, which starts and ends with the job.

`python -m launch.memcached serve FOLDER` runs once per node, alongside the ranks. It starts a stock memcached, waits
until it answers, writes the server's address to FOLDER/NAME.server, and waits. At a signal, or when its parent ends,
it ends the server and removes the file. Ranks find the folder in $ZOETROPE_MEMCACHED (datasets/memcached/servers.py).

- One node: a unix socket in a folder of mode 0700, no port at all.
- Several nodes: a free port on this node's private address (never all addresses, never a public one), no UDP, and,
  if this memcached supports it (-Y), a secret that is created for the job.
- `-M`: a full server keeps its items. Every sample is read once per epoch, so evicting the oldest would drop exactly
  the items that are needed next.
- Signals of a job (USR1, USR2) are for the ranks; a server killed by one would be missing for the rest of the epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import pwd
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from utils import files
from utils.config import Config
from utils.errors import UserError
from utils.signals import end_with_parent

ROOT = Path(__file__).resolve().parents[1]
FOLDER, NODES = "ZOETROPE_MEMCACHED", "ZOETROPE_MEMCACHED_NODES"
START_SECONDS = 10.0
_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Items per page of 1 MB in each slab class: fine steps for frames of 340x256 (17 - 35 kB), coarse ones beyond.
#: Frames of 25 kB then fill 0.97 of a 256 MB cache; with growth factor 1.15, 0.91.
_PER_PAGE = (
    2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, *range(30, 61),
    67, 74, 82, 91, 101, 112, 124, 137, 151, 167, 184, 203, 224, 247, 272, 300,
)  # fmt: skip


def arguments(*, megabytes: int, place: Sequence[str], secret: Path | None = None) -> list[str]:
    """Return the command line of a server.

    Args:
        megabytes: memory for values [MB].
        place: where it listens: -s FILE, or -l ADDRESS -p PORT.
        secret: file for -Y.

    Raises:
        UserError: memcached is not installed.
    """
    program = shutil.which("memcached")
    if program is None:
        raise UserError("memcached is not installed on this machine (apt install memcached, or ask the administrator)")

    sizes = "-".join(str((1 << 20) // count // 8 * 8) for count in sorted(_PER_PAGE, reverse=True))
    # -M: never evict. -U 0: no UDP. -R 200: serve many requests of a client in a row: readers fetch whole clips.
    argv = [program, *place, "-m", str(megabytes), "-M", "-U", "0", "-t", "2", "-c", "4096", "-R", "200"]
    argv += ["-o", f"slab_sizes={sizes}"]
    # memcached refuses to run as root without -u.
    if os.geteuid() == 0:
        argv += ["-u", pwd.getpwuid(0).pw_name]

    return argv + (["-Y", str(secret)] if secret else [])


def server_megabytes(cfg: Config) -> int:
    """Return how much memory [MB] the servers that the launcher starts for this config get; 0 if it starts none."""
    data = cfg.data
    return data.memcached.megabytes if data.reader == "memcached" and data.memcached.servers == "auto" else 0


def can_ask_for_a_secret() -> bool:
    """Return True if this machine's memcached supports -Y."""
    program = shutil.which("memcached")
    if program is None:
        return False
    done = subprocess.run([program, "-h"], capture_output=True, text=True, timeout=20, check=False)
    return "--auth-file" in done.stdout


def private_address() -> str:
    """Look up this node's address by its name; raise a UserError if the address is public."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()

    try:
        hosts = {str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)}
    except OSError as error:
        raise UserError(f"{name}: this node's name has no address ({error}), so it gets no memcached server") from error

    private = sorted(address for address in hosts if ipaddress.ip_address(address).is_private)
    if not private:
        raise UserError(f"{name}: its address {sorted(hosts)[0]} is not private, so it gets no memcached server")
    return private[0]


def prepare(folder: Path) -> None:
    """Create or empty the folder of a job, mode 0700, and write a new secret to it if servers support one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # it may have existed with another mode
    for old in (*folder.glob("*.server"), *folder.glob("secret")):
        old.unlink(missing_ok=True)

    if can_ask_for_a_secret():
        with open(os.open(folder / "secret", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"zoetrope:{secrets.token_hex(16)}\n")
            # Clients send the first line to whatever answers at a server's address, but never the second: the checksum
            # of frames depends on both.
            file.write(f"frames:{secrets.token_hex(16)}\n")


def serve(folder: Path, *, megabytes: int, unix: bool) -> int:
    """Run one server until a signal asks it to end, or it ends by itself; return its exit code."""
    ended = False

    def end(number: int, frame: object) -> None:
        nonlocal ended
        ended = True

    for number in _ENDS:
        signal.signal(number, end)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the server inherits this

    secret = folder / "secret"
    with tempfile.TemporaryDirectory(prefix="zoetrope-memcached-") as run_folder:  # mode 0700
        ports = Path(run_folder) / "ports"
        place = ["-s", f"{run_folder}/s"] if unix else ["-l", private_address(), "-p", "-1"]
        argv = arguments(megabytes=megabytes, place=place, secret=secret if secret.exists() and not unix else None)
        env = {**os.environ, "MEMCACHED_PORT_FILENAME": str(ports)}

        server = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent(os.getpid(), signal.SIGTERM)
        )

        address_file = folder / f"{socket.gethostname()}-{os.getpid()}.server"
        try:
            address = f"unix:{run_folder}/s" if unix else f"{place[1]}:{_port(ports, server)}"
            _await_answer(address, server)
            # The file appears only now: a rank that reads it can connect at once.
            files.write_text(address_file, f"{address}\n")
            while not ended and server.poll() is None:
                time.sleep(0.1)
        finally:
            address_file.unlink(missing_ok=True)
            server.terminate()
            code = server.wait()
    return 0 if ended else code


def _port(file: Path, server: subprocess.Popen[bytes]) -> int:
    """Return the free port that the server has chosen, from the file that it writes."""
    end = time.monotonic() + START_SECONDS

    while server.poll() is None and time.monotonic() < end:
        for line in file.read_text().splitlines() if file.exists() else ():
            # Lines such as `TCP INET: 40123`.
            if line.startswith("TCP INET: ") and line.split()[-1].isdecimal():
                return int(line.split()[-1])
        time.sleep(0.02)

    raise UserError(f"memcached did not start (exit code {server.poll()}); see its output above")


def _await_answer(address: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server accepts a connection."""
    host, _, port = address.rpartition(":")
    family, place = (socket.AF_UNIX, port) if host == "unix" else (socket.AF_INET, (host, int(port)))
    end = time.monotonic() + START_SECONDS

    while server.poll() is None and time.monotonic() < end:
        with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.settimeout(1.0)
            probe.connect(place)
            return
        time.sleep(0.02)

    raise UserError(f"memcached does not answer at {address} (exit code {server.poll()})")


def start_here(megabytes: int) -> dict[str, str]:
    """Start one server for the ranks of this machine. It ends with this process, even once that is the rank.

    Returns:
        Environment variables for the ranks. If memcached is not installed or does not start, it prints a warning and
        returns none: the run then reads from its disk.
    """
    try:
        return _start_here(megabytes)
    except UserError as error:
        print(f"WARNING: {error}; frames are read from the disk", file=sys.stderr, flush=True)
        return {}


def _start_here(megabytes: int) -> dict[str, str]:
    arguments(megabytes=megabytes, place=[])  # raises if it is not installed
    folder = Path(tempfile.mkdtemp(prefix="zoetrope-servers-"))  # mode 0700

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "launch.memcached", "serve", str(folder), "--megabytes", str(megabytes), "--unix"]
    argv += ["--parent", str(os.getpid())]
    # A separate session: the terminal's Ctrl-C must not end the server before the ranks have saved.
    keeper = subprocess.Popen(argv, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)

    end = time.monotonic() + 2 * START_SECONDS
    while not list(folder.glob("*.server")):
        if keeper.poll() is not None or time.monotonic() > end:
            keeper.kill()
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError("the memcached server of this run did not start")
        time.sleep(0.02)

    return {FOLDER: str(folder), NODES: "1"}


def job_lines(folder: Path, job: str, step: str, *, nodes: int, megabytes: int) -> tuple[str, ...]:
    """Return shell lines that start one server on each node of a job, alongside its ranks.

    Args:
        folder: on a file system that all nodes share; a folder named after the job's id is created in it.
        job: shell text that expands to the job's id.
        step: words that run a command once on every node.
    """
    run = f"{shlex.quote(sys.executable)} -m launch.memcached"
    unix = " --unix" if nodes == 1 else ""
    return (
        f'export {FOLDER}={shlex.quote(str(folder))}/"{job}" {NODES}={nodes}',
        f'{run} prepare "${FOLDER}" && {step} --output="${FOLDER}"/%N.log '
        f'{run} serve "${FOLDER}" --megabytes {megabytes}{unix} &',
    )


def main(argv: Sequence[str]) -> int:
    """Run `python -m launch.memcached prepare|serve FOLDER` and return its exit code."""
    parser = argparse.ArgumentParser(prog="launch.memcached", description="Start the memcached servers of one job.")
    parser.add_argument("verb", choices=("prepare", "serve"))
    parser.add_argument("folder", type=Path, help="where the servers write their addresses; all nodes must share it")
    parser.add_argument("--megabytes", type=int, default=1024, help="memory for frames")
    parser.add_argument("--unix", action="store_true", help="a unix socket, for the ranks of this node only")
    parser.add_argument("--parent", type=int, help="exit when this parent process exits")
    args = parser.parse_args(argv)

    try:
        if args.verb == "prepare":
            prepare(args.folder)
            return 0
        if args.parent is not None:
            end_with_parent(args.parent, signal.SIGTERM)()  # before the server, which is tied to this process
        code = serve(args.folder, megabytes=args.megabytes, unix=args.unix)
        if args.parent is not None:  # on this machine no job script removes the folder
            shutil.rmtree(args.folder, ignore_errors=True)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
