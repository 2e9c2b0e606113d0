"""`main.py import`: configs in MMAction2's and PySlowFast's form, written for these tests, as our experiments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import main
from anal_tools.import_config import mmaction, pyslowfast, python_file, verb
from anal_tools.import_config.draft import EXACT, NOT, OTHER, Draft
from utils import config
from utils.errors import UserError

PIPELINE = """
train_pipeline = [
    dict(type='DecordInit', io_backend='disk'),
    dict(type='SampleFrames', clip_len={length}, frame_interval={interval}, num_clips={segments}),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 256)),
    {crop},
    dict(type='Resize', scale=(224, 224), keep_ratio=False),
    dict(type='Flip', flip_ratio=0.5{flip}),
    {more}
    dict(type='FormatShape', input_format='NCHW'),
    dict(type='PackActionInputs')
]
val_pipeline = [
    dict(type='DecordInit'),
    dict(type='SampleFrames', clip_len={length}, frame_interval={interval}, num_clips={segments}, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 256)),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackActionInputs')
]
test_pipeline = [
    dict(type='SampleFrames', clip_len={length}, frame_interval={interval}, num_clips={clips}, test_mode=True),
    dict(type='Resize', scale=(-1, 256)),
    dict(type='ThreeCrop', crop_size=256),
    dict(type='PackActionInputs')
]
"""
MULTI_SCALE = (
    "dict(type='MultiScaleCrop', input_size=224, scales=(1, .875), random_crop=False, max_wh_scale_gap=0, "
    "num_fixed_crops=13)"
)
TSM = """
model = dict(
    type='Recognizer2D',
    backbone=dict(type='ResNetTSM', pretrained='torchvision://resnet50', depth=50, norm_eval=False, shift_div=4),
    cls_head=dict(type='TSMHead', num_classes=12, in_channels=2048, dropout_ratio=0.3, init_std=0.002,
                  consensus=dict(type='AvgConsensus', dim=1), label_smooth_eps=0.1, average_clips='prob'),
    data_preprocessor=dict(type='ActionDataPreprocessor', mean=[127.5] * 3, std=[51, 51, 51], format_shape='NCHW'))
"""
RUN_1X = """
train_dataloader = dict(batch_size=6, num_workers=3, dataset=dict(type='VideoDataset', ann_file='lists/a.txt',
    data_prefix=dict(video='videos/a'), pipeline=train_pipeline))
val_dataloader = dict(batch_size=6, dataset=dict(type='VideoDataset', ann_file='lists/b.txt',
    data_prefix=dict(video='videos/b'), pipeline=val_pipeline, test_mode=True))
test_dataloader = dict(batch_size=1, dataset=dict(type='VideoDataset', ann_file='lists/b.txt',
    data_prefix=dict(video='videos/b'), pipeline=test_pipeline, test_mode=True))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=50, val_begin=1, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=5),
    dict(type='MultiStepLR', begin=0, end=50, by_epoch=True, milestones=[25, 45], gamma=0.1)]
optim_wrapper = dict(constructor='TSMOptimWrapperConstructor', paramwise_cfg=dict(fc_lr5=True),
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0005), clip_grad=dict(max_norm=20, norm_type=2))
auto_scale_lr = dict(enable=True, base_batch_size=24)
default_hooks = dict(logger=dict(type='LoggerHook', interval=7))
"""
SLOWFAST = """
model = dict(
    type='Recognizer3D',
    backbone=dict(type='ResNet3dSlowFast', resample_rate=4, speed_ratio=4, channel_ratio=8,
        slow_pathway=dict(type='resnet3d', depth=101, lateral=True, conv1_kernel=(1, 7, 7), inflate=(0, 0, 1, 1),
                          fusion_kernel=7, lateral_norm=True),
        fast_pathway=dict(type='resnet3d', depth=50, lateral=False, base_channels=8, conv1_kernel=(5, 7, 7))),
    cls_head=dict(type='SlowFastHead', in_channels=2304, num_classes=400))
