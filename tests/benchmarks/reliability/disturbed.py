"""Train a tiny experiment on forked ranks, disturb one of them at a named point, and compare what is left at the end.

The ranks are forked from a process that has imported everything, so a start costs a fraction of a second. They run
`main.main(["train", ...])` as under srun: a process each, which meet through MASTER_ADDR and MASTER_PORT. Fail points
(`utils.errors.fail_point`) set where they are disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("anal_tools", "datasets", "launch", "methods", "networks", "tests", "utils")
STEPS, VAL_FREQ = 12, 4
FROZEN_SECONDS = 0.2  # between SIGSTOP and SIGCONT
GRACE_SECONDS = 90.0  # for the other ranks to leave after one has died; a launcher would kill them at once
START_SECONDS = 600.0  # for a whole start; longer counts as a hang
STOPPED, LOST = 75, 1  # exit codes of main.py: saved on request; another rank is gone

TOY = '''\
"""Soak: two small convolutions, batch norm, dropout (for the soak programme; trains in milliseconds)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods._heads import new_classifier, new_dropout


class Soak(nn.Module):
    """Frames -> channels -> the mean over time -> channels -> classes."""

    def __init__(self, num_class: int, num_segments: int, dropout: float) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv3d(3, 8, (2, 5, 5), stride=(1, 4, 4), bias=False), nn.BatchNorm3d(8), nn.ReLU()
        )
        self.deep = nn.Sequential(nn.Conv2d(8, 24, 3, stride=2), nn.BatchNorm2d(24), nn.ReLU())
        self.wide = nn.Linear(24, 96)
        self.dropout = new_dropout(dropout)
        self.classifier = new_classifier(96, num_class, 0.01)
        self.frames_per_clip = num_segments

    def forward(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, K)."""
        maps = self.deep(self.backbone(clips).mean(2))
        return self.classifier(self.dropout(torch.relu(self.wide(maps.mean((2, 3))))))


def build(
    *, backbone: str, num_class: int, num_segments: int, dropout: float = 0.5, pretrained: bool | str = False
) -> Soak:
    """The soak programme's own method; `backbone` and `pretrained` mean nothing to it."""
    return Soak(num_class, num_segments, dropout)
