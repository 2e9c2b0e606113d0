from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests import forked
from tests.ranks import run_ranks
from utils import checkpoint, dist
from utils.checkpoint import BEST, LATEST, PREVIOUS
from utils.engine.state import check
from utils.errors import UserError
from utils.version import VERSION


def state(step: int, size: int = 1000) -> dict:
    """What `find` takes for a checkpoint from which a run can resume."""
    scalars = {"step": step, "validated_step": -1, "best_metric": 1.5, "shards": 1, "group_statistics": None}
    tables = {name: {} for name in ("optimizer", "scaler", "window", "lists")}
    weight = torch.full((size,), float(step))
    return scalars | tables | {"model": {"w": weight}, "config": {"a": [1, "x", None]}}


def run_python(code: str, repo_root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1", **environment}
    return forked.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip_and_rotation(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path) is None
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, LATEST, state(step))
    checkpoint.save(tmp_path, BEST, state(20))
    assert names(tmp_path) == {LATEST, PREVIOUS, BEST}
    assert checkpoint.load(tmp_path / PREVIOUS)["step"] == 20
    resumed = checkpoint.find(tmp_path)
    assert resumed is not None
    assert (resumed.path.name, resumed.state["step"]) == (LATEST, 30)
    assert resumed.messages == [f"resuming from {LATEST}, step 30"]
    assert torch.equal(resumed.state["model"]["w"], state(30)["model"]["w"])
    assert resumed.state["config"] == state(30)["config"]


def test_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, LATEST, state(1))
    with pytest.raises(TypeError, match="plain Python types"):
        checkpoint.save(tmp_path, LATEST, {"step": 2, "metric": np.float64(1.0), "path": Path("x")})
    assert names(tmp_path) == {LATEST}
    assert checkpoint.load(tmp_path / LATEST)["step"] == 1


def damaged_files(good: bytes) -> dict[str, bytes]:
    cuts = [1, 3, 30, 63, 64, 65, len(good) // 2, len(good) - 200, len(good) - 22, len(good) - 1]
    flips = [len(good) // 4, len(good) // 2, good.index(b"data.pkl") + 60]
    files = {f"cut at {cut}": good[:cut] for cut in cuts}
    for place in flips:
        files[f"bit at {place}"] = good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :]
    files |= {"empty": b"", "text": b"not a checkpoint\n" * 50, "zeros": bytes(len(good))}
    return files


def test_damaged_latest_falls_back_and_says_so(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, LATEST, state(step))
    checkpoint.save(tmp_path, BEST, state(10))
    for what, data in damaged_files((tmp_path / LATEST).read_bytes()).items():
        (tmp_path / LATEST).write_bytes(data)
        with pytest.raises(checkpoint.CorruptCheckpoint, match="not a whole checkpoint"):
            checkpoint.load(tmp_path / LATEST)
        resumed = checkpoint.find(tmp_path)
        assert resumed is not None, what
        assert (resumed.path.name, resumed.state["step"]) == (PREVIOUS, 10), what
        assert any(LATEST in message and "is skipped" in message for message in resumed.messages), what


def test_newer_best_wins_over_previous(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, LATEST, state(step))
    checkpoint.save(tmp_path, BEST, state(20))
    (tmp_path / LATEST).write_bytes(b"")
    resumed = checkpoint.find(tmp_path)
    assert resumed is not None
    assert (resumed.path.name, resumed.state["step"]) == (BEST, 20)
    assert any(PREVIOUS in message and "older (step 10)" in message for message in resumed.messages)


FOREIGN = {
    "weights alone": lambda good: {"step": 30, "model": good["model"]},
    "no optimizer": lambda good: {key: value for key, value in good.items() if key != "optimizer"},
    "no config": lambda good: good | {"config": None},
    "step is a text": lambda good: good | {"step": "30"},
    "weights are numbers": lambda good: good | {"model": {"w": 1.0}},
    "no shards": lambda good: good | {"shards": 0},
    "ema without its weights": lambda good: good | {"config": {"ema": 0.9}},
    "teacher unknown": lambda good: good | {"config": {"distill": {"teacher": "x", "kind": "kd"}}, "distill": {}},
    "window of numbers": lambda good: good | {"window": {"loss": 1.0}},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_no_run_can_go_on_from_is_passed_over(tmp_path: Path, what: str) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, LATEST, state(step))
    torch.save(FOREIGN[what](state(30)), tmp_path / LATEST)
    resumed = checkpoint.find(tmp_path, check)
    assert resumed is not None
    assert (resumed.path.name, resumed.state["step"]) == (PREVIOUS, 10)
    assert "not a checkpoint that a training run can resume from" in resumed.messages[0]
    (tmp_path / PREVIOUS).unlink()
    with pytest.raises(UserError, match=r"no checkpoint can be read \(ckpt\.pth\.tar is skipped: .*--fresh"):
        checkpoint.find(tmp_path, check)


@pytest.mark.parametrize("what", ["folder", "loop", "fifo", "dangling", "missing", "no step"])
def test_odd_latest(tmp_path: Path, what: str) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, LATEST, state(step))
    latest = tmp_path / LATEST
    latest.unlink()
    if what == "folder":
        latest.mkdir()
    elif what == "loop":
        latest.symlink_to(latest)
    elif what == "fifo":
        os.mkfifo(latest)
    elif what == "dangling":
        latest.symlink_to(tmp_path / "nowhere")
    elif what == "no step":
        torch.save({"model": {}}, latest)
    resumed = checkpoint.find(tmp_path)
    assert resumed is not None
    assert (resumed.path.name, resumed.state["step"]) == (PREVIOUS, 10)
    assert LATEST in resumed.messages[0]