"""
COSINE_1X = """
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=34{convert}),
    dict(type='CosineAnnealingLR', T_max={length}, eta_min=0, by_epoch=True, begin={begin}, end=256)]
train_cfg = dict(max_epochs=256)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True))
"""
RUN_0X = """
dataset_type = 'RawframeDataset'
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_bgr=False)
train_pipeline = [
    dict(type='SampleFrames', clip_len=8, frame_interval=8, num_clips=1),
    dict(type='RawFrameDecode'),
    dict(type='Resize', scale=(-1, 256)),
    dict(type='RandomResizedCrop', area_range=(0.2, 1.0)),
    dict(type='Resize', scale=(112, 112), keep_ratio=False),
    dict(type='Flip', flip_ratio=0),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='Collect', keys=['imgs', 'label'], meta_keys=[]),
    dict(type='ToTensor', keys=['imgs', 'label'])]
data = dict(videos_per_gpu=4, workers_per_gpu=2,
    train=dict(type=dataset_type, ann_file='a.txt', data_prefix='frames', filename_tmpl='{:06}.jpg',
               pipeline=train_pipeline),
    val=dict(type=dataset_type, ann_file='b.txt', data_prefix='frames', filename_tmpl='{:06}.jpg', pipeline=[]))
optimizer = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0001)
optimizer_config = dict(grad_clip=dict(max_norm=40, norm_type=2))
lr_config = dict(policy='CosineAnnealing', min_lr=0, warmup='linear', warmup_ratio=0.1, warmup_by_epoch=True,
                 warmup_iters=34)
total_epochs = 256
evaluation = dict(interval=5, metrics=['top_k_accuracy'])
model = dict(type='Recognizer3D',
    backbone=dict(type='ResNet3dSlowOnly', depth=50, pretrained=None, lateral=False, conv1_kernel=(1, 7, 7),
                  conv1_stride_t=1, pool1_stride_t=1, inflate=(0, 0, 1, 1), norm_eval=False),
    cls_head=dict(type='I3DHead', in_channels=2048, num_classes=400, spatial_type='avg', dropout_ratio=0.5),
    train_cfg=None, test_cfg=dict(average_clips='prob'))