'''


@dataclass(frozen=True)
class Event:
    """What happens to one rank, in one start of a run.

    Attributes:
        phase: step, checkpoint, validation, precise_bn or start.
        point: name of a fail point.
        rank: whom it hits.
        count: at which arrival of the rank at this point, from 1, counted from the start of the process.
        action: as `utils.errors.fail_point` names them.
        everyone: the other ranks then get the same signal, as in a preemption.
    """

    phase: str
    point: str
    rank: int
    count: int
    action: str
    everyone: bool = False


@dataclass
class Start:
    """How one start of a run ended.

    Attributes:
        codes: rank -> exit code, negative for a signal.
        hit: the event has happened.
        hung: the ranks had to be killed.
        output: what the ranks printed.
    """

    codes: dict[int, int] = field(default_factory=dict)
    hit: bool = False
    hung: bool = False
    output: str = ""

    @property
    def is_finished(self) -> bool:
        """True when every rank came to the end of the run."""
        return set(self.codes.values()) == {0}


def copy_code(target: Path) -> Path:
    """Copy the repository's code, and add the tiny method: a method is found by its file."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pth*"))
    for name in ("main.py", "pyproject.toml"):
        shutil.copy2(ROOT / name, target / name)
    (target / "methods" / "soak.py").write_text(TOY, encoding="utf-8")
    return target


def write_experiment(folder: Path, data: Path, settings: Mapping[str, Any]) -> Path:
    """Write the config of a tiny experiment; `settings` holds dotted keys of `common` that replace its values."""
    common: dict[str, Any] = {
        "model": {"type": "soak", "backbone": "resnet18", "num_segments": 2, "num_class": 8, "dropout": 0.3},
        "augmentation": {"input_size": 32, "test_resize": 36, "crop": "random_resized", "colorjitter": [0.2] * 4},
        "data": {"reader": "video", "deadline_seconds": 600.0},  # a late sample would rightly change the bits
        "workers": 0,
        "batch_size": 2,
        "lr_scheduler": {"type": "COSINE", "base_lr": 0.05, "warmup_steps": 2, "warmup_lr": 0.1, "max_iter": STEPS},
        "momentum": 0.9,
        "weight_decay": 0.0001,
        "nesterov": True,
        "val_freq": VAL_FREQ,
        "print_freq": 1,
        "train_root": str(data),
        "train_source": str(data / "lists/train.txt"),
        "val_root": str(data),
        "val_source": str(data / "lists/val.txt"),
    }
    common["model"] |= {"pretrained": False, "kwargs": {}}
    for name, value in settings.items():
        *above, last = name.split(".")
        table = common
        for key in above:
            table = table.setdefault(key, {})
        table[last] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"common": common}, indent=1), encoding="utf-8")  # JSON is YAML
    return folder


def warm_up() -> None:
    """Import what a rank needs. Raises RuntimeError if that has started threads: they would not survive a fork."""
    import av  # noqa: F401
    import torch.distributed
    import torch.utils.tensorboard  # noqa: F401

    import datasets.loading.loader  # noqa: F401
    import main  # noqa: F401
    import methods
    import utils.engine.setup  # noqa: F401

    methods.names()
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads after the imports: set OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1")


def run_ranks(exp: Path, ranks: int, event: Event | None = None, overrides: Sequence[str] = ()) -> Start:
    """Start a run, or continue it; act on the event; return when no rank is left."""
    while True:
        start = _Ranks(exp, ranks, event, overrides).wait()
        if "is taken on" not in start.output:  # the port that was free a moment ago
            return start


class _Ranks:
    """The forked ranks of one start."""

    def __init__(self, exp: Path, ranks: int, event: Event | None, overrides: Sequence[str]) -> None:
        self.event, self.start = event, Start()
        self.marker = exp.parent / f"{exp.name}.hit"
        self.log = exp.parent / f"{exp.name}.out"
        self.marker.unlink(missing_ok=True)
        self.log.write_bytes(b"")
        env = {"WORLD_SIZE": str(ranks), "ZOETROPE_RANKS": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())} if ranks > 1 else {}
        if event:
            env["ZOETROPE_FAILPOINT"] = f"{event.point}:{event.rank}:{event.count}:{event.action}"
            env["ZOETROPE_FAILPOINT_LOG"] = str(self.marker)
        argv = ["train", str(exp), *[word for item in overrides for word in ("--set", item)]]
        self.pids = {
            fork(lambda rank=rank: _rank(argv, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, self.log)): rank
            for rank in range(ranks)
        }

    def wait(self) -> Start:
        """Reap the ranks, thaw a frozen one, pass a preemption on, and end what is left after a death."""
        deadline, is_preempted = time.monotonic() + START_SECONDS, False
        while self.pids:
            if not is_preempted and self.event and self.event.everyone and self.marker.exists():
                is_preempted = True
                self._send(signal.Signals[f"SIG{self.event.action.upper()}"], but=self.event.rank)
            for pid, rank in list(self.pids.items()):
                if self._reap(pid, rank) not in (None, 0, STOPPED):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                self.start.hung = True
                self._send(signal.SIGKILL)
            time.sleep(0.005)
        self.start.hit = self.marker.exists()
        self.start.output = self.log.read_text(encoding="utf-8", errors="replace")
        return self.start

    def _reap(self, pid: int, rank: int) -> int | None:
        waited, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if not waited:
            return None
        if os.WIFSTOPPED(status):
            time.sleep(FROZEN_SECONDS)
            os.kill(pid, signal.SIGCONT)
            return None
        del self.pids[pid]
        self.start.codes[rank] = os.waitstatus_to_exitcode(status)
        return self.start.codes[rank]

    def _send(self, number: signal.Signals, but: int = -1) -> None:
        for pid, rank in self.pids.items():
            if rank != but:
                os.kill(pid, number)


def fork(action: Callable[[], int]) -> int:
    """Run an action in a forked process, whose exit code is what it returns; gives the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = action()
    except BaseException:  # noqa: BLE001  the process must end here, and say why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(argv: list[str], env: Mapping[str, str], log: Path) -> int:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    import main

    return main.main(argv)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def outcome(exp: Path) -> dict[str, str]:
    """sha256 of each part of what a run leaves; made in a process of its own, for torch may start threads."""
    reading, writing = os.pipe()

    def hash_all() -> int:
        with os.fdopen(writing, "w") as file:
            json.dump(_outcome(exp), file)
        return 0

    pid = fork(hash_all)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(pid, 0)
    if not text:
        raise RuntimeError(f"{exp}: its checkpoints cannot be compared, see above")
    return json.loads(text)


def _outcome(exp: Path) -> dict[str, str]:
    import torch

    from utils import log

    digests: dict[str, str] = {}
    for name in ("ckpt.pth.tar", "ckpt_best.pth.tar"):
        state = torch.load(exp / name, weights_only=True)
        parts = {key: state.get(key) for key in ("ema", "peer", "precise_bn", "scaler", "group_statistics")}
        parts |= {"momentum": state["optimizer"]["state"]}
        buffers = {key: value for key, value in state["model"].items() if _is_buffer(key)}
        parts |= {"buffers": buffers, "weights": {k: v for k, v in state["model"].items() if k not in buffers}}
        parts |= {"numbers": {key: state[key] for key in ("step", "validated_step", "best_metric")}}
        parts |= {"window": {key: values for key, values in state["window"].items() if key not in ("time", "data")}}
        digests |= {f"{name}: {part}": _digest(value) for part, value in parts.items() if value is not None}
    curves = log.read_scalars(exp / "events" / log.SCALARS)
    return digests | {f"curve {tag}": _digest(curve) for tag, curve in curves.items()}


def _is_buffer(key: str) -> bool:
    return key.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _digest(value: object) -> str:
    """sha256 of nested tables of tensors and numbers, bit for bit."""
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield f"{key}:".encode()
            yield from _pieces(value[key])
    elif hasattr(value, "numpy"):
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        yield value.contiguous().numpy().tobytes()
    else:
        yield repr(value).encode()


@contextmanager
def kept_only_if_different(folder: Path) -> Iterator[list[str]]:
    """Give a list for what differs; afterwards remove the folder if the list has stayed empty."""
    different: list[str] = []
    yield different
    if not different:
        shutil.rmtree(folder, ignore_errors=True)
