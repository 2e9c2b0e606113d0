"""Cut the network between two nodes of a run: every rank leaves with a sentence, and the run resumes afterwards.

The nodes are two network namespaces of this machine, joined by a pair of virtual interfaces with addresses of a private
network that exists only there. Needs root, `ip` and `iptables`; where these are missing the row is skipped.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.experiments import demo_videos, small_experiment
from tests.benchmarks.reliability.marked import Mark, wait_for

ROOT = Path(__file__).resolve().parents[3]
COLLECTIVE_SECONDS = 10
JOIN_SECONDS = 40  # on a busy machine the ranks are not at the meeting at the same time
LEAVING_SECONDS = 10.0  # on top: the interpreter's end, on a busy machine
CASES = (("dropped", "training"), ("dropped", "validation"), ("dropped", "start"), ("link down", "training"))
RANKS = 4
_ADDRESSES = ("10.254.77.1", "10.254.77.2")


class NoNetwork(Exception):
    """Why there can be no namespaces here."""


class TwoNodes:
    """Two network namespaces joined by a cable."""

    def __init__(self) -> None:
        for tool in ("ip", "iptables"):
            if shutil.which(tool) is None:
                raise NoNetwork(f"{tool} is not installed")
        self.names = [f"zoetrope-{os.getpid()}-{side}" for side in "ab"]
        self.cables = [f"zt{os.getpid() % 100000}{side}" for side in "ab"]
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            peer = ["peer", "name", self.cables[1], "netns", self.names[1]]
            _run("ip", "link", "add", self.cables[0], "netns", self.names[0], "type", "veth", *peer)
            for side in range(2):
                self.inside(side, "ip", "addr", "add", f"{_ADDRESSES[side]}/30", "dev", self.cables[side])
                self.inside(side, "ip", "link", "set", "lo", "up")
                self.inside(side, "ip", "link", "set", self.cables[side], "up")
            self.inside(0, "iptables", "-L", "-n")
        except subprocess.CalledProcessError as error:
            self.close()
            raise NoNetwork(f"{error.cmd} failed: {error.stderr.strip()}") from error

    def inside(self, side: int, *words: str) -> None:
        """Run a command in the namespace of one node."""
        _run("ip", "netns", "exec", self.names[side], *words)

    def cut(self, how: str) -> None:
        """Drop all packets between the nodes, without a word to either."""
        if how == "link down":
            self.inside(1, "ip", "link", "set", self.cables[1], "down")
        else:
            self.inside(0, "iptables", "-A", "INPUT", "-i", self.cables[0], "-j", "DROP")
            self.inside(0, "iptables", "-A", "OUTPUT", "-o", self.cables[0], "-j", "DROP")

    def join(self) -> None:
        """Repair what `cut` did."""
        self.inside(0, "iptables", "-F")
        self.inside(1, "ip", "link", "set", self.cables[1], "up")

    def close(self) -> None:
        """Remove the namespaces, and the cable with them."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


class Job:
    """Ranks of one run, half of them on each node, started as a cluster without our launcher would."""

    def __init__(self, nodes: TwoNodes, exp: Path, port: int) -> None:
        self.exp, self.mark = exp, Mark()
        self.outputs = [exp.parent / f"{exp.name}-{port}-rank{rank}.txt" for rank in range(RANKS)]
        self.ranks = []
        for rank, output in enumerate(self.outputs):
            side = rank * 2 // RANKS
            variables = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank % (RANKS // 2))}
            variables |= {"MASTER_ADDR": _ADDRESSES[0], "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            variables |= {"GLOO_SOCKET_IFNAME": nodes.cables[side], "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
            variables |= {
                "ZOETROPE_COLLECTIVE_SECONDS": str(COLLECTIVE_SECONDS),
                "ZOETROPE_JOIN_SECONDS": str(JOIN_SECONDS),
            }
            words = ["ip", "netns", "exec", nodes.names[side], sys.executable, "main.py", "train", str(exp)]
            with output.open("wb") as stream:
                env = os.environ | variables | self.mark.env
                self.ranks.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=stream, stderr=stream))

    def ended(self) -> bool:
        """Return True when no rank is left."""
        return all(rank.poll() is not None for rank in self.ranks)

    def codes(self) -> list[int | None]:
        """Return the exit code of each rank; None of one that runs."""
        return [rank.poll() for rank in self.ranks]

    def sentences(self) -> list[str]:
        """Return the last line of each rank's output."""
        return [(output.read_text(errors="replace").strip().splitlines() or [""])[-1] for output in self.outputs]

    def traces(self) -> int:
        """Return how many ranks printed a Python trace."""
        return sum("Traceback" in output.read_text(errors="replace") for output in self.outputs)


