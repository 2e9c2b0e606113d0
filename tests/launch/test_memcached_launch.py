"""One memcached per node and job: private, with a secret, and gone with the job."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datasets.memcached.wire import Connection, read_secret
from launch import memcached, scheduler
from tests.memcached import MISSING, wait_for
from utils.cluster import PartitionSettings
from utils.schedulers import Request, slurm

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    memcached.prepare(tmp_path / "job")
    return tmp_path / "job"


@pytest.fixture
def served(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`serve` on the loopback, as on a node of a job."""
    argv = [sys.executable, "-m", "launch.memcached", "serve", str(folder), "--megabytes", "64"]
    env = ENV | {"SLURMD_NODENAME": "localhost", "TMPDIR": str(folder.parent)}
    process = subprocess.Popen(argv, env=env, cwd=ROOT)
    assert wait_for(lambda: list(folder.glob("*.server")), 60)
    yield process
    process.kill()
    process.wait()


def running(folder: Path) -> list[str]:
    """Command lines of memcached processes that were started with the secret of this folder."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return [text for text in lines if "memcached" in text.split(" ")[0] and str(folder) in text]


def test_a_server_of_a_job_is_private_and_keeps_what_it_has(folder: Path, served: subprocess.Popen[bytes]) -> None:
    (server_file,) = folder.glob("*.server")
    address = server_file.read_text().strip()
    assert address.startswith("127.0.0.1:")
    (line,) = running(folder)
    words = line.split()
    assert "-M" in words
    assert words[words.index("-U") + 1] == "0"
    assert words[words.index("-l") + 1] == "127.0.0.1"
    assert folder.stat().st_mode & 0o777 == 0o700
    if memcached.can_ask_for_a_secret():
        secret = folder / "secret"
        assert secret.stat().st_mode & 0o777 == 0o600
        known = Connection(address, timeout=2, connect_timeout=2, secret=read_secret(secret))
        known.set(b"key", b"value")
        stranger = Connection(address, timeout=2, connect_timeout=2)
        with pytest.raises(Exception, match="authenticat"):
            stranger.set(b"key", b"another")
        known.close()
        stranger.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_it_goes_with_the_step_and_not_with_a_job_signal(
    folder: Path, served: subprocess.Popen[bytes], how: signal.Signals
) -> None:
    (server,) = running(folder)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        served.send_signal(number)
    assert not wait_for(lambda: served.poll() is not None, 0.3)
    served.send_signal(how)
    assert wait_for(lambda: not running(folder), 15), server
    if how is signal.SIGTERM:
        assert served.wait(10) == 0
        assert not list(folder.glob("*.server"))


def test_a_local_server_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    code = (
        "import os, sys; from launch import memcached;"
        "env = memcached.start_here(64); print(env['ZOETROPE_MEMCACHED'], flush=True);"
        "os.execv(sys.executable, [sys.executable, '-c', 'input()'])"  # the process becomes the rank, as in local.run
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=ENV | {"TMPDIR": str(tmp_path)}, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (server_file,) = folder.glob("*.server")
    address = server_file.read_text().strip()
    connection = Connection(address, timeout=2, connect_timeout=2)
    assert connection.version()
    socket_file = Path(address.removeprefix("unix:"))
    assert socket_file.parent.stat().st_mode & 0o777 == 0o700
    process.kill()
    process.communicate()
    assert wait_for(lambda: not list(tmp_path.iterdir()), 15)
    connection.close()


def test_without_memcached_a_run_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert memcached.start_here(64) == {}
    assert "not installed" in capsys.readouterr().err


def test_a_public_address_gets_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "8.8.8.8")
    with pytest.raises(memcached.UserError, match="is not private"):
        memcached.private_address()


@pytest.mark.parametrize(("nodes", "unix"), [(1, True), (4, False)])
def test_a_job_that_asks_for_servers_starts_one_per_node(tmp_path: Path, nodes: int, unix: bool) -> None:
    exp = tmp_path / "it's here"
    job = Request("train-x", exp / "jobs/slurm", "part", nodes, 8, PartitionSettings())
    servers = scheduler.server_lines(job, 512)
    lines = slurm.setup_lines(dataclasses.replace(job, servers=servers), str(ROOT))
    (step,) = [line for line in lines if "launch.memcached serve" in line]
    assert f"--overlap --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1" in step
    assert step.endswith("--unix &" if unix else "--megabytes 512 &")
    script = tmp_path / "lines.sh"
    script.write_text("\n".join(lines))
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    lines_without = slurm.setup_lines(dataclasses.replace(job, servers=scheduler.server_lines(job, 0)), str(ROOT))
    assert not any("memcached" in line for line in lines_without)
