"""A job on two nodes whose memcached servers are started with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import simplejpeg

from tests.datasets.videos import frame_image
from tests.experiment import make
from tests.memcached import MISSING
from tests.slurm.cluster import LocalSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


def test_two_nodes_share_their_servers(slurm: LocalSlurm, tmp_path: Path) -> None:
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
