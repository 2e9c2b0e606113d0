"""Weights in and out: folders of transformers, files of the authors' form, exported folders back in transformers.

Needs `$ZOETROPE_HF_PYTHON`; see `vit.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.methods.vit import MISSING, PUBLISHED, Worker, has_peer
from tests.benchmarks.rows import run_rows

MUTANTS = int(os.environ.get("ZOETROPE_FUZZ_COUNT", "2000"))
SMALL: dict[str, list[dict[str, Any]]] = {
    "videomae": [
        {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 100},
        {
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 50,
            "qv_bias": False,
        },
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "use_mean_pooling": False},
    ],
    "vjepa2": [
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 3.3},
        {"hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 2, "num_pooler_layers": 1},
    ],
}
COMMON: dict[str, dict[str, Any]] = {
    "videomae": {"image_size": 32, "patch_size": 8, "num_frames": 4, "num_labels": 7},
    "vjepa2": {"crop_size": 32, "patch_size": 8, "frames_per_clip": 4, "num_labels": 7}
    | {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2},
}
CONFIG = """\
common:
    model: {{type: {type}, backbone: {backbone}, num_segments: {num_segments}, num_class: {num_class}, dropout: 0,
        pretrained: {folder}, kwargs: {kwargs}}}
    augmentation: {{input_size: {side}, test_resize: {side}}}
    batch_size: 2
    lr_scheduler: {{type: COSINE, base_lr: 0.001, max_iter: 1}}
    val_freq: 1
    train_root: .
    train_source: train.txt
    val_root: .
    val_source: val.txt
"""


def experiment(work: Path, folder: Path, side: int) -> tuple[Path, Any]:
    """Convert a folder to our checkpoint with the verb; return its path and the model of `from_pretrained`."""
    import main
    import methods
    from methods.interop import hf

    model = methods.from_pretrained(folder)
    options = dict(hf.read_folder(folder).model)
    named = {key: options.pop(key) for key in ("type", "backbone", "num_segments", "num_class")}
    exp = work / "exp"
    exp.mkdir()
    kwargs = "{" + ", ".join(f"{key}: {number(value)}" for key, value in options.items()) + "}"
    (exp / "config.yaml").write_text(CONFIG.format(**named, folder=folder, kwargs=kwargs, side=side))
    with contextlib.redirect_stdout(io.StringIO()):
        assert main.main(["convert", str(folder), "--config", str(exp), "--out", str(work / "ours.pth.tar")]) == 0
    return work / "ours.pth.tar", model


def number(value: object) -> str:
    """Return a value as YAML takes it: `1e-12` is a text there."""
    return f"{value:.17e}" if isinstance(value, float) else str(value).lower()


def trip(worker: Worker, family: str, config: dict[str, Any], seed: int) -> dict[str, Any]:
    """transformers -> ours -> checkpoint -> `export --to hf` -> transformers -> ours; return what differs."""
    import torch
    from safetensors.torch import load_file, save_file

    import main
    import methods

    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        folder, out = work / "theirs", work / "out"
        worker.ask({"do": "save", "family": family, "config": config, "seed": seed, "folder": str(folder)})
        side = config["image_size" if family == "videomae" else "crop_size"]
        frames = config["num_frames" if family == "videomae" else "frames_per_clip"]
        generator = torch.Generator().manual_seed(seed)
        save_file({"clips": torch.randn(2, 3, frames, side, side, generator=generator)}, work / "clips.safetensors")
        clips = load_file(work / "clips.safetensors")["clips"]

        checkpoint, model = experiment(work, folder, side)
        with contextlib.redirect_stdout(io.StringIO()):
            assert main.main(["export", str(checkpoint), "--to", "hf", str(out)]) == 0
        answers = {}
        for name in (folder, out):
            file = work / f"{name.name}.safetensors"
            problems = worker.ask({"do": "load", "folder": str(name), "clips": str(work / "clips.safetensors"),
                                   "file": str(file)})  # fmt: skip
            answers[name.name] = load_file(file), problems
        with torch.inference_mode():
            ours = model.eval()(clips)
            again = methods.from_pretrained(out).eval()
            back = again(clips)
        (first, _), (second, problems) = answers["theirs"], answers["out"]
        largest = float(first["logits"].abs().max())
        unequal = [name for name in first if name.startswith("weights.") and not torch.equal(first[name], second[name])]
        unequal += [name for name, one in model.state_dict().items() if not torch.equal(one, again.state_dict()[name])]
        gaps = [(ours - first["logits"]), (second["logits"] - first["logits"]), (back - ours)]
        return {
            "gap": max(float(gap.abs().max()) for gap in gaps) / largest,
            "unequal": unequal,
            "problems": problems,
        }


def round_trip() -> dict:
    """Small networks of five shapes, and ViT-S."""
    if not has_peer():
        return MISSING
    cases = [(family, COMMON[family] | shape) for family, shapes in SMALL.items() for shape in shapes]
    cases.append(("videomae", published("videomae", "small")))
    with Worker("theirs") as worker:
        trips = [trip(worker, family, config, seed) for seed, (family, config) in enumerate(cases)]
    worst = max(one["gap"] for one in trips)
    wrong = [one for one in trips if one["unequal"] or one["problems"]]
    return {
        "measured": {"trips": len(trips), "gap": f"{worst:.1e}", "wrong": wrong},
        "holds": worst <= 1e-5 and not wrong,
    }


def published(family: str, size: str) -> dict[str, Any]:
    """Return the config of a published size."""
    width, heads, layers = PUBLISHED[size]
    config = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    if family == "vjepa2":
        return config | {"crop_size": 256, "frames_per_clip": 16, "num_labels": 174}
    return config | {"intermediate_size": 4 * width, "image_size": 224, "num_frames": 16, "num_labels": 400}


def originals() -> dict:
    """The authors' files of the same numbers at published sizes: every key used or carried, weights bit-equal."""
    if not has_peer():
        return MISSING
    originals_of, wrong = {}, []
    with Worker("theirs") as worker:
        for family, size in (("videomae", "small"), ("videomae", "base"), ("videomae", "large"), ("vjepa2", "large")):
            report, unequal, carried = original(worker, family, published(family, size))
            originals_of[f"{family} {size}"] = {"tensors": len(report.loaded), "carried": carried}
            wrong += [f"{family} {size}: {part}" for part in (report.missing, report.unexpected, unequal) if part]
    return {"measured": originals_of | {"wrong": wrong}, "holds": not wrong}


