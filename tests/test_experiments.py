"""Every shipped experiment loads, says where its numbers are from, trains one step, and stands in the docs."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import main
from anal_tools import experiments
from anal_tools.evaluate import protocols
from datasets.plan.metadata import VideoMetadata
from datasets.plan.sampling import PRESETS
from datasets.plan.train import TRAIN_CROPS, draw, resolve, train_spec
from datasets.plan.views import eval_spec, resolve_eval
from utils import config, lr_schedule
from utils.config import schema
from utils.engine import setup
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
EXPS = [exp for exp, _ in experiments.find([])]
CONFIGS = {exp: config.load(exp) for exp in EXPS}
RECIPES = [exp for exp in EXPS if CONFIGS[exp].published.source]
SMALL = {"resnet50": "resnet18", "resnet101": "resnet18", "resnet50_vd": "resnet18_vd", "resnet101_vd": "resnet18_vd"}
# The published recipes that are shipped: a part of a folder's name, and how many folders have it at least.
AT_LEAST = {
    "kinetics400_exps/tsn_": 5,
    "kinetics400_exps/tsm_": 8,
    "kinetics400_exps/slowonly_resnet50/.*4x16": 3,
    "kinetics400_exps/slowonly_resnet50/.*8x8": 3,
    "kinetics400_exps/slowonly_resnet101/.*8x8": 1,
    "kinetics400_exps/slowfast_resnet50/.*4x16": 2,
    "kinetics400_exps/slowfast_resnet50/.*8x8": 2,
    "kinetics400_exps/slowfast_resnet101/": 3,
    "kinetics400_exps/tpn_resnet50/.*(8x8|16x4|32x2)": 5,
    "kinetics400_exps/tpn_resnet101/.*(8x8|16x4|32x2)": 3,
    "kinetics400_exps/pptsn_": 1,
    "kinetics400_exps/pptsm_.*uniform": 1,
    "kinetics400_exps/pptsm_.*dense": 2,
    "sthv1_exps/(tsn|tsm|tpn)_": 5,
    "sthv2_exps/(tsn|tsm|tpn)_": 6,
    "kinetics400_exps/videomae_": 4,
    "kinetics400_exps/probe_": 1,
    "sthv2_exps/videomae_": 2,
    "sthv2_exps/probe_": 1,
    "ucf101_exps/": 6,
    "hmdb51_exps/": 4,
    "ucf_sports_exps/": 6,
    "weizmann_exps/": 6,
    "ut_interaction_exps/": 2,
}


def name_of(exp: Path) -> str:
    return str(exp.relative_to(ROOT / "exps"))


def first_of_each_network() -> set[Path]:
    """One experiment of each method and backbone: the others differ in data, lengths and rates."""
    firsts: dict[tuple[str, str], Path] = {}
    for exp in EXPS:
        model = CONFIGS[exp].model
        firsts.setdefault((model.type, model.backbone), exp)
    return set(firsts.values())


FIRST = first_of_each_network()
every_experiment = pytest.mark.parametrize("exp", EXPS, ids=name_of)
every_recipe = pytest.mark.parametrize("exp", RECIPES, ids=name_of)


@pytest.mark.parametrize("pattern", AT_LEAST)
def test_the_published_recipes_are_there(pattern: str) -> None:
    assert len([exp for exp in EXPS if re.match(pattern, name_of(exp))]) >= AT_LEAST[pattern]


@every_experiment
def test_scripts_are_the_two_lines(exp: Path) -> None:
    for verb in ("train", "eval"):
        script = exp / f"{verb}.sh"
        assert script.stat().st_mode & 0o111, f"{script} cannot be run"
        text = script.read_text()
        assert len(text.splitlines()) == 2
        assert f"launch/exp.sh {verb} " in text


@every_recipe
def test_numbers_have_a_source_and_accuracy_is_called_others(exp: Path) -> None:
    text = (exp / "config.yaml").read_text(encoding="utf-8")
    assert re.search(r"^# Recipe: .{20,}", text, re.MULTILINE)
    assert re.search(r"^    published: +# by others, not reproduced here$", text, re.MULTILINE)
    cfg = CONFIGS[exp]
    assert cfg.published.top1 or (cfg.published.source or "").endswith("not checked")
    assert cfg.published.protocol
    assert len(text.splitlines()) <= 85, "one page"
    assert max(map(len, text.splitlines())) <= 150
    for path in (cfg.train_root, cfg.val_root, cfg.train_source, cfg.val_source):
        assert Path(path).is_relative_to(ROOT / "data" / experiments.data_set(cfg))
    assert cfg.reference_batch == cfg.batch_size * (cfg.shards or 0), "the rates belong to the batch that is set"


@every_recipe
def test_the_evaluation_beside_the_protocol_is_one(exp: Path) -> None:
    """`# eval.sh ... --protocol k400-10x3`: views that this experiment's sampling defines."""
    line = re.search(r"# eval\.sh \.\.\. --(\S+) (\S+)$", (exp / "config.yaml").read_text(), re.MULTILINE)
    if line is None:  # published without saying how, or with views that have no name here
        return
    option, value = line[1].replace("-", "_"), int(line[2]) if line[2].isdigit() else line[2]
    chosen: dict[str, Any] = {
        "protocol": None,
        "views": None,
        "scale": None,
        "crop_size": None,
        "average": None,
        "per_position": False,
    }
    assert option in chosen
    spec = protocols.choose(CONFIGS[exp], **{**chosen, option: value}).spec
    assert resolve_eval(VideoMetadata(300, 240, 320, 30.0), spec, 0).clip_rows.shape == (
        spec.views,
        spec.sampling.frames_per_clip,
    )