"""
PYSLOWFAST = """
TRAIN: {BATCH_SIZE: 64, EVAL_PERIOD: 10, DATASET: kinetics}
DATA: {NUM_FRAMES: 32, SAMPLING_RATE: 2, PATH_TO_DATA_DIR: lists/k, PATH_PREFIX: videos}
SLOWFAST: {ALPHA: 4, BETA_INV: 8, FUSION_KERNEL_SZ: 5}
RESNET: {DEPTH: 101, ZERO_INIT_FINAL_BN: True, NUM_BLOCK_TEMP_KERNEL: [[3, 3], [4, 4], [6, 23], [3, 3]]}
BN: {USE_PRECISE_STATS: True, NUM_BATCHES_PRECISE: 100}
SOLVER: {BASE_LR: 0.1, LR_POLICY: cosine, MAX_EPOCH: 196, WARMUP_EPOCHS: 34, BASE_LR_SCALE_NUM_SHARDS: True}
MODEL: {ARCH: slowfast, NUM_CLASSES: 400}
NUM_GPUS: 8
NUM_SHARDS: 4
"""


def pipeline(**changes: object) -> str:
    """The pipelines of a 1.x config."""
    usual = {"length": 1, "interval": 1, "segments": 8, "clips": 8, "crop": MULTI_SCALE, "flip": "", "more": ""}
    return PIPELINE.format(**(usual | changes))


def imported(folder: Path, text: str, name: str = "config.py") -> tuple[config.Config, Draft]:
    """The loaded experiment and the draft of a text."""
    (folder / name).write_text(text)
    draft = verb.convert(folder / name)
    return config.load(verb.write(folder / "exp", folder / name, draft, [])), draft


def refusal(folder: Path, text: str, name: str = "config.py") -> str:
    (folder / name).write_text(text)
    with pytest.raises(UserError) as caught:
        verb.convert(folder / name)
    assert str(caught.value).startswith(str(folder / name))
    return str(caught.value)


def rows(draft: Draft, kind: str) -> str:
    return "\n".join(f"{row.theirs} -> {row.ours} {row.note}" for row in draft.rows if row.kind == kind)


def test_tsm_of_1x(tmp_path: Path) -> None:
    cfg, draft = imported(tmp_path, pipeline(flip=", flip_label_map={3: 2, 2: 3}") + TSM + RUN_1X)
    assert (cfg.model.type, cfg.model.backbone, cfg.model.num_segments) == ("tsm", "resnet50", 8)
    assert (cfg.model.num_class, cfg.model.dropout, cfg.model.pretrained) == (12, 0.3, True)
    assert cfg.model.kwargs["shift_div"] == 4
    assert cfg.model.kwargs["fc_std"] == 0.002
    assert (cfg.augmentation.crop, cfg.augmentation.scales, cfg.augmentation.max_distort) == (
        "multi_scale",
        (1, 0.875),
        0,
    )
    assert cfg.augmentation.more_fix_crop
    assert (cfg.augmentation.mean, cfg.augmentation.std) == ((0.5,) * 3, (0.2,) * 3)
    assert (cfg.data.reader, cfg.data.sampling, cfg.data.flip_labels) == ("video", "mmaction2_1x", ((2, 3),))
    assert (cfg.batch_size, cfg.shards, cfg.reference_batch, cfg.workers) == (6, 4, 24, 3)
    schedule = cfg.lr_scheduler
    assert (schedule.type, schedule.base_lr, schedule.warmup_lr) == ("STEP", pytest.approx(0.002), 0.02)
    assert (schedule.warmup_epochs, schedule.warmup_by, schedule.lr_epochs, schedule.max_epoch) == (
        4,
        "epoch",
        (25, 45),
        50,
    )
    assert (cfg.policy, cfg.label_smooth, cfg.clip_grad, cfg.weight_decay) == (True, 0.1, 20, 0.0005)
    assert (cfg.val_freq_epochs, cfg.print_freq) == (2, 7)
    assert (cfg.train_source.rpartition("/")[2], cfg.val_root.rpartition("/")[2]) == ("a.txt", "b")
    assert draft.test == "--views 1x3 --scale 256 --crop-size 256 --average prob"
    assert "auto_scale_lr.enable" in rows(draft, NOT)
    assert "fetch resnet50" in rows(draft, OTHER)
    assert "none is known" not in rows(draft, NOT)


def test_only_keys_that_differ_from_the_defaults_are_written(tmp_path: Path) -> None:
    _, _ = imported(tmp_path, pipeline() + TSM + RUN_1X)
    text = (tmp_path / "exp" / "config.yaml").read_text()
    assert "momentum" not in text
    assert "flip" not in text
    assert "fc_lr5" not in text
    assert (tmp_path / "exp" / "train.sh").stat().st_mode & 0o100


def test_slowfast_with_a_cosine_that_begins_with_the_run(tmp_path: Path) -> None:
    text = pipeline(length=32, interval=2, segments=1, clips=10, crop="dict(type='RandomResizedCrop')") + SLOWFAST
    text += RUN_1X + COSINE_1X.format(convert=", convert_to_iter_based=True", length=256, begin=0)
    cfg, draft = imported(tmp_path, text)
    options = {"slow_index": "strided", "slow_first": False, "fast_backbone": "resnet50"}  # alpha 4 and 7 are defaults
    assert options.items() <= cfg.model.kwargs.items()
    assert (cfg.model.backbone, cfg.model.dropout) == ("resnet101", 0.8)
    assert (cfg.model.num_segments, cfg.data.clip_len, cfg.data.frame_interval) == (1, 32, 2)
    schedule = cfg.lr_scheduler
    assert (schedule.type, schedule.warmup_epochs, schedule.warmup_type) == ("COSINE", 34, "factor_linear")
    assert (schedule.step_by, schedule.warmup_by, schedule.cosine_begin_epoch) == ("epoch", "iteration", None)
    assert (cfg.nesterov, cfg.clip_grad) == (True, None)
    assert draft.test.startswith("--views 10x3 ")


def test_a_cosine_behind_the_warm_up_begins_where_theirs_does(tmp_path: Path) -> None:
    text = pipeline() + TSM + RUN_1X + COSINE_1X.format(convert="", length=222, begin=34)
    schedule = imported(tmp_path, text)[0].lr_scheduler
    assert (schedule.warmup_epochs, schedule.warmup_by, schedule.cosine_begin_epoch) == (33, "epoch", 34)
    assert schedule.warmup_type == "to_peak"


@pytest.mark.parametrize("paramwise", ["dict(bias_decay_mult=0)", "dict(norm_decay_mult=0.5)"])
def test_bfloat16_and_decays_that_there_are_not(tmp_path: Path, paramwise: str) -> None:
    wrapper = f"type='AmpOptimWrapper', dtype='bfloat16', paramwise_cfg={paramwise}, optimizer=dict(type='SGD', lr=0.1"
    recipe = COSINE_1X.format(convert="", length=222, begin=34).replace("optimizer=dict(type='SGD', lr=0.1", wrapper)
    cfg, draft = imported(tmp_path, pipeline() + TSM + RUN_1X + recipe)
    assert (cfg.precision, cfg.no_wd) == ("bf16", False)
    assert "decay_mult" in rows(draft, NOT)


def test_milestones_count_from_begin(tmp_path: Path) -> None:
    text = pipeline() + TSM + RUN_1X.replace("begin=0, end=50", "begin=5, end=50").replace("[25, 45]", "[20, 45]")
    cfg, draft = imported(tmp_path, text)
    assert cfg.lr_scheduler.lr_epochs == (25,), "45 + 5 is the end of the run"
    assert "count from begin" in rows(draft, OTHER)


def test_slowonly_of_0x(tmp_path: Path) -> None:
    cfg, draft = imported(tmp_path, RUN_0X)
    assert (cfg.model.type, cfg.data.sampling, cfg.data.reader, cfg.data.template) == (
        "slowonly",
        "mmaction2_0x",
        "frames",
        "{:06}.jpg",
    )
    assert (cfg.data.frame_base, cfg.data.flip) == (1, False)
    assert (cfg.augmentation.area, cfg.augmentation.input_size) == ((0.2, 1.0), 112)
    assert (cfg.batch_size, cfg.shards, cfg.reference_batch) == (4, 8, 32)
    schedule = cfg.lr_scheduler
    assert (schedule.base_lr, schedule.warmup_lr, schedule.warmup_epochs) == (pytest.approx(0.01), 0.1, 34)
    assert (schedule.warmup_type, schedule.step_by, schedule.min_lr) == ("factor_linear", "epoch", 0)
    assert (cfg.clip_grad, cfg.val_freq_epochs) == (40, 5)
    assert "8 is their usual number" in (tmp_path / "exp/config.yaml").read_text()
    assert "--gpus" in rows(draft, NOT)


def test_slowfast_of_pyslowfast(tmp_path: Path) -> None:
    cfg, draft = imported(tmp_path, PYSLOWFAST, "config.yaml")
    options = {"fusion_kernel": 5, "res4_temporal_blocks": 6, "fast_res4_temporal_blocks": 23}
    assert options.items() <= cfg.model.kwargs.items()
    assert (cfg.batch_size, cfg.shards, cfg.reference_batch) == (8, 32, 256)
    assert (cfg.lr_scheduler.warmup_lr, cfg.lr_scheduler.base_lr) == (pytest.approx(0.4), pytest.approx(0.04))
    assert cfg.lr_scheduler.warmup_type == "to_schedule"
    assert (cfg.no_wd, cfg.nesterov, cfg.precise_bn.batches) == ("bn", True, 100)
    assert (cfg.augmentation.crop, cfg.augmentation.mean) == ("short_side_jitter", (0.45,) * 3)
    assert cfg.train_source.endswith("lists/k/train.csv")
    assert draft.test.startswith("--protocol k400-10x3")
    assert "NUM_GPUS = 8; NUM_SHARDS = 4" in rows(draft, EXACT)


def test_steps_of_pyslowfast(tmp_path: Path) -> None:
    text = PYSLOWFAST.replace(
        "LR_POLICY: cosine", "LR_POLICY: steps_with_relative_lrs, LRS: [1, 0.1, 0.02], STEPS: [0, 94, 154]"
    )
    schedule = imported(tmp_path, text, "config.yaml")[0].lr_scheduler
    assert (schedule.lr_epochs, schedule.lr_mults) == ((94, 154), (0.1, pytest.approx(0.2)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("type='ResNetTSM'", "type='timm.swin_base'", "model.backbone.type: 'timm.swin_base'"),
        ("type='TSMHead'", "type='RPNHead'", "model.cls_head.type: 'RPNHead'"),
        ("type='Recognizer2D'", "type='FasterRCNN'", "model.type: 'FasterRCNN'"),
        ("depth=50", "depth='fifty'", "model.backbone.depth: 'fifty' is not a number"),
        ("num_classes=12, ", "", "model.cls_head.num_classes: None is not a number"),
        ("shift_div=4", "shift_div=4, style='caffe'", "model.backbone.style: 'caffe' makes a different network"),
        ("type='SGD'", "type='Lion'", "optimizer.type: 'Lion' is not supported here"),
        ("lr=0.02", "lr='high'", "optimizer.lr: 'high' is not a number"),
        ("type='MultiStepLR'", "type='OneCycleLR'", "'OneCycleLR' is not supported here"),
        ("by_epoch=True, milestones", "by_epoch=False, milestones", "by_epoch: a schedule in iterations"),
        ("dict(type='Flip'", "dict(type='Mosaic', a=1), dict(type='Flip'", "'Mosaic' is not supported here"),
        (
            "type='VideoDataset', ann_file='lists/a.txt'",
            "type='AVADataset', ann_file='x'",
            "'AVADataset' is not supported here",
        ),
        ("ann_file='lists/a.txt'", "ann_file='lists/a.txt', modality='Flow'", "modality: 'Flow'"),
        ("max_epochs=50", "max_epochs=1e12", "refused here"),
        ("max_norm=20", "max_norm=-3", "refused here: config.yaml"),
        ("batch_size=6, num_workers", "batch_size=[6], num_workers", "batch_size: [6] is not a number"),
        ("pipeline=train_pipeline", "pipeline=7", "pipeline: 7 is not a list of dicts"),
        ("model = dict(", "models = dict(", "has no `model`"),
    ],
)
def test_what_cannot_be_taken_over_is_named_by_key(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = pipeline() + TSM + RUN_1X
    assert old in text
    message = refusal(tmp_path, text.replace(old, new))
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ARCH: slowfast", "ARCH: mvit", "MODEL.ARCH: 'mvit' is not supported here"),
        ("NUM_GPUS: 8", "NUM_GPUS: 8\nMULTIGRID: {SHORT_CYCLE: True}", "MULTIGRID.SHORT_CYCLE"),
        ("NUM_GPUS: 8", "NUM_GPUS: 8\nNUM_GPUS: 4", "given twice, first in line"),
        ("NUM_GPUS: 8", "NUM_GPUS: !!python/object/apply:os.system ['touch CANARY']", "the tag"),
        ("NUM_GPUS: 8", "NUM_GPUS: 7", "not a multiple of NUM_GPUS"),
        ("MAX_EPOCH: 196", "MAX_EPOCH: many", "SOLVER.MAX_EPOCH: 'many' is not a number"),
        ("[6, 23]", "[6, 'x']", "NUM_BLOCK_TEMP_KERNEL"),
        ("MODEL: {", "MODEL: [", "not valid YAML"),
    ],
)
def test_what_pyslowfast_says_and_cannot_be_taken_over(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in PYSLOWFAST
    assert words in refusal(tmp_path, PYSLOWFAST.replace(old, new), "config.yaml")
    assert not Path("CANARY").exists()


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything in a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(value: Any, path: tuple, new: object) -> object:
    """A copy of a nested value with another one at a path; `...` removes it."""
    if not path:
        return new
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    items[path[0]] = changed(items[path[0]], path[1:], new)
    items = {key: inner for key, inner in items.items() if inner is not ...}
    return items if isinstance(value, dict) else type(value)(items.values())


@pytest.mark.parametrize("base", ["1x", "0x", "test only"])
def test_whatever_is_missing_or_odd_is_taken_over_or_named(tmp_path: Path, base: str) -> None:
    """Every value of a config removed, and replaced by three others: an experiment or a UserError, nothing else."""
    text = RUN_0X if base == "0x" else pipeline(more="dict(type='ColorJitter'),") + TSM + RUN_1X
    (tmp_path / "whole.py").write_text(text)
    whole = python_file.read(tmp_path / "whole.py")
    if base == "test only":
        whole = {key: whole[key] for key in ("model", "test_dataloader")}
    file, outcomes = tmp_path / "config.py", set()
    for path in list(places(whole)):
        if str(path[0]).endswith(("_pipeline", "_cfg")) and len(path) > 1:
            continue  # a name of the file itself, copied where it counts
        for new in (..., "odd", -1, {"type": "odd"}):
            tree = changed(whole, path, new)
            assert isinstance(tree, dict)
            file.write_text("\n".join(f"{key} = {value!r}" for key, value in tree.items()))
            message = ""
            try:
                mmaction.convert(file).yaml([])
            except UserError as error:
                message = str(error)
            assert "\n" not in message
            outcomes.add("named" if message else "taken")
    assert outcomes == {"taken", "named"}


def test_odd_values_of_pyslowfast_are_taken_over_or_named(tmp_path: Path) -> None:
    """The same for a YAML file."""
    text = PYSLOWFAST + "NONLOCAL: {LOCATION: [[[], []], [[1, 3], []], [[1, 3, 5], []], [[], []]]}\n"
    whole, file, outcomes = (
        yaml.safe_load(text.replace("DEPTH: 101", "DEPTH: 50").replace("[6, 23]", "[6, 6]")),
        tmp_path / "a.yaml",
        set(),
    )
    for path in list(places(whole)):
        for new in (..., "odd", [], [[0]]):
            file.write_text(yaml.safe_dump(changed(whole, path, new)))
            message = ""
            try:
                pyslowfast.convert(file).yaml([])
            except UserError as error:
                message = str(error)
            assert "\n" not in message
            outcomes.add("named" if message else "taken")
    assert outcomes == {"taken", "named"}


def test_the_verb_writes_a_folder_or_only_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tsm_8xb6.py"
    file.write_text(pipeline() + TSM + RUN_1X)
    assert main.main(["import", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "kept with a different meaning" in shown
    assert "nothing was written" in shown
    assert main.main(["import", str(file), "--out", str(tmp_path / "exp"), "--gpus", "2"]) == 0
    assert config.load(tmp_path / "exp").shards == 2
    table = (tmp_path / "exp" / "import.txt").read_text()
    assert "train_cfg.max_epochs = 50" in table
    assert "not kept" in table
    assert main.main(["import", str(file), "--out", str(tmp_path / "exp")]) == 2
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["import", "missing.py"], "there is no such file"),
        (["import", "README.md"], "neither a .py config"),
        (["import", "main.py"], "main.py:8:"),
        (["import", "README.md", "--gpus", "0"], "--gpus 0"),
    ],
)
def test_a_wrong_command_is_one_sentence(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv) == 2
    heard = capsys.readouterr().err
    assert words in heard
    assert heard.count("\n") == 1