def test_nothing_readable_is_an_error_not_a_new_run(tmp_path: Path) -> None:
    (tmp_path / LATEST).write_bytes(b"x")
    (tmp_path / PREVIOUS).mkdir()
    with pytest.raises(UserError, match=r"no checkpoint can be read.*ckpt\.pth\.tar.*ckpt_prev.*--fresh"):
        checkpoint.find(tmp_path)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / BEST)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({"step": 1, "x": Bomb()}, tmp_path / LATEST)
    with pytest.raises(checkpoint.CorruptCheckpoint, match="never run"):
        checkpoint.load(tmp_path / LATEST)
    assert not (tmp_path / "exploded").exists()


def test_cut_latest_does_not_push_out_the_good_previous(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, LATEST, state(step))
    (tmp_path / LATEST).write_bytes((tmp_path / LATEST).read_bytes()[:500])
    checkpoint.save(tmp_path, LATEST, state(30))
    assert checkpoint.load(tmp_path / LATEST)["step"] == 30
    assert checkpoint.load(tmp_path / PREVIOUS)["step"] == 10


def test_size_limit_leaves_the_old_one(tmp_path: Path, repo_root: Path) -> None:
    checkpoint.save(tmp_path, LATEST, state(1))
    done = run_python(
        f"""
        import resource, signal, torch
        from pathlib import Path
        from utils import checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            checkpoint.save(Path({str(tmp_path)!r}), checkpoint.LATEST, {{"step": 2, "w": torch.zeros(1_000_000)}})
        except checkpoint.CheckpointError as error:
            print(error)
        """,
        repo_root,
    )
    assert "needs 3.8 MiB" in done.stdout, done.stderr
    assert "ulimit -f" in done.stdout
    assert names(tmp_path) == {LATEST}
    assert checkpoint.load(tmp_path / LATEST)["step"] == 1


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MiB; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
        )
    except OSError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_leaves_the_old_one(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(small_disk, LATEST, state(1))
    big = {"step": 2, "w": torch.zeros(500_000)}
    with pytest.raises(checkpoint.CheckpointError, match=r"needs 1\.9 MiB .*\d\.\d MiB are free.*are unchanged.*Make"):
        checkpoint.save(small_disk, LATEST, big)
    # Somebody else's file may fill the disk after the look at the free space: torch then raises a RuntimeError.
    monkeypatch.setattr("utils.checkpoint_file._require_space", lambda *_: None)
    with pytest.raises(checkpoint.CheckpointError, match=r"no space left for the checkpoint, which needs 1\.9 MiB"):
        checkpoint.save(small_disk, LATEST, big)
    assert names(small_disk) == {LATEST}
    assert checkpoint.load(small_disk / LATEST)["step"] == 1


def test_no_room_for_the_first_checkpoint_promises_nothing(small_disk: Path) -> None:
    big = {"step": 2, "w": torch.zeros(500_000)}
    with pytest.raises(checkpoint.CheckpointError, match="none was saved before it.*starts from the beginning"):
        checkpoint.save(small_disk, LATEST, big)
    checkpoint.save(small_disk, LATEST, state(1))
    with pytest.raises(checkpoint.CheckpointError, match="are unchanged.*it resumes from there"):
        checkpoint.save(small_disk, BEST, big)  # there was no best one, but the run has a checkpoint


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from tests.utils.test_checkpoint import state
from utils import checkpoint
folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
size = 200_000
checkpoint.save(folder, checkpoint.LATEST, state(0, size))
last, steps, leftovers = 0, set(), 0
for _ in range(kills):
    child = os.fork()
    if child == 0:
        step = last
        while True:
            step += 1
            checkpoint.save(folder, checkpoint.LATEST, state(step, size))
            if step % 3 == 0:
                checkpoint.save(folder, checkpoint.BEST, state(step, size))
    time.sleep(random.uniform(0.002, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    leftovers += any(".tmp-" in path.name for path in folder.iterdir())
    found = checkpoint.find(folder)
    assert found is not None and found.path.name == checkpoint.LATEST, found
    assert found.state["step"] >= last and bool((found.state["model"]["w"] == found.state["step"]).all())
    last = found.state["step"]
    for name in (checkpoint.PREVIOUS, checkpoint.BEST):
        if (folder / name).exists():
            checkpoint.load(folder / name)
checkpoint.save(folder, checkpoint.LATEST, {"step": last + 1})
print(last, leftovers, sorted(path.name for path in folder.iterdir() if ".tmp-" in path.name))
"""


def test_kill_9_at_random_moments(tmp_path: Path, repo_root: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    script = tmp_path / "kills.py"
    script.write_text(KILLS)
    folder = tmp_path / "exp"
    folder.mkdir()
    done = forked.run(
        [sys.executable, str(script), str(folder), "40", str(seed)],
        env={**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    last, leftovers, left = done.stdout.split(maxsplit=2)
    assert int(last) > 0, "no save was ever completed: the kills came too early to test anything"
    assert int(leftovers) > 0, "no kill ever came inside a save"
    assert left.strip() == "[]", f"temporary files of dead processes were not swept: {left}"


@pytest.mark.parametrize(
    ("point", "latest", "previous"),
    [("tmp", 2, 1), ("linked", 2, 1), ("replace", 3, 1), ("done", 3, 2)],
)
def test_kill_9_at_named_points(tmp_path: Path, repo_root: Path, point: str, latest: int, previous: int) -> None:
    done = run_python(
        f"""
        from pathlib import Path
        from utils import checkpoint
        for step in (1, 2, 3):
            checkpoint.save(Path({str(tmp_path)!r}), checkpoint.LATEST, {{"step": step}})
        """,
        repo_root,
        ZOETROPE_FAILPOINT=f"checkpoint.{point}:0:3",
    )
    assert done.returncode == -9, done.stderr
    assert checkpoint.load(tmp_path / LATEST)["step"] == latest
    assert checkpoint.load(tmp_path / PREVIOUS)["step"] == previous
    checkpoint.save(tmp_path, LATEST, state(4))
    assert names(tmp_path) == {LATEST, PREVIOUS}
    assert checkpoint.load(tmp_path / PREVIOUS)["step"] == latest


def test_unwritable_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / LATEST).mkdir()  # as good as any other reason why the rename fails, and it works for root too
    with pytest.raises(checkpoint.CheckpointError, match="could not be written"):
        checkpoint.save(tmp_path, LATEST, state(1))
    assert names(tmp_path) == {LATEST}


def net(classes: int = 4, width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, classes))


def test_load_model() -> None:
    source, target = net(), net()
    checkpoint.load_model(target, source.state_dict(), "f.pth")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    with pytest.raises(UserError, match=r"f\.pth: trained with num_class: 7, this model has num_class: 4 \(2\.weight"):
        checkpoint.load_model(target, net(classes=7).state_dict(), "f.pth")
    other = {f"layer{i}.weight": torch.zeros(1) for i in range(20)}
    with pytest.raises(UserError, match=r"missing in the file: 0\.weight.*9 in all; not in the model: .*20 in all"):
        checkpoint.load_model(target, other, "f.pth")
    with pytest.raises(UserError, match=r"0\.weight \(6, 5\) in the file, \(3, 5\) here"):
        checkpoint.load_model(target, net(width=6).state_dict(), "f.pth")


def test_check_resume() -> None:
    free = ("common.workers", 2, 4, True)
    lines = checkpoint.check_resume({"step": 5}, [free])
    assert lines == ["config: common.workers: 2 -> 4 (allowed on resume)"]
    with pytest.raises(UserError) as refused:
        checkpoint.check_resume({"step": 5}, [free, ("common.seed", 1, 2, False), ("common.momentum", 0.9, 0.8, False)])
    text = str(refused.value)
    assert "common.seed: 1 -> 2" in text
    assert "common.momentum: 0.9 -> 0.8" in text
    assert "workers" not in text
    assert "--fresh" in text


def test_find_in_a_world_of_one(tmp_path: Path) -> None:
    world = dist.World()
    assert checkpoint.find_on_all_ranks(tmp_path, world) is None
    checkpoint.save(tmp_path, LATEST, state(3))
    resumed = checkpoint.find_on_all_ranks(tmp_path, world)
    assert resumed is not None
    assert resumed.state["step"] == 3


def find_on_a_rank(world: dist.World, folder: str) -> list[str]:
    """What one rank finds: in the folder, in `kept`, and where rank 0 alone fails (tests/ranks.py calls it by name)."""
    newest = checkpoint.find_on_all_ranks(Path(folder), world)
    kept = checkpoint.find_on_all_ranks(Path(folder, "kept"), world)
    assert newest is not None
    assert kept is not None
    lines = [
        f"{newest.path.name} {newest.state['step']} {len(newest.messages)}",
        f"{kept.path.name} {kept.state['step']}",
    ]
    world.barrier()
    if world.is_main:
        Path(folder, PREVIOUS).unlink()
    world.barrier()
    try:
        checkpoint.find_on_all_ranks(Path(folder), world)
    except UserError as error:
        lines.append(type(error).__name__)
    return lines


def test_find_by_two_ranks(tmp_path: Path) -> None:
    for step in (3, 4):
        checkpoint.save(tmp_path, LATEST, state(step))
    (tmp_path / LATEST).write_bytes(b"torn")
    (tmp_path / "kept").mkdir()
    checkpoint.save(tmp_path / "kept", LATEST, state(8) | {"token": 6}, keep_as=6)
    checkpoint.save(tmp_path / "kept", BEST, state(7) | {"token": 5})
    (tmp_path / "late").write_bytes((tmp_path / PREVIOUS).read_bytes())
    (tmp_path / "late").replace(tmp_path / "kept" / LATEST)
    first, second = run_ranks(__file__, "find_on_a_rank", 2, folder=str(tmp_path))
    kept = "ckpt.start-6.pth.tar 8"
    assert first == [f"{PREVIOUS} 3 2", kept, "UserError"]
    assert second == [f"{PREVIOUS} 3 0", kept, "AgreedError"]


def test_versions(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, LATEST, {"step": 1, "versions": checkpoint.versions()})
    versions = checkpoint.load(tmp_path / LATEST)["versions"]
    assert versions["torch"] == str(torch.__version__)
    assert versions["zoetrope"] == VERSION


def test_another_resize_kernel_is_refused_and_none_is_the_one_of_now() -> None:
    assert checkpoint.check_resume({"step": 5, "resize": "cv2-linear"}, [], None, "cv2-linear") == []
    assert checkpoint.check_resume({"step": 5}, [], None, "cv2-linear") == [], "from before it was kept"
    with pytest.raises(UserError, match=r"the resize kernel of the readers: 'cv2-area' -> 'cv2-linear'"):
        checkpoint.check_resume({"step": 5, "resize": "cv2-area"}, [], None, "cv2-linear")
