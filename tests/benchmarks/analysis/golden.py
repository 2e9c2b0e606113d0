"""Row by row: what our rules answer to the golden tables of the peers; {table: [equal, rows]}."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datasets.plan import crops, rules
from datasets.plan.views import EVAL_CROPS, ROUNDINGS
from tests.benchmarks.rows import run_rows
from tests.golden import TABLES as TABLES_AT
from utils import metrics, ranking
from utils.lr_schedule import lr_at

Row = dict[str, Any]


def compare(folder: Path) -> dict[str, list[int]]:
    """All tables of a folder that one of the functions below knows; every row is compared as a whole."""
    equal_rows = {}
    for name, same in TABLES.items():
        rows = json.loads((folder / f"{name}.json").read_text())["rows"]
        equal_rows[name] = [sum(bool(same(row)) for row in rows), len(rows)]
    return equal_rows


def close(ours: Any, theirs: Any, tolerance: float = 1e-6) -> bool:
    """Equal to a relative tolerance, element by element."""
    return bool(np.allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=tolerance, atol=1e-12))


# ----------------------------------------------------------------------------------------------------------- sampling


def _sample_frames(row: Row) -> bool:
    ours = rules.mmaction2_1x_test(
        row["num_frames"], row["num_clips"], row["clip_len"], row["frame_interval"],
        twice=row.get("twice_sample", False), out_of_bound=row.get("out_of_bound_opt", "loop"),
        target_fps=row.get("target_fps"), fps=row.get("fps", 0.0),
    )  # fmt: skip
    return ours.reshape(-1).tolist() == row["inds"]


def _train_support(row: Row) -> bool:
    """Our draws stay within the range of theirs, reach both ends, and have the same means within 4 standard errors."""
    generator, draws = np.random.default_rng(0), row["draws"]
    ours = np.array(
        [
            rules.mmaction2_train(
                row["num_frames"], row["num_clips"], row["clip_len"], row["frame_interval"],
                generator.random(row["num_clips"]), keep_tail=row.get("keep_tail_frames", False),
                out_of_bound=row.get("out_of_bound_opt", "loop"),
            ).reshape(-1)
            for _ in range(max(draws, 1500))
        ]
    )  # fmt: skip
    error = ours.std(0) * np.sqrt(1 / draws + 1 / len(ours)) + 0.01
    ends = ours.min(0).tolist() == row["lo"] and ours.max(0).tolist() == row["hi"]
    return ends and bool((np.abs(ours.mean(0) - row["mean"]) <= 4 * error).all())


def _pyslowfast(row: Row) -> bool:
    ours = rules.pyslowfast_test(
        row["video_frames"], row["num_frames_out"], row["sampling_rate"], row["fps"], views=row["views"],
        target_fps=row["target_fps"], use_offset=row["use_offset"],
    )  # fmt: skip
    return ours.tolist() == row["inds"]


def _tsm(row: Row) -> bool:
    n, segments = row["num_frames"], row["num_segments"]
    ours = {
        "val": rules.tsn_val(n, segments),
        "test": rules.tsm_test(n, segments),
        "test_twice": rules.tsm_test(n, segments, twice=True),
        "test_dense": rules.tsm_dense_test(n, segments).reshape(-1),
    }
    return all(ours[key].tolist() == row[key] for key in ours)


def _paddle(row: Row) -> bool:
    """The frame column is the number of the file, from 1; the video column wraps around where the rule does."""
    n, segments = row["num_frames"], row["num_seg"]
    if row.get("select_left"):
        ours = rules.pp_tsn_valid(n, segments)
    elif row.get("linspace_sample"):
        ours = rules.pp_linspace(n, segments)
    elif row.get("dense_sample"):
        ours = rules.tsm_dense_test(n, segments).reshape(-1) + 1  # PaddleVideo counts both columns from 1 here
        return ours.tolist() == row["video"] == row["frame"]
    else:
        ours = rules.pp_tsm_valid(n, segments)
    return (ours % n).tolist() == row["video"] and (ours + 1).tolist() == row["frame"]


def _slow_pathway(row: Row) -> bool:
    from methods.slowfast import slow_frames

    names = {"psf": "linspace", "mma": "strided"}
    return all(slow_frames(row["T"], row["alpha"], rule) == row[key] for key, rule in names.items())


# ----------------------------------------------------------------------------------------------------- crops and sizes


def _boxes(row: Row) -> bool:
    names = {"mma_center": "centre", "mma_ten": "ten", "psf_uniform": "three_pyslowfast", "tsm_fullres": "three_tsm"}
    names["mma_three"] = "three_mmaction2"
    w, h, crop = row["w"], row["h"], row["crop"]
    same = [list(map(list, crops.five_places(w, h, crop))) == row["tsm_oversample"]]
    for key, rule in names.items():
        if row[key] is not None:
            same.append([list(box) for _, box, _ in EVAL_CROPS[rule].views(w, h, crop)] == row[key])
    return all(same)


def _multi_scale(row: Row) -> bool:
    """Uniforms on a grid that is finer than 13 places and 10 sizes reach every box, and no other."""
    settings = {
        "input_size": row["input_size"],
        "scales": row["scales"],
        "max_distort": row["max_wh_scale_gap"],
        "more_fix_crop": row.get("num_fixed_crops", 5) == 13,
        "fix_crop": not row["random_crop"],
    }
    grid = (np.arange(64) + 0.5) / 64
    boxes = {crops.multi_scale(row["w"], row["h"], (a, b, 0.0), **settings) for a in grid for b in grid}
    return boxes == set(map(tuple, row["boxes"]))


def _paddle_boxes(row: Row) -> bool:
    names = {"ten": "ten", "center_round": "centre_tsm", "center_floor": "centre"}
    views = {key: EVAL_CROPS[rule].views(row["w"], row["h"], row["crop"]) for key, rule in names.items()}
    return all([[*box, flip] for _, box, flip in views[key]] == row[key] for key in names)


def _sizes(row: Row) -> bool:
    names = {"mma_rescale": "mmaction2", "psf_short_side": "pyslowfast", "tsm_group_scale": "tsm"}
    return all(list(ROUNDINGS[rule](row["w"], row["h"], row["scale"])) == row[key] for key, rule in names.items())


# -------------------------------------------------------------------------------------------------------------- metrics


def _metrics(row: Row) -> bool:
    scores, labels = np.array(row["scores"]), np.array(row["labels"])
    count = scores.shape[1]
    first = scores.argmax(axis=1)  # its matrix and class mean take the lowest of equal scores, its top-k the highest
    mean = ranking.mean_average_precision(scores, np.eye(count, dtype=bool)[labels])
    same = [
        close([metrics.top_k_accuracy(scores, labels, k) for k in (1, 5)], row["top1_5"], 1e-9),
        close(metrics.mean_class_accuracy(first, labels, count), row["mean_class"], 1e-9),
        close(mean, row["mean_average_precision"], 1e-9),
    ]
    for key in ("None", "true", "pred", "all"):
        matrix = metrics.confusion_matrix(first, labels, count, normalize=None if key == "None" else key)
        same.append(close(matrix, row[f"confusion_{key}"], 1e-9))
    return all(same)


def _test_meter(row: Row) -> bool:
    clips, labels = np.array(row["clip_preds"]), np.array(row["labels"])
    views = clips.reshape(len(labels), -1, clips.shape[1])
    merged = views.sum(1) if row["ensemble"] == "sum" else metrics.merge_views(views, "max")
    tops = [round(100 * metrics.top_k_accuracy(merged, labels, k), 2) for k in (1, 5)]
    return close(merged, row["video_preds"]) and tops == [row["top1"], row["top5"]]


# ------------------------------------------------------------------------------------------------------- learning rates


def _mmaction2_lr(row: Row) -> bool:
    """MMEngine's chain as one of our schedules; without convert_to_iter_based its unit of time is the epoch."""
    each, epochs = row["iters_per_epoch"], row["max_epochs"]
    warm = next((one for one in row["schedulers"] if one["type"] == "LinearLR"), None)
    main = next(one for one in row["schedulers"] if one["type"] != "LinearLR")
    by_iteration = warm is not None and warm.get("convert_to_iter_based", False)
    unit = each if by_iteration else 1
    peak = row["base_lr"]
    schedule: Row = {"base_lr": peak, "max_iter": epochs * unit}
    if main["type"] == "CosineAnnealingLR":
        schedule |= {"type": "COSINE", "min_lr": main["eta_min"], "begin": main["begin"] * unit}
        schedule["max_iter"] = (main["begin"] + main["T_max"]) * unit
    else:
        steps = [step * unit for step in main["milestones"]]
        schedule |= {"type": "STEP", "lr_steps": steps, "lr_mults": [main["gamma"]] * len(steps)}
    if warm is not None:  # LinearLR reaches the peak one step before its end
        schedule |= {"base_lr": warm["start_factor"] * peak, "warmup_lr": peak, "warmup_steps": warm["end"] * unit - 1}
    if by_iteration:
        schedule |= {"warmup_type": "factor_linear", "epoch_iters": each}
    ours = [lr_at(k if by_iteration else k // each, **schedule) for k in range(0, epochs * each, row["every"])]
    return close(ours, row["lr"])


def _pyslowfast_lr(row: Row) -> bool:
    unit = 100  # iterations of an epoch: every epoch of the table is a whole number of them
    schedule: Row = {"base_lr": row["warmup_start_lr"], "warmup_lr": row["base_lr"], "warmup_type": "to_schedule"}
    schedule |= {"warmup_steps": round(row["warmup_epochs"] * unit), "max_iter": row["max_epoch"] * unit}
    if row["policy"] == "cosine":
        schedule |= {"type": "COSINE", "min_lr": row["cosine_end_lr"]}
    else:
        lrs = row["lrs"][: len(row["steps"])]
        mults = [after / before for before, after in zip(lrs, lrs[1:], strict=False)]
        schedule |= {"type": "STEP", "lr_steps": [step * unit for step in row["steps"][1:]], "lr_mults": mults}
    return close([lr_at(round(epoch * unit), **schedule) for epoch in row["epoch"]], row["lr"])


def _paddle_lr(row: Row) -> bool:
    unit = row["num_iters"]
    schedule: Row = {
        "type": "COSINE",
        "base_lr": row["warmup_start_lr"],
        "warmup_lr": row["cosine_base_lr"],
        "warmup_type": "to_schedule",
        "warmup_steps": row["warmup_epochs"] * unit,
        "max_iter": row["max_epoch"] * unit,
    }
    return close([lr_at(k, **schedule) for k in range(len(row["lr"]))], row["lr"])


TABLES: dict[str, Callable[[Row], bool]] = {
    "mma_sample_frames_test": _sample_frames,
    "mma_sample_frames_train_support": _train_support,
    "mma_dense_sample_frames_test": lambda row: (
        rules.tsm_dense_test(row["num_frames"], row["num_clips"], row["positions"]).reshape(-1).tolist() == row["inds"]
    ),
    "mma_uniform_sample_test": lambda row: (
        rules.mmaction2_uniform_test(row["num_frames"], row["clip_len"], row["num_clips"]).reshape(-1).tolist()
        == row["inds"]
    ),
    "psf_temporal_test": _pyslowfast,
    "tsm_orig_indices": _tsm,
    "paddle_sampler_valid": _paddle,
    "slow_pathway_indices": _slow_pathway,
    "crop_boxes": _boxes,
    "mma_multiscale_crop_support": _multi_scale,
    "paddle_crop_boxes": _paddle_boxes,
    "resize_sizes": _sizes,
    "mma_metrics": _metrics,
    "psf_test_meter": _test_meter,
    "mma_lr": _mmaction2_lr,
    "psf_lr": _pyslowfast_lr,
    "paddle_lr": _paddle_lr,
}


def golden() -> dict:
    """Compare every row; $ZOETROPE_GOLDEN is another folder of tables."""
    tables = compare(Path(os.environ.get("ZOETROPE_GOLDEN", TABLES_AT)))
    rows = {name: f"{equal} of {total}" for name, (equal, total) in tables.items()}
    return {"measured": rows, "holds": all(equal == total > 0 for equal, total in tables.values())}


ROWS = {"golden": ("indices, boxes, sizes, metrics and LR points of four peers", "all equal", golden)}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
