"""The same recipe on 1, 2 and 4 ranks, and with each reader, on real people: the same accuracy.

A fold of UCF Sports (data/README.md, or $ZOETROPE_RESULTS_DATA), four shards of two clips that share their batch-norm
statistics, so that one, two and four ranks train on the same global batches. The readers see the same pixels:
`dump --lossless` writes PNG folders and short-GOP video in RGB.

All runs are in double precision and last 29 steps, so this shows that ranks and readers train alike, not what they
reach: the loss has hardly fallen by then. Another number of ranks adds in another order (docs/training.md), and
training amplifies what that changes. In a run of 58 steps the losses of one and four ranks were apart by 3e-15 after 10
steps, 2e-9 after 35, then suddenly 9e-5 after 40 (probably ReLU6 at one of its kinks) and .008 at the end. With
statistics of two clips they were apart by 4e-5 after 15 steps, or by .001 after 30 at a quarter of the rate, and 1, 2
and 4 ranks ended with .206, .118 and .559 right. So runs of usual length do not have the same accuracy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.benchmarks.analysis.answers import data_folder
from tests.benchmarks.experiments import fingerprint
from tests.benchmarks.rows import ROOT, command, evaluate, run_rows, train, workspace

CONFIG = """\
common:
    model: {{type: tsm, backbone: mobilenetv2, num_segments: 4, num_class: 10, dropout: 0.5,
            pretrained: {weights}, kwargs: {{bn_group_size: 4}}}}
    augmentation: {{input_size: 64, test_resize: 64, crop: random_resized, area: [0.7, 1.0]}}
    data: {{reader: {reader}, sampling: tsn, flip: true, class_names: {lists}/classInd.txt}}
    workers: 1
    batch_size: 2
    shards: 4
    lr_scheduler: {{type: COSINE, base_lr: 0.0002, warmup_epochs: 1, warmup_lr: 0.002, min_lr: 0.0, max_epoch: 2}}
    momentum: 0.9
    weight_decay: 0.0005
    nesterov: True
    val_freq_epochs: 2
    print_freq: 5
    precision: fp64
    train_root: {root}
    train_source: {train}
    val_root: {root}
    val_source: {val}
"""
WEIGHTS = "pretrained/mobilenetv2_imagenet_features.pth"
RANKS = (1, 2, 4)
READERS = ("frames", "clips")  # beside video


def places(work: Path, form: str) -> tuple[Path, Path, Path]:
    """Root, training list and validation list of the originals, or of a lossless dump that is made once."""
    folder = data_folder("ucf_sports").resolve()
    lists = [folder / f"lists/fold01_{split}.txt" for split in ("train", "val")]
    if form == "video":
        return folder / "videos", lists[0], lists[1]
    dump = work / f"dump-{form}"
    for one in lists:
        if not (dump / one.name).exists():
            command("main.py", "dump", one, dump, "--root", folder / "videos", "--as", form, "--lossless")
    return dump, dump / lists[0].name, dump / lists[1].name


def one_run(work: Path, form: str, ranks: int) -> dict[str, object]:
    """Train and evaluate; accuracy, and a digest of weights, momentum and losses."""
    exp = work / f"same-{form}-{ranks}"
    root, train_list, val_list = places(work, form)
    exp.mkdir(parents=True, exist_ok=True)
    reader = "frames" if form == "frames" else "video"
    places_of = {
        "root": root,
        "train": train_list,
        "val": val_list,
        "lists": data_folder("ucf_sports").resolve() / "lists",
    }
    text = CONFIG.format(reader=reader, weights=WEIGHTS if (ROOT / WEIGHTS).exists() else False, **places_of)
    (exp / "config.yaml").write_text(text)
    train(exp, ranks)
    top1 = evaluate(exp, 1, "--checkpoint", "latest")["metrics"]["top1"]
    lines = (json.loads(line) for line in (exp / "events/scalars.jsonl").read_text().splitlines())
    losses = [line["loss_train"] for line in lines if "loss_train" in line]
    return {"top1": round(top1, 3), "digest": fingerprint(exp)[:12], "last_loss": losses[-1]}


def same(work: Path) -> dict:
    """All runs; the readers bit for bit, the ranks by their accuracy."""
    runs = {f"{ranks} ranks, video": one_run(work, "video", ranks) for ranks in RANKS}
    runs |= {f"1 ranks, {form}": one_run(work, form, 1) for form in READERS}
    accuracies = {run["top1"] for run in runs.values()}
    readers = {run["digest"] for name, run in runs.items() if name.startswith("1 ")}
    losses = [float(str(run["last_loss"])) for run in runs.values()]
    apart = max(losses) - min(losses)
    measured = {**runs, "readers_equal_in_bits": len(readers) == 1, "losses_apart": apart}
    return {"measured": measured, "holds": len(accuracies) == 1 and len(readers) == 1 and apart < 1e-6}


ROWS = {
    "same_accuracy": (
        "1, 2, 4 ranks; readers video, frames, clips (lossless): TSM MobileNetV2 on fold 1 of ucf_sports",
        "same accuracy; the readers bit for bit",
        lambda: same(workspace()),
    )
}

if __name__ == "__main__":
    sys.exit(run_rows(ROWS, issue="12"))