@every_recipe
def test_learning_rate_starts_peaks_and_ends_as_written(exp: Path) -> None:
    cfg = CONFIGS[exp]
    cfg = config.resolve_lengths(cfg, 2_000, cfg.batch_size * (cfg.shards or 1))
    schedule = cfg.lr_scheduler
    names = ("type", "base_lr", "warmup_steps", "warmup_lr", "min_lr", "max_iter", "lr_steps", "lr_mults")
    options: dict[str, Any] = {name: getattr(schedule, name) for name in names} | {"warmup_type": schedule.warmup_type}
    assert schedule.max_iter is not None
    rates = [lr_schedule.lr_at(k, **options) for k in range(schedule.max_iter)]
    assert rates[0] == pytest.approx(schedule.base_lr, rel=1e-6)
    # A warm-up that aims at a schedule which has begun to fall ends below the peak.
    assert 0.9 * (schedule.warmup_lr or 0) <= max(rates) <= 1.000001 * (schedule.warmup_lr or 0)
    assert 0 < rates[-1] <= max(rates)


@every_experiment
def test_clips_have_the_frames_of_the_model(exp: Path) -> None:
    """The sampling preset, the crop and the lengths go together, for a long and for a very short video."""
    cfg = CONFIGS[exp]
    for video in (VideoMetadata(300, 240, 320, 30.0), VideoMetadata(3, 320, 240, 25.0)):
        spec = train_spec(cfg)
        plan = resolve(draw(0, 0, 7, spec), video, spec, 0)
        views = resolve_eval(video, eval_spec(cfg), 0)
        assert len(plan.frames) == views.clip_rows.shape[1] == cfg.model.num_segments * cfg.data.clip_len
        assert 0 <= plan.frames.min() <= plan.frames.max() < video.frames
        x1, y1, x2, y2 = plan.box
        assert 0 <= x1 < x2 <= video.width
        assert 0 <= y1 < y2 <= video.height
        assert np.all(views.boxes >= 0)