def original(worker: Worker, family: str, config: dict[str, Any]) -> tuple[Any, list[str], bool]:
    """Return the report on the authors' files, tensors that differ from the folder's, and if the predictor is equal."""
    import torch
    from safetensors.torch import load_file

    from methods import interop
    from tests import hf_folders, models

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "hf"
        worker.ask({"do": "save", "family": family, "config": config, "seed": 1, "folder": str(folder)})
        model = models.from_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        other = models.build(**interop.hf.read_folder(folder).model)
        if family == "videomae":
            torch.save({"module": hf_folders.original_videomae(tensors)}, Path(place) / "one.pth")
            state, carried = interop.read(Path(place) / "one.pth"), {}
        else:
            for name, content in zip(("one", "two"), hf_folders.original_vjepa2(tensors), strict=True):
                torch.save(content, Path(place) / f"{name}.pth")
            state = interop.read(Path(place) / "one.pth") | interop.read(Path(place) / "two.pth")
            carried = interop.look(state, folder)[1].carried
        report = interop.load_tensors(other, state, folder, accept=("eps", "head_eps"))
        unequal = [name for name, one in model.state_dict().items() if not torch.equal(one, other.state_dict()[name])]
        same = carried.keys() == model.carried.keys()
        return report, unequal, same and all(torch.equal(carried[name], one) for name, one in model.carried.items())


def mutants() -> dict:
    """Damaged folders through `methods.from_pretrained`, watched from outside."""
    from tests.fuzz import runner

    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(10**6))
    outcome = runner.fuzz("hf_folders", count=MUTANTS, seed=seed)
    measured = {"seed": seed, **outcome.summary(), "failed": outcome.failures[:5]}
    return {"measured": measured, "holds": outcome.holds(MUTANTS)}


ROWS = {
    "hf_round_trip": (
        "checkpoint -> export -> transformers -> from_pretrained",
        "logits <= 1e-5, bit-equal",
        round_trip,
    ),
    "hf_originals": ("original files of the same numbers, S, B, L, V-JEPA 2 L", "every key used or carried", originals),
    "hf_mutants": (f"{MUTANTS:,} mutants of folders", "0 traces, <= 1 GiB, nothing executed", mutants),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
