"""MLflow: log to the server of $MLFLOW_TRACKING_URI, else to a database in the experiment folder (see `mlflow ui`)."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.loggers import Point

LONGEST = 500  # letters of a parameter, the limit of MLflow's servers
MOST = 900  # metrics in one request; the server takes 1000
# The sender retries and waits by itself
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


class MlflowRun:
    """A run on an MLflow server."""

    settles = 0.0  # a request returns when the server has stored its points

    def __init__(self, folder: Path, run: str | None, metadata: Mapping[str, str | float]) -> None:
        self._entities = importlib.import_module("mlflow.entities")
        tracking = importlib.import_module("mlflow.tracking")
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"
        self._client = tracking.MlflowClient(tracking_uri=place)

        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "zoetrope")
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            created = self._client.create_run(number, run_name=str(metadata.get("name", folder.name)))
            self.run: str = created.info.run_id
            self._describe(self.run, metadata)
        else:
            self._client.get_run(run)  # raises if the server does not have it
            self.run = run

    def _describe(self, run: str, metadata: Mapping[str, str | float]) -> None:
        params = [self._entities.Param(key, str(value)[:LONGEST]) for key, value in metadata.items()]
        for first in range(0, len(params), 100):  # the server takes 100 in one request
            self._client.log_batch(run, params=params[first : first + 100])

    def log(self, points: Sequence[Point]) -> None:
        """Send points, in as few requests as the server allows."""
        metric, now = self._entities.Metric, int(1000 * time.time())
        metrics = [metric(tag, value, now, step) for step, values in points for tag, value in values.items()]
        for first in range(0, len(metrics), MOST):
            self._client.log_batch(self.run, metrics=metrics[first : first + MOST])

    def close(self) -> None:
        """Leave the run open: a restart continues it."""


def connect(folder: Path, run: str | None, metadata: Mapping[str, str | float]) -> MlflowRun:
    """Open a new run, or continue one of an earlier start."""
    return MlflowRun(folder, run, metadata)