def small(exp: Path, data: Path) -> list[str]:
    """Overrides that keep the experiment's method, options, frames, loss and optimiser, and shrink the rest."""
    cfg = CONFIGS[exp]
    sets = {
        "model.backbone": SMALL.get(cfg.model.backbone, cfg.model.backbone),
        "model.pretrained": "false",
        "model.num_class": 8,
        "augmentation.input_size": 32,
        "augmentation.test_resize": 36,
        "data.reader": "video",
        "data.class_names": data / "lists/classInd.txt",
        "workers": 0,
        "batch_size": 2,
        "shards": 1,
        "model.kwargs.bn_group_size": 1,
        "reference_batch": 2,
        "train_root": data,
        "val_root": data,
        "train_source": data / "lists/train.txt",
        "val_source": data / "lists/val.txt",
    }
    if cfg.model.backbone.startswith("vit3d_"):  # two blocks of width 24, and pairs of two videos
        sets |= {"model.backbone": "vit3d", "batch_size": 4, "reference_batch": 4}
        sets |= {f"model.kwargs.{name}": value for name, value in (("width", 24), ("depth", 2), ("mlp_ratio", 2.0))}
        sets |= {"model.kwargs.heads": 2} | (
            {"model.kwargs.pooler_heads": 2} if "pooler_heads" in cfg.model.kwargs else {}
        )
    if cfg.model.kwargs.get("fast_backbone"):
        sets["model.kwargs.fast_backbone"] = "resnet18"
    if cfg.data.folds:  # each fold is an experiment without
        sets["data.folds"] = "null"
    if cfg.data.flip_labels:
        sets["data.flip_labels"] = "[[left, right], [2, 3]]"
    return [f"{key}={value}" for key, value in sets.items()]


@pytest.mark.parametrize(
    "exp", [pytest.param(exp, marks=() if exp in FIRST else pytest.mark.nightly) for exp in EXPS], ids=name_of
)
def test_one_training_step_at_small_size(exp: Path, tmp_path: Path, tiny_videos: Path) -> None:
    """The real start of a run (config, lists, model, optimiser), one batch of real videos, one step."""
    (tmp_path / "config.yaml").write_bytes((exp / "config.yaml").read_bytes())
    with setup.start(tmp_path, overrides=small(exp, tiny_videos), fresh=False) as run:
        classifier = run.learner.net.get_submodule("classifier")
        assert isinstance(classifier, nn.Linear)
        before = classifier.weight.detach().clone()
        step, batches = next(run.steps())
        numbers = main.train_step(run.learner, step, batches, stop=False, save=False)
        assert np.isfinite(numbers["loss"])
        assert numbers["loss"] > 0
        assert not torch.equal(before, classifier.weight), "the step changed nothing"


def test_the_schema_allows_what_the_plan_knows() -> None:
    choices = {key: set(typing.get_args(info.annotation)) for key, info in schema.leaves()}
    assert choices["data.sampling"] == set(PRESETS)
    assert choices["augmentation.crop"] == set(TRAIN_CROPS)


def test_published_accuracy_is_no_part_of_a_run() -> None:
    values = config.to_dict(config.load(RECIPES[0]))
    sets = [
        "published.top1=1",
        "published.top5=null",
        "published.gpus=3",
        "published.source=me",
        "published.protocol=one",
    ]
    other = config.to_dict(config.load(RECIPES[0], sets))
    changed = config.differences(values, other)
    assert len(changed) == len(sets)
    assert all(free for *_, free in changed)
    without = {key: value for key, value in values.items() if key != "published"}
    assert all(free for *_, free in config.differences(without, values)), "a checkpoint from before this section"
    with pytest.raises(UserError, match="published.top1: must be at most 100"):
        config.load(RECIPES[0], ["published.top1=750"])


@pytest.fixture(scope="module")
def listed() -> list[dict[str, str]]:
    rows, problems = experiments.collect([])
    assert problems == []
    return rows


