"""Loading, checking, resolving and comparing configs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from utils import config
from utils.config import model_options, schema, verb, yaml_lines
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.parent for path in (ROOT / "exps").glob("*_exps/*/*/config.yaml"))
SEED = "douyin_exps/tsn_v5_mobilenet/colorjitter_random_erasing_labelsmooth_0.1_nowd_coslr_bn16_gpu32_lr0.04_epoch100"

SMALL = """\
common:
    model: {type: tsn, backbone: resnet18, num_segments: 3, num_class: 4}
    batch_size: 8
    lr_scheduler:
        type: COSINE
        base_lr: 0.01
        max_iter: 100
    val_freq: 50
    train_root: /
    train_source: /nowhere/train.txt
    val_root: /
    val_source: /nowhere/val.txt
"""


def write(folder: Path, text: str = SMALL) -> Path:
    (folder / "config.yaml").write_text(text)
    return folder


def problems(exp: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        config.load(exp, overrides)
    lines = str(caught.value).splitlines()
    return lines[1:] if len(lines) > 1 else lines


# ---------------------------------------------------------------- what is accepted


def test_the_shipped_seed_text_is_the_published_one(shared_data: Path) -> None:
    page = (shared_data.parent / "design/seeds/004_e304c3d0b51a540e.txt").read_text(encoding="utf-8")
    text = "common:" + page.split("\ncommon:")[1].split("```")[0]
    assert (ROOT / "exps" / SEED / "config.yaml").read_text().strip() == text.strip()


def test_seed_text_is_accepted_unchanged_with_its_meaning() -> None:
    cfg = config.load(ROOT / "exps" / SEED)
    assert (cfg.model.type, cfg.model.backbone, cfg.model.num_segments) == ("tsn", "mobilenetv2", 3)
    assert (cfg.model.num_class, cfg.model.dropout, cfg.model.pretrained) == (152, 0.8, True)
    assert cfg.model.kwargs == {"bn_group_size": 16, "bn_sync_stats": True, "bn_var_mode": "L2", "t": 6}
    pixels = cfg.augmentation
    assert (pixels.input_size, pixels.test_resize, pixels.mix_up) == (224, 256, 0.2)
    assert pixels.colorjitter == (0.2, 0.2, 0.2, 0.1)
    assert pixels.random_erasing == (0.5, 0.02, 0.4, 0.3)
    assert (cfg.val_dense, cfg.workers, cfg.batch_size) == (False, 3, 32)
    rate = cfg.lr_scheduler
    assert (rate.type, rate.base_lr, rate.warmup_steps, rate.warmup_lr) == ("COSINE", 0.01, 500, 0.04)
    assert (rate.min_lr, rate.max_iter) == (0.0, 15010)
    assert (cfg.label_smooth, cfg.no_wd, cfg.policy, cfg.nesterov) == (0.1, True, False, True)
    assert (cfg.momentum, cfg.weight_decay, cfg.val_freq, cfg.print_freq) == (0.9, 0.0001, 250, 10)
    assert (cfg.train_root, cfg.val_root) == ("/", "/")
    assert cfg.train_source.endswith("/douyin_v5/lists/rgb_train.txt")


@pytest.mark.parametrize("exp", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT / "exps")))
def test_shipped_experiments_load(exp: Path) -> None:
    model = config.load(exp).model
    assert model.num_class >= 2
    assert exp.parent.name.startswith(f"{model.type}_"), "the folder names the method"


def test_defaults(tmp_path: Path) -> None:
    cfg = config.load(write(tmp_path))
    assert (cfg.data.reader, cfg.data.sampling, cfg.data.template, cfg.data.frame_base) == (
        "frames",
        "one_per_segment",
        "auto",
        "auto",
    )
    assert (cfg.data.on_bad, cfg.data.bad_budget, cfg.data.deadline_seconds, cfg.data.prefetch) == (
        "skip",
        0.001,
        60,
        2,
    )
    assert cfg.augmentation.scales == (1, 0.875, 0.75, 0.66)
    assert cfg.augmentation.colorjitter is cfg.augmentation.mix_up is cfg.clip_grad is None
    assert cfg.model.kwargs == {"bn_group_size": 1, "bn_sync_stats": False, "bn_var_mode": "L2"}
    assert (cfg.lr_scheduler.warmup_steps, cfg.lr_scheduler.warmup_lr) == (0, 0.01)


def test_off_is_none_in_every_spelling(tmp_path: Path) -> None:
    off = ("false", "False", "null", "0")
    for value in off:
        keys = ("augmentation.colorjitter", "augmentation.random_erasing", "augmentation.mix_up", "clip_grad")
        cfg = config.load(write(tmp_path), [f"{key}={value}" for key in keys])
        assert (cfg.augmentation.colorjitter, cfg.augmentation.random_erasing, cfg.augmentation.mix_up) == (None,) * 3
        assert cfg.clip_grad is None
        assert config.load(tmp_path, [f"label_smooth={value}"]).label_smooth == 0.0


def test_nothing_mutates_a_config(tmp_path: Path) -> None:
    cfg = config.load(write(tmp_path))
    with pytest.raises(ValidationError):
        cfg.batch_size = 9


# ---------------------------------------------------------------- --set


def test_overrides(tmp_path: Path) -> None:
    cfg = config.load(
        write(tmp_path),
        [
            "common.batch_size=16",
            "augmentation.mean=[0.5, 0.5, .5]",
            "weight_decay=1e-4",
            "model.kwargs.bn_group_size=2",
        ],
    )
    assert (cfg.batch_size, cfg.augmentation.mean, cfg.weight_decay) == (16, (0.5, 0.5, 0.5), 1e-4)
    assert cfg.model.kwargs["bn_group_size"] == 2
    assert cfg.origin("batch_size") == "--set"
    assert cfg.origin("val_freq") == f"{tmp_path / 'config.yaml'}:8"
    assert cfg.origin("seed") == "default"


def test_an_override_takes_the_place_of_its_partner(tmp_path: Path) -> None:
    cfg = config.load(write(tmp_path), ["lr_scheduler.max_epoch=2.5", "val_freq_epochs=1"])
    assert (cfg.lr_scheduler.max_iter, cfg.lr_scheduler.max_epoch, cfg.val_freq) == (None, 2.5, None)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.backbone=" + "x" * 900, "called " + "x" * 57 + "...; choose one of"),
        ("batchsize=3", "--set: common.batchsize: unknown key (did you mean batch_size?)"),
        ("batch_size", "--set batch_size: write it as key=value"),
        ("batch_size=[1", "--set batch_size=[1: not valid YAML"),
        ("model={type: tsn}", "the value must be one value or a list"),
        ("batch_size=eight", "--set: common.batch_size: must be an integer, not 'eight'"),
        ("batch_size.x=1", "--set: common.batch_size: must be an integer, not a section"),
        ("max_iter=5", "unknown key (did you mean common.lr_scheduler.max_iter?)"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, says: str) -> None:
    lines = problems(write(tmp_path), override)
    assert any(says in line for line in lines), lines


# ---------------------------------------------------------------- what is refused

PLANTED = """\
common:
    model:
        type: tsn
        backbone: resnet19
        num_segments: 0
        num_class: "152"
        dropout: 0.5
        kwargs: {bn_groupsize: 2}
    augmentation:
        input_size: 300
        colorjitter: [0.2, 0.2, 0.2]
        mix_up: 0.2
    workers: 3
    workers: 4
    batch_size: 33
    lr_scheduler:
        type: cosine
        base_lr: 0.01
        warmup_steps: 500
        warmup_lr: 0.04
        max_iter: 400
    lable_smooth: 0.1
    val_freq: 250
    train_root: /
    train_source: /lists/train.txt
    val_root: /
