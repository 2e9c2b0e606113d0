"""Write the old state that tests/test_old_state.py opens. Run it in a checkout of version 0.1.0 (commit 176f066).

    git worktree add /tmp/zoetrope-0.1 176f066
    cp tests/data/v0_1/toy.py /tmp/zoetrope-0.1/methods/toy.py
    cd /tmp/zoetrope-0.1 && PYTHONPATH=. python .../tests/data/v0_1/make.py .../tests/data/v0_1

The folder then holds what that version kept on disk, with a network of 2,000 weights: a run that was stopped after 3 of
6 iterations (moving average, statistics of two batch-norm groups), a finished evaluation, one that was stopped, the
cache of a scan, a shard of JPEG frames and its lists.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

CONFIG = """\
common:
    model:
        type: toy
        backbone: resnet18
        num_segments: 2
        num_class: 8
        dropout: 0.5
        pretrained: False
        kwargs: {bn_group_size: 2, bn_sync_stats: False, width: 8}
    augmentation: {input_size: 32, test_resize: 36, mix_up: 0.2, colorjitter: [0.2, 0.2, 0.2, 0.1]}
    data: {reader: video, sampling: seed004, class_names: data/old/lists/classInd.txt}
    shards: 4
    workers: 0
    batch_size: 2
    ema: 0.9
    lr_scheduler: {type: COSINE, base_lr: 0.01, warmup_steps: 2, warmup_lr: 0.02, max_iter: 6}
    val_freq: 2
    print_freq: 1
    train_root: data/old
    train_source: data/old/lists/train.txt
    val_root: data/old
    val_source: data/old/lists/val.txt
"""


def stopped_evaluation(exp: Path) -> None:
    """Start an evaluation in this process and stop it by a signal after five videos."""
    import main
    from anal_tools import result_parts  # pyright: ignore[reportAttributeAccessIssue]  where version 0.1 has it

    keep, seen = result_parts.PartWriter.keep, []

    def keep_and_stop(self, item, logits):  # noqa: ANN001
        keep(self, item, logits)
        seen.append(item.sample)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGUSR2)

    result_parts.PartWriter.keep = keep_and_stop
    assert main.main(["eval", str(exp), "--name", "stopped"]) == 75


def main(target: Path) -> None:
    """Make the data, the run and everything else; copy what belongs into the repository."""
    root = Path(os.environ["PYTHONPATH"]).resolve()

    def verb(*words: str, codes: tuple[int, ...] = (0,), env: dict[str, str] | None = None) -> None:
        done = subprocess.run(
            [sys.executable, str(root / "main.py"), *words],
            env=os.environ | {"PYTHONPATH": str(root)} | (env or {}),
            check=False,
        )
        assert done.returncode in codes, (words, done.returncode)

    os.chdir(root)  # relative names only, so that no path of this machine is in a file
    sys.path.insert(0, str(root))
    verb("demo-data", "--out", "data/old", "--train", "16", "--val", "8", "--workers", "2")
    exp = Path("data/old/exp")
    exp.mkdir()
    (exp / "config.yaml").write_text(CONFIG)
    # Killed in the fourth save, of step 4: the folder holds the latest and the best checkpoint of step 2.
    verb("train", str(exp), codes=(-9,), env={"ZOETROPE_FAILPOINT": "checkpoint.tmp:0:3"})
    verb("eval", str(exp), "--name", "finished", "--views", "1x3")
    verb("scan", "--root", "data/old", "data/old/lists/train.txt", "--out", "data/old/scan")
    verb("dump", "data/old/lists/val.txt", "data/old/pack", "--root", "data/old", "--as", "shards", "--short-side", "32")
    stopped_evaluation(exp)
    for name in ("exp", "scan", "pack", "lists"):
        left = shutil.ignore_patterns("jobs", "ckpt.tmp*", "*.html", "lock")  # the lock of a dead process on this host
        shutil.copytree(f"data/old/{name}", target / name, dirs_exist_ok=True, ignore=left)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
