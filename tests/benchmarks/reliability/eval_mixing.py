"""Row: an evaluation is stopped and continued with other settings; no result has rows of both.

Each case scores all videos under the old and under the new settings without a stop. Then it stops the old one by a
real signal after a drawn number of videos, runs the new command, and compares every row bit for bit. Where settings
differ in name only, the evaluation must resume.

    python -m tests.benchmarks.reliability.eval_mixing [--cases root,code]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import warm

ROOT = Path(__file__).resolve().parents[3]
VIDEOS = 12
CONFIG = """\
common:
    model: {{type: tsm, backbone: mobilenetv2, num_segments: 2, num_class: 8, dropout: 0.0, pretrained: False}}
    augmentation: {{input_size: 32, test_resize: 36}}
    data: {{sampling: tsn, reader: {reader}{more}}}
    workers: 0
    batch_size: 2
    lr_scheduler: {{type: COSINE, base_lr: 0.1, warmup_steps: 1, warmup_lr: 0.05, max_iter: 6}}
    val_freq: 6
    train_root: {data}
    train_source: {data}/lists/train.txt
    val_root: {root}
    val_source: {val}
"""


@dataclasses.dataclass(frozen=True)
class Change:
    """What differs between the evaluation that is stopped and the one that follows.

    Attributes:
        base: which experiment, "videos" or "frames".
        words: further words of the second command.
        between: called between the two, with the experiment; for files that change under their names.
        resumes: the second one must resume from the first.
    """

    base: str = "videos"
    words: tuple[str, ...] = ()
    between: Callable[[Path], object] = lambda exp: None
    resumes: bool = False


def stop_after(count: int) -> None:
    """Let this process stop its evaluation by a signal after so many videos, each in a part of its own."""
    from anal_tools.evaluate import result_parts

    result_parts.PART_SECONDS = -1.0
    keep, seen = result_parts.PartWriter.keep, []

    def keep_and_stop(self: Any, item: Any, logits: Any) -> None:
        keep(self, item, logits)
        seen.append(item.sample)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGTERM)

    result_parts.PartWriter.keep = keep_and_stop


class World:
    """Data, weights and experiments of all cases, below one folder."""

    def __init__(self, folder: Path) -> None:
        from datasets.demo import verb as demo

        self.folder, data = folder, folder / "data"
        demo.main(["--out", str(data), "--train", "8", "--val", str(VIDEOS * 2), "--workers", "1"])
        val = data / "lists/val.txt"
        val.write_text("".join(val.read_text().splitlines(keepends=True)[:VIDEOS]))
        self.data = data
        self._other_root(data, folder / "other")
        exp = self.experiment("videos")
        warm.warm()
        done = warm.verb(["train", str(exp)], folder)
        assert done.code == 0, done.err
        shutil.copy(exp / "ckpt.pth.tar", folder / "weights.pth.tar")
        words = ["--as", "frames", "--root", str(data), "--short-side", "0", "--workers", "1"]
        done = warm.verb(["dump", str(val), str(folder / "frames"), *words], folder)
        assert done.code == 0, done.err
        for video in (folder / "frames/videos").iterdir():
            names = sorted(video.glob("img_*"))
            for name, source in zip(names, reversed(names), strict=True):
                shutil.copy(source, video / name.name.replace("img_", "alt_"))
        shutil.rmtree(exp)

    def _other_root(self, data: Path, other: Path) -> None:
        videos = sorted((data / "videos").iterdir())
        (other / "videos").mkdir(parents=True)
        for path, source in zip(videos, [*videos[1:], videos[0]], strict=True):
            shutil.copy(source, other / "videos" / path.name)

    def experiment(self, base: str) -> Path:
        """A new experiment folder with the weights."""
        exp = Path(tempfile.mkdtemp(prefix=f"{base}-", dir=self.folder))
        root = self.data if base == "videos" else self.folder / "frames"
        val = self.data / "lists/val.txt" if base == "videos" else root / "val.txt"
        shutil.copy(val, exp / "val.txt")
        more = "" if base == "videos" else ', template: "img_{:05d}.jpg"'
        reader = "video" if base == "videos" else "frames"
        text = CONFIG.format(data=self.data, root=root, val=exp / "val.txt", reader=reader, more=more)
        (exp / "config.yaml").write_text(text)
        if (self.folder / "weights.pth.tar").exists():
            shutil.copy(self.folder / "weights.pth.tar", exp / "ckpt_best.pth.tar")
        return exp

    def changes(self) -> dict[str, Change]:
        """All cases by name."""

        def set_(*texts: str) -> tuple[str, ...]:
            return tuple(word for text in texts for word in ("--set", f"common.{text}"))

        frames = self.folder / "frames"
        return {
            "kwargs": Change(words=set_("model.kwargs.shift_div=4")),
            "root": Change(words=("--root", str(self.folder / "other"))),
            "reader": Change(
                words=(*set_("data.reader=frames"), "--root", str(frames), "--list", str(frames / "val.txt"))
            ),
            "template": Change(base="frames", words=set_("data.template=alt_{:05d}.jpg")),
            "precision": Change(words=set_("precision=fp64")),
            "plain": Change(words=("--plain",)),
            "views": Change(words=("--views", "3crop")),
            "scale": Change(words=("--scale", "40")),
            "kept format": Change(words=("--keep", "float16")),
            "colours": Change(words=set_("augmentation.mean=[0.1,0.2,0.3]")),
            "weights": Change(between=_other_weights),
            "list": Change(between=_turned_list),
            "key order": Change(between=_turned_keys, resumes=True),
            "relative root": Change(words=("--root", os.path.relpath(self.data)), resumes=True),
            "nothing": Change(resumes=True),
        }

    def score(self, exp: Path, words: Sequence[str], after: int = 0) -> warm.Outcome:
        """Run `eval`, stopped after so many videos."""

        def prepare() -> None:
            if after:
                stop_after(after)

        return warm.verb(["eval", str(exp), "--name", "n", "--chunk", "1", *words], self.folder, prepare)


def _other_weights(exp: Path) -> None:
    """Replace the file of the weights by others of the same name, size and time."""
    import torch

    file = exp / "ckpt_best.pth.tar"
    before = file.stat()
    state = torch.load(file, weights_only=True)
    for tensor in state["model"].values():
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor.mul_(1.01)
    torch.save(state, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _turned_list(exp: Path) -> None:
    lines = (exp / "val.txt").read_text().splitlines(keepends=True)
    (exp / "val.txt").write_text("".join(lines[1:] + lines[:1]))


def _turned_keys(exp: Path) -> None:
    lines = (exp / "config.yaml").read_text().splitlines(keepends=True)
    (exp / "config.yaml").write_text("".join([lines[0], *reversed(lines[1:])]))


def rows_of(exp: Path) -> dict[str, bytes]:
    """The kept views of each video, by its path."""
    from anal_tools.evaluate.results import Results

    results = Results.load(exp, "n")
    return {path: np.ascontiguousarray(results.logits[i]).tobytes() for i, path in enumerate(results.ids)}


def run_case(world: World, change: Change, rng: random.Random) -> dict[str, Any]:
    """Stop the old evaluation, run the new one, count the rows that are not those of the new settings alone."""
    clean_old, clean_new, exp = (world.experiment(change.base) for _ in range(3))
    assert world.score(clean_old, ()).code == 0
    change.between(clean_new)
    done = world.score(clean_new, change.words)
    assert done.code == 0, done.err
    after = rng.randrange(2, VIDEOS - 1)
    stopped = world.score(exp, (), after)
    assert stopped.code == 75, (stopped.code, stopped.err)
    change.between(exp)
    second = world.score(exp, change.words)
    assert second.code == 0, second.err
    old, new, rows = rows_of(clean_old), rows_of(clean_new), rows_of(exp)
    outcome = {
        "stopped_after": after,
        "resumed": "resuming" in second.out,
        "mixed": sum(rows[path] != new[path] for path in rows) + len(rows.keys() ^ new.keys()),
        "rows_that_differ_between_the_settings": sum(old.get(path) != row for path, row in new.items()),
    }
    for folder in (clean_old, clean_new, exp):
        shutil.rmtree(folder)
    return outcome | {"right": outcome["mixed"] == 0 and outcome["resumed"] == change.resumes}


def code_case(world: World, rng: random.Random) -> dict[str, Any]:
    """The same with an edited copy of the code: another rule of the resize kernel after the stop."""
    copy = world.folder / "code"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)

    def score(exp: Path, after: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.benchmarks.reliability.eval_mixing", "--stop", str(after)]
        command += ["--", "eval", str(exp), "--name", "n", "--chunk", "1"]
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)

    clean, exp, after = world.experiment("videos"), world.experiment("videos"), rng.randrange(2, VIDEOS - 1)
    stopped = score(exp, after)
    assert stopped.returncode == 75, stopped.stderr[-2000:]
    kernel = copy / "datasets/readers/resize.py"
    kernel.write_text(kernel.read_text().replace("cv2.INTER_LINEAR", "cv2.INTER_NEAREST"))
    done = [score(clean), score(exp)]
    assert [one.returncode for one in done] == [0, 0], done[-1].stderr[-2000:]
    new, rows = rows_of(clean), rows_of(exp)
    mixed = sum(rows[path] != row for path, row in new.items())
    named = "code (datasets/readers/resize.py)" in done[1].stdout
    resumed = "resuming" in done[1].stdout
    return {
        "stopped_after": after,
        "resumed": resumed,
        "mixed": mixed,
        "named": named,
        "right": not mixed and not resumed and named,
    }


def row(cases: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the cases.

    Returns:
        measured: {case: outcome}, the seed, the number of mixed rows; holds.
    """
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(10**6))
    rng = random.Random(seed)
    outcomes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="zoetrope-mixing-") as name:
        world = World(Path(name))
        for case, change in world.changes().items():
            if cases is None or case in cases:
                outcomes[case] = run_case(world, change, rng)
        if cases is None or "code" in cases:
            outcomes["code"] = code_case(world, rng)
    mixed = sum(one["mixed"] for one in outcomes.values())
    measured = {
        "seed": seed,
        "cases": len(outcomes),
        "rows": VIDEOS * len(outcomes),
        "mixed_rows": mixed,
        "each": outcomes,
    }
    return {"measured": measured, "holds": bool(outcomes) and all(one["right"] for one in outcomes.values())}


def _main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", help="comma separated (default: all)")
    parser.add_argument("--stop", type=int, help="of a case: stop `main.py ARGV` after so many videos")
    parser.add_argument("argv", nargs="*")
    args = parser.parse_args()
    if args.stop is not None:
        import main

        if args.stop:
            stop_after(args.stop)
        return main.main(args.argv)
    print(json.dumps(row(args.cases.split(",") if args.cases else None)))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