def iterations(exp: Path) -> list[int]:
    """Return the iterations in log.txt, in the order in which they were done."""
    log = exp / "log.txt"
    return [int(text) for text in re.findall(r"Iter: \[(\d+)/", log.read_text())] if log.exists() else []


def one(nodes: TwoNodes, work: Path, data: Path, case: tuple[str, str], chance: random.Random, port: int) -> dict:
    """Cut the cable at a drawn moment, and resume after its repair."""
    how, moment = case
    settings = {"steps": 60, "val_freq": 20, "print_freq": 1}
    if moment == "validation":
        settings |= {"val_freq": 1}  # most of the time goes into validations
    extra = "    save_minutes: 0.02\n"
    exp = small_experiment(work / f"exp-{port}", data, extra, **settings)
    job = Job(nodes, exp, port)
    try:
        if moment != "start":
            wait_for(lambda: len(iterations(exp)) >= 3 or job.ended(), 120)
        else:
            wait_for(lambda: job.outputs[0].stat().st_size > 0 or (exp / "jobs/lock.json").exists(), 120)
        time.sleep(chance.uniform(0.0, 2.0))
        hit, at = not job.ended(), max(iterations(exp), default=0)
        nodes.cut(how)
        began = time.monotonic()
        limit = (JOIN_SECONDS if moment == "start" else COLLECTIVE_SECONDS) + LEAVING_SECONDS
        all_left = wait_for(job.ended, limit + 30)
        seconds = time.monotonic() - began
        codes, sentences, traces = job.codes(), job.sentences(), job.traces()
    finally:
        job.mark.kill()
        for rank in job.ranks:
            rank.wait()
        nodes.join()
    again = Job(nodes, exp, port + 1)
    try:
        resumed = wait_for(lambda: max(iterations(exp), default=0) > max(at, 3) or again.ended(), 120)
        resumed = resumed and not any(again.codes())
        for rank in again.ranks:
            rank.send_signal(signal.SIGTERM)
        stopped = wait_for(again.ended, 60) and set(again.codes()) <= {75, 0}
    finally:
        again.mark.kill()
        for rank in again.ranks:
            rank.wait()
    in_words = sum(text.startswith("error: ") for text in sentences)
    good = all_left and seconds <= limit and 0 not in codes and in_words == RANKS and not traces
    result = {"case": f"{how} in {moment}", "hit": hit, "at": at, "seconds": round(seconds, 1), "codes": codes}
    return result | {"sentences": sorted(set(sentences)), "resumed": resumed and stopped, "good": bool(good)}


def row() -> dict:
    """Measure each case once at a moment drawn from $ZOETROPE_SEED."""
    seed = int(os.environ.get("ZOETROPE_SEED") or time.time())
    print(f"partition: seed={seed}", file=sys.stderr, flush=True)
    chance = random.Random(seed)
    try:
        nodes = TwoNodes()
    except NoNetwork as reason:
        return {"measured": f"skipped, no network namespaces here: {reason}", "holds": True, "skipped": True}
    results = []
    try:
        with tempfile.TemporaryDirectory(prefix="zoetrope-partition-") as folder:
            data = demo_videos(Path(folder) / "data", 64, 24)
            for number, case in enumerate(CASES):
                results.append(one(nodes, Path(folder), data, case, chance, 29600 + 2 * number))
                print(f"partition: {json.dumps(results[-1])}", file=sys.stderr, flush=True)
    finally:
        nodes.close()
    longest = max(result["seconds"] for result in results)
    measured = {"seed": seed, "collective_seconds": COLLECTIVE_SECONDS, "longest_seconds": longest, "cases": results}
    return {"measured": measured, "holds": all(r["good"] and r["hit"] and r["resumed"] for r in results)}


if __name__ == "__main__":
    print(json.dumps(row()))
