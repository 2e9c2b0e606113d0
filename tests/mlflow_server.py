"""A real MLflow server for the tests and measurements, on the loopback, killed and started again at will."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

MISSING = (
    None if importlib.util.find_spec("mlflow") and importlib.util.find_spec("flask") else "MLflow is not installed"
)


class Server:
    """`mlflow server` with a database in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, where it was before, and wait until it answers."""
        store = f"sqlite:///{self.folder}/server.db"
        argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        argv += ["--workers", "1", "--backend-store-uri", store, "--default-artifact-root", str(self.folder / "files")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=log, cwd=self.folder, start_new_session=True, env=environment
            )
        end = time.monotonic() + 90
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        """kill -9, its workers too."""
        assert self.process is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def curves(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """Return what the server has of a run: tag -> (step, value) of every point, duplicates included."""
        return curves(self.uri, run)


def curves(uri: str, run: str) -> dict[str, list[tuple[int, float]]]:
    """Return every point that MLflow has of a run, in the order of the steps."""
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]  of the extra mlflow

    client = MlflowClient(tracking_uri=uri)
    tags = client.get_run(run).data.metrics
    return {tag: sorted((each.step, each.value) for each in client.get_metric_history(run, tag)) for tag in tags}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