@pytest.mark.slow
def test_the_list_has_every_experiment_once(listed: list[dict[str, str]]) -> None:
    assert [row["experiment"] for row in listed] == sorted(map(name_of, EXPS))
    lines = experiments.text(listed).splitlines()
    assert len(lines) == 1 + len(EXPS)
    column = lines[0].index("GMACs/view") + len("GMACs/view")
    for line, row in zip(lines[1:], listed, strict=True):
        assert line[:column].endswith(row["GMACs/view"]), "columns line up"


@pytest.mark.slow
def test_cost_and_accuracy_in_the_list(listed: list[dict[str, str]]) -> None:
    """Against the published figures: TSM repository, MMAction2, PySlowFast and TPN (tests/methods has all of them)."""
    by_experiment = {row["experiment"].removeprefix("kinetics400_exps/"): row for row in listed}
    for name, params, macs, accuracy in (
        ("tsm_resnet50/mmaction2_seg8_batch128_lr0.02_epoch50", "24.33", "32.88", "73.18 / 90.56"),
        ("slowonly_resnet50/mmaction2_4x16_batch128_lr0.2_epoch256", "32.45", "20.96", "72.97 / 90.88"),
        ("slowfast_resnet50/mmaction2_4x16_batch64_lr0.1_epoch256", "34.48", "27.82", "75.55 / 92.35"),
        ("slowfast_resnet50/pyslowfast_8x8_batch64_lr0.1_epoch196", "34.57", "50.58", "77.00 / 92.60"),
        ("tpn_resnet101/tpn_repo_8x8_batch64_lr0.01_epoch150", "119.40", None, "77.20"),  # published without BN
        ("pptsm_resnet50_vd/uniform8_batch128_lr0.01_epoch80", "24.35", None, "74.54"),
    ):
        row = by_experiment[name]
        assert row["M params"] == params
        assert macs is None or row["GMACs/view"] == macs, name
        assert row["top-1 / top-5"] == accuracy


@pytest.mark.slow
def test_the_table_of_the_docs_is_the_one_that_is_printed(listed: list[dict[str, str]]) -> None:
    page = (ROOT / experiments.DOCS).read_text(encoding="utf-8")
    assert experiments.with_table(page, experiments.markdown(listed)) == page, "run python main.py list --docs"


@pytest.mark.parametrize(
    ("pretrained", "word"),
    [
        (True, "ImageNet"),
        (False, "random"),
        (str(ROOT / "exps/kinetics400_exps/tsm_resnet50/x"), "kinetics400"),
        ("pretrained/ResNet50_vd_ssld_v2_pretrained.pdparams", "ResNet50_vd_ssld_v2"),
        ("/data/ckpt_best.pth.tar", "ckpt_best"),
    ],
)
def test_where_weights_start_from(pretrained: bool | str, word: str) -> None:
    assert experiments.start(pretrained) == word


def test_broken_and_copied_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (ROOT / "exps/demo_exps/tsn_resnet18/motion8/config.yaml").read_text()
    for place, text in (("good", good), ("bad", good.replace("tsn", "tsx")), ("good/jobs/code", good), ("x|y", good)):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.yaml").write_text(text)
    assert experiments.main([str(tmp_path), "--markdown"]) == 2
    out, err = capsys.readouterr()
    assert "bad/config.yaml:5: common.model.type: there is no method called tsx" in err
    assert out.count("\n") == 2 + 2, "a copy below jobs/ is no experiment of its own"
    assert f"{tmp_path}/x\\|y" in out
    with pytest.raises(UserError, match="there is no such folder"):
        experiments.main([str(tmp_path / "none")])
    with pytest.raises(UserError, match="give no folder with it"):
        experiments.main([str(tmp_path), "--docs"])
    (tmp_path / "empty").mkdir()
    assert experiments.main([str(tmp_path / "empty")]) == 0
    assert "no experiments" in capsys.readouterr().out