"""
FAULTS = {  # what the message must hold, by line
    1: "common.val_source: missing",
    4: "common.model.backbone: there is no backbone called resnet19 (did you mean resnet1",
    5: "common.model.num_segments: must be at least 1, not 0",
    6: "common.model.num_class: must be an integer, not '152'",
    8: "common.model.kwargs.bn_groupsize: not an option of any method or backbone (did you mean bn_group_size?)",
    10: "common.augmentation.input_size: a crop of 300 pixels does not fit",
    11: "common.augmentation.colorjitter: must hold 4 numbers, not 3",
    14: "common.workers: given twice, first in line 13",
    15: "common.batch_size: mix_up mixes neighbouring clips, so batch_size must be even, not 33",
    17: "common.lr_scheduler.type: must be one of COSINE, STEP, not 'cosine' (did you mean COSINE?)",
    19: "common.lr_scheduler.warmup_steps: must be less than max_iter",
    22: "common.lable_smooth: unknown key (did you mean label_smooth?)",
}


def test_all_planted_faults_are_reported_at_once_and_without_torch(tmp_path: Path) -> None:
    write(tmp_path, PLANTED)
    program = (
        "import sys; from utils import config; from utils.errors import UserError\n"
        "try: config.load(sys.argv[1])\n"
        "except UserError as error: print(error)\n"
        "assert not {'torch', 'numpy', 'cv2', 'av'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert len(FAULTS) == len(lines) == 12
    assert "12 problems" in head
    for (line, text), line_shown in zip(sorted(FAULTS.items()), lines, strict=True):
        assert line_shown.startswith(f"{tmp_path / 'config.yaml'}:{line}: {text}")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["lr_scheduler.warmup_steps=100", "lr_scheduler.warmup_lr=.1"], "warmup_steps: must be less than max_iter"),
        (["lr_scheduler.warmup_steps=5"], "warmup_lr: missing"),
        (["lr_scheduler.warmup_lr=.4"], "warmup_lr: has no effect without a warm-up"),
        (["lr_scheduler.min_lr=.4"], "min_lr: must not be greater than the peak"),
        (["augmentation.test_resize=200"], "a crop of 224 pixels does not fit"),
        (["augmentation.mix_up=0.2", "batch_size=7"], "batch_size must be even"),
        (["augmentation.cutmix=1", "batch_size=7"], "cutmix mixes neighbouring clips, so batch_size must be even"),
        (["augmentation.cutmix=1", "augmentation.mix_up_switch=.3"], "no effect unless both mix_up and cutmix are on"),
        (["data.num_sample=3", "batch_size=8"], "num_sample: must divide batch_size, which counts clips: 8 is no"),
        (["data.num_sample=2", "batch_size=6", "augmentation.cutmix=1"], "must be a multiple of 2 x num_sample, 4"),
        (["policy=true", "no_wd=true"], "common.policy: has no effect with no_wd"),
        (["nesterov=true", "momentum=0"], "nesterov: needs a momentum"),
        (["optimizer.type=adamw", "nesterov=true"], "nesterov: belongs to sgd and has no effect"),
        (["optimizer.type=adamw", "policy=true"], "policy: belongs to sgd and has no effect"),
        (["optimizer.betas=[.9, .95]"], "optimizer.betas: belongs to adamw and has no effect"),
        (["optimizer.type=adamw", "optimizer.betas=[.9, 1]"], "each number must lie between 0 and"),
        (["optimizer.type=adam"], "(did you mean adamw?)"),
        (["optimizer.layer_decay=1.5"], "layer_decay: must be less than 1"),
        (["lr_scheduler.type=STEP"], "lr_steps: missing"),
        (["lr_scheduler.type=STEP", "lr_scheduler.lr_steps=[5, 9]"], "lr_mults: missing"),
        (["lr_scheduler.type=STEP", "lr_scheduler.lr_steps=[9, 5]", "lr_scheduler.lr_mults=[1, 1]"], "must increase"),
        (["lr_scheduler.type=STEP", "lr_scheduler.lr_steps=[5, 9]", "lr_scheduler.lr_mults=[1]"], "1 factors for 2"),
        (["lr_scheduler.type=STEP", "lr_scheduler.lr_steps=[100]", "lr_scheduler.lr_mults=[1]"], "not before the end"),
        (["lr_scheduler.lr_steps=[5]"], "lr_steps: has no effect with type: COSINE"),
        (
            ["lr_scheduler.type=STEP", "lr_scheduler.lr_steps=[5]", "lr_scheduler.lr_mults=[1]"]
            + ["lr_scheduler.cosine_begin_epoch=1"],
            "cosine_begin_epoch: has no effect with type: STEP",
        ),
        (
            ["lr_scheduler.max_epoch=5", "lr_scheduler.cosine_begin_epoch=5"],
            "cosine_begin_epoch: 5 is not before the end",
        ),
        (["lr_scheduler.max_iter=null"], "max_iter: missing: give max_iter or max_epoch"),
        (["model.dropout=-0.1"], "dropout: must be at least 0"),
        (["model.dropout=1.5"], "dropout: must be less than 1, not 1.5"),
        (["model.num_class=1"], "num_class: must be at least 2"),
        (["model.pretrained=3"], "pretrained: must be true, false or a path, not 3"),
        (["model.kwargs.bn_group_size=0"], "bn_group_size: must be at least 1"),
        (["model.kwargs.bn_var_mode=L1"], "bn_var_mode: must be L2, not 'L1'"),
        (["model.kwargs.fc_std=big"], "fc_std: must be a number, not 'big'"),
        (["model.kwargs.t=6"], "kwargs.t: not an option of tsn on resnet18"),
        (["augmentation.colorjitter=true"], "colorjitter: must be a list, not true"),
        (["augmentation.colorjitter=[.1, .1, .1, .7]"], "hue"),
        (["augmentation.random_erasing=[.5, .4, .02, .3]"], "0 < sl <= sh"),
        (["augmentation.area=[1, .08]"], "lower end"),
        (["augmentation.randaugment=rand-m7-n4-w0"], "randaugment: must be a policy like rand-m7-n4-mstd0.5-inc1"),
        (["augmentation.randaugment=true"], "randaugment: must be a text, not true"),
        (["augmentation.scales=[1, 2]"], "each number must lie between"),
        (["data.template=frame.jpg"], "template: must be auto or a file name with one frame number"),
        (["data.frame_base=2"], "frame_base: must be auto, 0 or 1"),
        (["data.frame_base=[1]"], "frame_base: must be auto, 0 or 1"),
        (["data.sampling=tsm"], "(did you mean tsn?)"),
        (["momentum=.nan"], "momentum: must be"),
        (["val_dense=yes"], "val_dense: must be true or false, not 'yes'"),
        (["seed=007"], "seed: must be an integer, not '007'"),
    ],
)
def test_refusals(tmp_path: Path, overrides: list[str], says: str) -> None:
    lines = problems(write(tmp_path), *overrides)
    assert len(lines) == 1, lines
    assert says in lines[0]


def test_both_of_a_pair_in_one_file(tmp_path: Path) -> None:
    lines = problems(write(tmp_path, SMALL.replace("max_iter: 100", "max_iter: 100\n        max_epoch: 3")))
    assert lines == [
        f"{tmp_path}/config.yaml:8: common.lr_scheduler.max_epoch: give either max_iter or max_epoch, not both"
    ]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "common: missing"),
        ("comon:\n  x: 1\n", 1, "common: missing"),
        ("common: 3\n", 1, "common: missing"),
        ("common:\n  a: [1\n", 3, "not valid YAML"),
        ("common:\n\tbatch_size: 3\n", 2, "not valid YAML"),
        ("common:\n  a: 1\n---\nb: 2\n", 3, "not valid YAML"),
        ("common:\n  a: 1\n  b: \x07\n", 3, "control character"),
        ("common: " + "[" * 5000, 1, "nested too deeply"),
        ("common: &a\n  x: *a\n", 1, "too many or too deeply nested"),
        (
            "common: {a: &a [1, 1, 1], b: &b [*a, *a], "
            + "".join(f"c{i}: &c{i} [{'*b, ' * 200}], " for i in range(99))
            + "}",
            1,
            "too many",
        ),
    ],
)
def test_texts_that_are_no_config(tmp_path: Path, text: str, line: int, says: str) -> None:
    lines = problems(write(tmp_path, text))
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path / 'config.yaml'}:{line}: ")
    assert says in lines[0]


def test_tags_and_foreign_keys(tmp_path: Path) -> None:
    tagged = SMALL.replace("batch_size: 8", "batch_size: !!python/object/apply:os.getcwd []")
    assert problems(write(tmp_path, tagged)) == [
        f"{tmp_path}/config.yaml:3: common.batch_size: the tag tag:yaml.org,2002:python/object/apply:os.getcwd is not "
        "allowed; write a plain value"
    ]
    assert "extra: unknown key" in problems(write(tmp_path, SMALL + "extra: 1\n"))[0]


def test_a_missing_folder_and_a_file_that_is_not_text(tmp_path: Path) -> None:
    assert "there is no such experiment folder" in problems(tmp_path / "none")[0]
    assert "holds no config.yaml" in problems(tmp_path)[0]
    (tmp_path / "config.yaml").write_bytes(b"common:\n  a: \xff\n")
    assert problems(tmp_path) == [f"{tmp_path}/config.yaml:2: not UTF-8 text"]


def test_scalars_follow_yaml_1_2() -> None:
    text = "[1e-4, 1E3, .5, -3, +2, True, false, yes, on, ~, null, 010, 0x10, 1_000, 2001-01-01, '5', 12:30, .inf]"
    expected = (1e-4, 1e3, 0.5, -3, 2, True, False, "yes", "on", None, None, "010", "0x10", "1_000")
    assert yaml_lines.parse(text).value == (*expected, "2001-01-01", "5", "12:30", float("inf"))


# ---------------------------------------------------------------- files


def test_missing_files_are_named_with_their_line(tmp_path: Path) -> None:
    cfg = config.load(write(tmp_path), [f"val_root={tmp_path}/no"])
    with pytest.raises(UserError) as caught:
        config.check_files(cfg)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/config.yaml:10: common.train_source: there is no list file /nowhere/train.txt",
        f"{tmp_path}/config.yaml:12: common.val_source: there is no list file /nowhere/val.txt",
        f"--set: common.val_root: there is no folder {tmp_path}/no",
    ]


def test_relative_paths_lead_into_the_repository_then_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.txt").write_text("a 1 0\n")
    (tmp_path / "lists/classInd.txt").write_text("a\n")
    cfg = config.load(write(tmp_path), ["train_source=lists/train.txt", "train_root=docs", "val_source=none/val.txt"])
    assert cfg.train_source == str(tmp_path / "lists/train.txt")
    assert cfg.train_root == str(ROOT / "docs")
    assert cfg.val_source == str(ROOT / "none/val.txt")
    assert config.class_names_file(cfg) == tmp_path / "lists/classInd.txt"
    assert config.class_names_file(config.load(tmp_path)) is None


# ---------------------------------------------------------------- lengths, dict form, differences


def test_epochs_become_iterations(tmp_path: Path) -> None:
    sets = ["type=STEP", "max_epoch=10", "warmup_epochs=.5", "warmup_lr=.1", "lr_epochs=[4, 8]", "lr_mults=[.1, .1]"]
    cfg = config.load(write(tmp_path), [f"lr_scheduler.{item}" for item in sets] + ["val_freq_epochs=2"])
    done = config.resolve_lengths(cfg, videos=1001, global_batch=64)  # 15.640625 iterations an epoch
    rate = done.lr_scheduler
    assert (rate.max_iter, rate.warmup_steps, rate.lr_steps, done.val_freq) == (157, 8, (63, 125), 31)
    assert cfg.lr_scheduler.max_iter is None
    assert done.origin("batch_size") == cfg.origin("batch_size")
    with pytest.raises(UserError, match="with 4 videos and a global batch of 64 the steps come to"):
        config.resolve_lengths(
            cfg.model_copy(update={"lr_scheduler": rate.model_copy(update={"max_epoch": 0.1})}), 4, 64
        )


def test_lengths_in_iterations_stay(tmp_path: Path) -> None:
    cfg = config.load(write(tmp_path))
    assert config.to_dict(config.resolve_lengths(cfg, 1000, 32)) == config.to_dict(cfg)


def test_differences_tell_what_may_change(tmp_path: Path) -> None:
    old = config.to_dict(config.load(write(tmp_path)))
    assert json.loads(json.dumps(old)) == old
    assert config.differences(old, old) == []
    sets = ["print_freq=1", "batch_size=4", "augmentation.colorjitter=[.1, .1, .1, .1]", "model.kwargs.partial_bn=true"]
    new = config.to_dict(config.load(tmp_path, sets))
    assert config.differences(old, new) == [
        ("augmentation.colorjitter", None, [0.1, 0.1, 0.1, 0.1], False),
        ("batch_size", 8, 4, False),
        ("print_freq", 10, 1, True),
        ("model.kwargs.partial_bn", None, True, False),
    ]
    older = {name: value for name, value in old.items() if name != "watchdog_minutes"}
    assert config.differences(older, old) == []


# ---------------------------------------------------------------- the schema and the verb


def test_every_key_has_a_meaning_and_says_whether_it_may_change() -> None:
    for key, info in schema.leaves():
        assert info.description, key
        assert isinstance(info.json_schema_extra, dict), key
        assert isinstance(info.json_schema_extra["free"], bool), key


def test_generated_files_are_current() -> None:
    for file, text in ((verb.DOCS, verb.markdown()), (verb.SCHEMA, verb.json_schema())):
        assert (ROOT / file).read_text(encoding="utf-8") == text, f"run python main.py config --docs --schema ({file})"


def test_printed_config_gives_the_same_config_again(tmp_path: Path) -> None:
    for exp in EXPERIMENTS:
        cfg = config.load(exp)
        again = config.load(write(tmp_path, verb.as_yaml(cfg)))
        assert config.to_dict(again) == config.to_dict(cfg)


def test_verb_prints_where_values_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.main([str(ROOT / "exps" / SEED), "--set", "seed=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.strip().startswith(("seed:", "t:", "crop:"))] == [
        ["t:", "6", "#", "config.yaml:14"],
        ["crop:", '"multi_scale"', "#", "default"],
        ["seed:", "3", "#", "--set"],
    ]
    with pytest.raises(UserError, match="name an experiment folder"):
        verb.main([])


def test_a_new_method_file_needs_no_other_edit(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "networks").mkdir()
    (tmp_path / "methods/_shared.py").write_text("def build(*, x): ...\n")
    (tmp_path / "methods/mine.py").write_text(
        "import nowhere\ndef build(*, backbone, num_class, num_segments, dropout, pretrained, width: int, "
        "mode: Literal['a', 'b'] = 'a', sizes: tuple[int, ...] = (1,), rate: float | None = None, **more): ...\n"
    )
    (tmp_path / "networks/small.py").write_text(
        "def small(*, num_class=None, depth: int = 3): ...\ndef helper(x): ...\ndef _hidden(*, num_class): ...\n"
    )
    assert list(model_options.methods(tmp_path)) == ["mine"]
    assert list(model_options.backbones(tmp_path)) == ["small"]
    options = model_options.options("mine", "small", tmp_path)
    assert sorted(options) == ["depth", "mode", "rate", "sizes", "width"]
    assert options["width"].default is None
    fits = {"mode": "a", "sizes": (1, 2), "rate": None, "depth": 3}
    wrong = {"mode": "c", "sizes": (1, "2"), "rate": "x", "depth": True}
    assert [model_options.mismatch(value, options[name].annotation) for name, value in fits.items()] == [None] * 4
    assert [model_options.mismatch(value, options[name].annotation) for name, value in wrong.items()] == [
        "must be one of 'a', 'b', not 'c'",
        "must be a value of type tuple[int, ...], not [1, '2']",
        "must be a number or null, not 'x'",
        "must be an integer, not true",
    ]


def test_a_config_of_an_earlier_version_gets_the_defaults_of_later_keys(repo_root: Path) -> None:
    full = config.to_dict(config.load(repo_root / "exps/demo_exps/tsm_resnet18/motion8"))
    old: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in full.items()}
    del old["data"]["missing_share"], old["distill"], old["clip_grad"]
    assert config.with_defaults(old) == full
    assert "distill" not in old, "the argument is left alone"
    assert "missing_share" not in old["data"]


@pytest.mark.parametrize("rest", ["", " null", " ~", " {}"])
def test_a_section_whose_last_key_was_removed_is_empty(tmp_path: Path, rest: str) -> None:
    text = SMALL.replace("    batch_size: 8\n", f"    batch_size: 8\n    data:{rest}\n")
    text = text.replace("num_class: 4}", f"num_class: 4, kwargs:{rest}}}")
    whole, cfg = (config.load(write(tmp_path, each)) for each in (SMALL, text))
    assert cfg.model.kwargs == whole.model.kwargs
    assert cfg.data == whole.data
