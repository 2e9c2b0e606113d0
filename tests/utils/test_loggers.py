"""Remote loggers: offline W&B and a real MLflow server.

W&B and MLflow are not in the environment of the tests; those that need them skip. With both installed:
`python -m pytest tests/utils/test_loggers.py` in that environment.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import experiment, forked, mlflow_server
from utils import log, loggers, redact
from utils.loggers.__main__ import Sender

pytestmark = [pytest.mark.system, pytest.mark.filterwarnings("ignore")]  # warnings of W&B and MLflow are theirs

NO_WANDB = None if importlib.util.find_spec("wandb") else "W&B is not installed"
needs_wandb = pytest.mark.skipif(NO_WANDB is not None, reason=str(NO_WANDB))
needs_mlflow = pytest.mark.skipif(mlflow_server.MISSING is not None, reason=str(mlflow_server.MISSING))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mlflow_server.Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    started = mlflow_server.Server(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.uri)
    yield started
    started.kill()


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., tuple[log.RunLog, loggers.Feed]]:
    """The log of an experiment with one remote logger, as `RunLog.start` makes it."""

    def start(name: str, step: int = 0) -> tuple[log.RunLog, loggers.Feed]:
        exp = tmp_path / "exp"
        exp.mkdir(exist_ok=True)
        run_log = log.RunLog(exp, True, step, echo=False)
        remark = functools.partial(run_log.remark, "loggers")
        run_log._feeds = [loggers.Feed(name, exp, {"name": "a run", "lr": 0.1}, remark)]
        return run_log, run_log._feeds[0]

    return start


def text(exp: Path) -> str:
    return (exp / "log.txt").read_text("utf-8")


def sent(exp: Path, name: str, step: int, tag: str = "loss_train", seconds: float = 60.0) -> str:
    """Wait until a step has arrived; return the remote run."""
    end, state = time.monotonic() + seconds, {}
    while time.monotonic() < end:
        file = exp / "events" / f"{name}.json"
        state = json.loads(file.read_text()) if file.exists() else {}
        if state.get("last", {}).get(tag, -1) >= step:
            return state["run"]
        time.sleep(0.1)
    raise AssertionError(f"step {step} has not arrived: {state}; {text(exp)}")


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Give the records of a file in LevelDB's log format, whose first block lacks the 7 bytes of W&B's own header."""
    place, whole = 0, b""
    while place + 7 <= len(data):
        left = 32768 - (place + 7) % 32768
        if left < 7:  # the rest of a block is padding
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def wandb_points(exp: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every point in the files of an offline W&B run, by tag."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]  of the extra wandb

    points: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(exp.glob("wandb/offline-run-*/run-*.wandb")):
        for data in leveldb_records(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for tag, value in row.items():
                    if tag[0] != "_" and tag != "iteration":
                        points.setdefault(tag, []).append((int(row["iteration"]), float(value)))
    return points


# ------------------------------------------------------------------------------------------------- without a package
def test_a_run_without_the_package_is_unharmed(tmp_path: Path, begin: Callable[..., tuple]) -> None:
    if NO_WANDB is None:
        pytest.skip("W&B is installed")
    run_log, feed = begin("wandb")
    end = time.monotonic() + 30
    while "pip install wandb" not in text(tmp_path / "exp") and time.monotonic() < end:
        run_log.scalars(1, {"loss_train": 1.0})
        time.sleep(0.1)
    run_log.close()
    assert text(tmp_path / "exp").count('WARNING loggers: remark message="wandb: ModuleNotFoundError') == 1
    assert "the run continues without it" in text(tmp_path / "exp")


def test_a_full_queue_drops_points_counts_them_and_does_not_wait(tmp_path: Path, begin: Callable[..., tuple]) -> None:
    run_log, feed = begin("mlflow")
    os.kill(feed.process.pid, signal.SIGSTOP)
    worst = 0.0
    for step in range(1, 3001):
        began = time.perf_counter()
        feed.add(step, {"loss_train": 1 / step, "lr": 0.1})
        worst = max(worst, time.perf_counter() - began)
    assert 500 < feed.dropped < 3000  # 64 kB of points wait in the pipe
    assert worst < 0.5  # a busy machine; the wait for a stopped process would have no end
    os.kill(feed.process.pid, signal.SIGKILL)
    feed.add(3001, {"loss_train": 0.0})  # a dead process is no error either
    began = time.perf_counter()
    run_log.close()
    assert time.perf_counter() - began < 5
    assert "points did not fit its queue" in text(tmp_path / "exp")


def test_a_killed_run_leaves_no_process_behind(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from utils import loggers\n"
        f"feed = loggers.Feed('mlflow', Path({str(tmp_path)!r}), {{}}, print)\n"
        "print(feed.process.pid, flush=True); time.sleep(60)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=loggers.ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    child = int(run.stdout.readline())
    time.sleep(1)
    run.kill()
    run.wait()
    run.stdout.close()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


def test_only_what_the_remote_run_lacks_is_sent(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "mlflow.json").write_text(json.dumps({"run": "r", "last": {"loss_train": 2}}))
    (tmp_path / "events" / log.SCALARS).write_text(
        "".join(json.dumps({"step": step, "loss_train": step, "top1_val": step}) + "\n" for step in (1, 2, 3))
    )
    sender = Sender("mlflow", tmp_path, {})
    assert sender.run == "r"
    unsent = sender._new([*sender._kept(), (3, {"loss_train": 3.0}), (4, {"loss_train": 4.0})])
    assert unsent == [
        (1, {"top1_val": 1.0}), (2, {"top1_val": 2.0}), (3, {"loss_train": 3.0, "top1_val": 3.0}),
        (4, {"loss_train": 4.0}),
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"run": "r"}', '{"run": "r", "last": 3}'])
def test_a_damaged_state_begins_again(tmp_path: Path, damage: str) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "mlflow.json").write_text(damage)
    assert Sender("mlflow", tmp_path, {}).last == {}


# ------------------------------------------------------------------------------------------------- real loggers
@needs_wandb
def test_wandb_offline_is_one_run_over_a_restart(tmp_path: Path, begin: Callable[..., tuple]) -> None:
    exp, runs = tmp_path / "exp", set()
    for first in (1, 16):  # the second start does five steps again
        run_log, _ = begin("wandb", first - 1)
        for step in range(first, first + 20):
            run_log.scalars(step, {"loss_train": 1 / step})
            if step % 10 == 0:
                run_log.scalars(step, {"top1_val": float(step)})
        runs.add(sent(exp, "wandb", first + 19))
        run_log.close()
        time.sleep(1)
    points = wandb_points(exp)
    assert points["loss_train"] == [(step, pytest.approx(1 / step)) for step in range(1, 36)]
    assert points["top1_val"] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert len(runs) == 1
    assert len({path.name.rpartition("-")[2] for path in exp.glob("wandb/offline-run-*")}) == 1


@needs_mlflow
def test_an_mlflow_server_killed_in_the_middle_has_the_whole_curve(
    tmp_path: Path, begin: Callable[..., tuple], server: mlflow_server.Server
) -> None:
    exp = tmp_path / "exp"
    run_log, feed = begin("mlflow")
    for step in range(1, 11):
        run_log.scalars(step, {"loss_train": 1 / step})
    run = sent(exp, "mlflow", 10)
    server.kill()
    slowest = 0.0
    for step in range(11, 2511):  # more than the queue holds
        began = time.perf_counter()
        run_log.scalars(step, {"loss_train": 1 / step})
        slowest = max(slowest, time.perf_counter() - began)
    assert slowest < 0.5
    end = time.monotonic() + 30
    while "it will retry" not in text(exp) and time.monotonic() < end:
        feed._listen()
        time.sleep(0.1)
    assert text(exp).count("it will retry") == 1
    server.start()
    assert sent(exp, "mlflow", 2510) == run
    run_log.close()
    assert server.curves(run)["loss_train"] == [(step, pytest.approx(1 / step)) for step in range(1, 2511)]

    # The server is dead while the run ends; the next start sends the rest, to the same run
    run_log, _ = begin("mlflow", 2510)
    server.kill()
    run_log.scalars(2511, {"loss_train": 0.5})
    began = time.perf_counter()
    run_log.close()
    assert time.perf_counter() - began < 1
    server.start()
    run_log, _ = begin("mlflow", 2511)
    assert sent(exp, "mlflow", 2511) == run
    run_log.close()
    assert len(server.curves(run)["loss_train"]) == 2511


@needs_mlflow
def test_mlflow_without_a_server_keeps_a_database_in_the_experiment(
    tmp_path: Path, begin: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_log, _ = begin("mlflow")
    run_log.scalars(1, {"loss_train": 0.5, "loss_val": float("nan")})
    run = sent(tmp_path / "exp", "mlflow", 1)
    run_log.close()
    points = mlflow_server.curves(f"sqlite:///{tmp_path}/exp/mlflow.db", run)
    assert points["loss_train"] == [(1, 0.5)]
    assert points["loss_val"][0][0] == 1


@needs_mlflow
def test_a_server_that_never_answers(
    tmp_path: Path, begin: Callable[..., tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        run_log, feed = begin("mlflow")
        child = feed.process.pid
        for step in range(1, 200):
            run_log.scalars(step, {"loss_train": 1 / step})
        time.sleep(6)  # it waits for the server now
        began = time.perf_counter()
        run_log.close()
        assert time.perf_counter() - began < 1
        end = time.monotonic() + 10
        while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
            assert time.monotonic() < end, "it outlives its run"
            time.sleep(0.1)


# ------------------------------------------------------------------------------------------------- secrets
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-1",
    "HF_TOKEN": "hf_plantedplantedplanted",
    "AWS_SECRET_ACCESS_KEY": "plantedAWSkey/+plantedAWSkey",
}
IN_FILE, IN_FILE_2, USER = "planted-user:planted-secret-2", "planted-frames:planted-secret-3", "planteduser:plantedpw"


@pytest.mark.slow
def test_planted_secrets_reach_no_output(
    tmp_path: Path, tiny_videos: Path, repo_root: Path, request: pytest.FixtureRequest
) -> None:
    """A run, an evaluation and a report, with all loggers that are installed here; then every file is searched."""
    names = [name for name, reason in (("wandb", NO_WANDB), ("mlflow", mlflow_server.MISSING)) if reason is None]
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    if "mlflow" in names:
        server = request.getfixturevalue("server")
        environment["MLFLOW_TRACKING_URI"] = server.uri.replace("://", f"://{USER}@")
    else:
        environment["MLFLOW_TRACKING_URI"] = f"http://{USER}@127.0.0.1:9"
        names = ["wandb", "mlflow"]  # each complains into the log
    (tmp_path / "secret").write_text(f"{IN_FILE}\n{IN_FILE_2}\n")
    exp = experiment.make(tmp_path / "exp", tiny_videos, steps=4, val_freq=4, print_freq=1)
    text_ = (exp / "config.yaml").read_text()
    text_ = text_.replace("reader: video", f"reader: video, memcached: {{secret_file: {tmp_path}/secret}}")
    (exp / "config.yaml").write_text(text_ + f"    loggers: [{', '.join(names)}]\n")

    def call(*words: str, code: int = 0) -> str:
        done = forked.run(
            [sys.executable, "main.py", *words],
            cwd=repo_root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    shown = call("train", str(exp), "--set", "common.data.memcached.timeout_ms=300")
    time.sleep(9)  # the loggers' processes have ended
    shown += call("eval", str(exp)) + call("report", str(exp))
    assert "must not hold a URL with a user name" in call(
        "train", str(exp), "--set", f"common.published.source=https://{USER}@host/x", code=2
    )

    files = [path for folder in (exp, tmp_path / "server") for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"log.txt", "ckpt.pth.tar", "index.html", "scalars.jsonl"}
    planted = [
        *SECRETS.values(),
        IN_FILE,
        IN_FILE_2,
        *(part for one in (IN_FILE, IN_FILE_2) for part in one.split(":")),
    ]
    planted += [USER, *USER.split(":")]
    leaks = [(word, "output") for word in planted if word in shown]
    for path in files:
        data = path.read_bytes()
        leaks += [(word, str(path)) for word in planted if word.encode() in data]
    assert leaks == []
    if NO_WANDB is None:
        assert list(exp.glob("wandb/offline-run-*/*.wandb"))
        sent(exp, "wandb", 4)
    if mlflow_server.MISSING is None:
        sent(exp, "mlflow", 4)


def test_secrets_are_hidden_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_API_KEY", "planted-key-value")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    monkeypatch.setenv("DB_PASSWORD", "123456")
    monkeypatch.setenv("SOME_TOKEN_FILE", "/somewhere/key")
    redact.from_environment.cache_clear()
    try:
        (tmp_path / "secret").write_text("someone:file-secret\n")
        redact.add_file(tmp_path / "secret")
        redact.add_file(tmp_path / "none")
        line = redact.hidden("key planted-key-value, http://me:pw@host/x?a=b, ssh://you@host, file-secret, true")
        assert line == "key ***, http://***@host/x?a=b, ssh://***@host, ***, true"
        assert redact.hidden("123456 in /somewhere/key, step 1234567") == "*** in /somewhere/key, step 1234567"
        with log.RunLog(tmp_path, True, None, echo=False) as run_log:
            run_log.line("uses planted-key-value")
            run_log.event("run", "start", url="http://me:pw@host", message="with planted-key-value")
        assert re.findall(r"\] (.*)", text(tmp_path)) == [
            "uses ***",
            'INFO run: start url=http://***@host message="with ***"',
        ]
    finally:
        redact._known.clear()
        redact.from_environment.cache_clear()
