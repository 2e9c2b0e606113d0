"""The launcher on a real SLURM: runs that are stopped, requeued and cancelled; only in `make nightly`.

The long runs are the rows of tests/benchmarks/cluster.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import simplejpeg

from tests.datasets.videos import frame_image
from tests.experiment import make
from tests.log_lines import parse_log
from tests.memcached import MISSING
from tests.slurm.cluster import PARTITION, LocalSlurm, until

pytestmark = [pytest.mark.slurm, pytest.mark.nightly]


def test_a_request_of_32_has_the_shape_that_was_asked_for(
    slurm: LocalSlurm, tmp_path: Path, motion_videos: Path
) -> None:
    exp = make(tmp_path / "shape", motion_videos)
    blocker = slurm.run(
        "sbatch", "--parsable", "-p", PARTITION, "-o", "/dev/null", "--wrap", "sleep 300"
    ).stdout.strip()
    eight = tmp_path / "eight.yaml"
    eight.write_text("defaults: {gpus_per_node: 8, cpus_per_gpu: 2, time: 60}\n")
    env, slurm.env = slurm.env, {**slurm.env, "ZOETROPE_CLUSTER": str(eight)}
    try:
        job = slurm.submit("train", exp, 32, "--dependency", f"afterok:{blocker}")
        shown = slurm.job(job)
        second = slurm.launch("train", exp, PARTITION, "32", check=False)
        assert slurm.launch("cancel", exp).stdout.startswith(f"cancelled {job}")
    finally:
        slurm.env = env
        slurm.run("scancel", blocker)
    assert (shown["NumNodes"].split("-")[0], shown["NumTasks"], shown["CPUs/Task"], shown["Requeue"]) == (
        "4",
        "32",
        "2",
        "1",
    )
    assert shown["NtasksPerN:B:S:C"].startswith("8:")
    assert shown["TresPerNode"].endswith("gpu:8")
    assert shown["TimeLimit"] == "01:00:00"
    assert "#SBATCH --signal=USR2@120" in (exp / f"jobs/slurm/{job}_submission.sh").read_text()
    assert second.returncode == 2
    assert f"job {job} of this experiment is PENDING (Dependency)" in second.stderr


def test_stopped_requeued_and_cancelled(slurm: LocalSlurm, tmp_path: Path, motion_videos: Path) -> None:
    """Two nodes, a folder with a hostile name; the run gets a signal, resumes, and ends like an undisturbed one."""
    settings = {"steps": 8, "val_freq": 8, "print_freq": 1}
    exp = make(tmp_path / 'it\'s $(touch canary); "x" é', motion_videos, **settings)
    job = slurm.submit("train", exp, 2)
    log = exp / "log.txt"
    until(lambda: log.exists() and "Iter: [2/8]" in log.read_text(), 120, lambda: slurm.output(exp))
    slurm.run("scancel", "--signal=USR2", job)
    assert slurm.wait_for_end(job, exp)["JobState"] == "COMPLETED", slurm.output(exp)
    text = log.read_text()
    assert " by=SIGUSR2 " in text
    assert f"INFO job: restart number=1 job={job} nodes=node" in text
    assert list(tmp_path.rglob("canary")) == []
    steps = [line["step"] for line in parse_log(log)]
    assert steps == list(range(1, 9)), "no iteration was done twice or left out"

    slurm.run("scontrol", "requeue", job)  # a finished run that is requeued has nothing to do
    until(lambda: "run: nothing_to_do" in log.read_text(), 90, lambda: slurm.output(exp))
    listed = slurm.launch("status", exp).stdout
    assert job in listed
    assert "iteration 8 of 8" in listed
    assert json.loads((exp / "jobs/jobs.jsonl").read_text())["job"] == job


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_two_nodes_share_memcached_servers_that_start_with_the_job(slurm: LocalSlurm, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "lists").mkdir(parents=True)
    for video in range(8):
        (data / f"v{video}").mkdir()
        for number in range(8):
            image = simplejpeg.encode_jpeg(frame_image(8 * video + number))
            (data / f"v{video}" / f"img_{number + 1:05d}.jpg").write_bytes(image)
    for name in ("train", "val"):
        (data / "lists" / f"{name}.txt").write_text("".join(f"v{video} 8 {video}\n" for video in range(8)))
    (data / "lists" / "classInd.txt").write_text("".join(f"{video} class{video}\n" for video in range(8)))
    exp = make(tmp_path / "exp", data, steps=8, val_freq=4, workers=1)
    job = slurm.submit(
        "train", exp, 2, "--set", "data.reader=memcached", "--set", "data.memcached.megabytes=64",
        "--set", "data.memcached.timeout_ms=2000.0",
    )  # fmt: skip
    assert slurm.wait_for_end(job, exp)["JobState"] == "COMPLETED", slurm.output(exp)
    text = (exp / "log.txt").read_text()
    folder = exp / "jobs" / "memcached" / job
    logs = "".join(file.read_text() for file in folder.glob("*.log"))
    assert "2 rank(s), since the start" in text, text + logs
    assert "no server 0," in text, text + logs
    last = [line for line in text.splitlines() if "since the start" in line][-1]
    assert float(last.split("hit rate ")[1].split()[0]) > 0.3, text
    assert len(list(folder.glob("*.log"))) == 2
    assert not list(folder.glob("*.server")), "the servers went with the job"
