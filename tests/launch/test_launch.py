"""`python -m launch`, `train.sh`, and `python main.py new`: from the user's words to the command that runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import main
from anal_tools import new
from launch import __main__ as launcher
from launch import local, options
from utils import config
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "exps").glob("*_exps/*/*/*.sh"))
# With folds the lists are read first, and their data is not here
SINGLE_RUNS = [path for path in SCRIPTS if "folds:" not in path.with_name("config.yaml").read_text()]

SMALL = """\
common:
    model: {type: tsn, backbone: resnet18, num_segments: 3, num_class: 4}
    batch_size: 8
    lr_scheduler: {type: COSINE, base_lr: 0.01, max_iter: 100}
    val_freq: 50
    train_root: /
    train_source: train.txt
    val_root: /
    val_source: val.txt
"""


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    """An experiment folder with a hostile name, whose lists exist."""
    folder = tmp_path / 'it\'s $HOME; an "experiment" é'
    folder.mkdir()
    (folder / "config.yaml").write_text(SMALL)
    for name in ("train.txt", "val.txt"):
        (folder / name).write_text("a 1 0\n")
    return folder


def run(argv: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command on a machine that has no SLURM, or one that does not answer."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["SLURM_CONF"] = "/dev/null"
    return subprocess.run(argv, cwd=cwd, env=environment | env, capture_output=True, text=True, timeout=60)


def test_options_are_those_of_the_verbs(exp: Path, capsys: pytest.CaptureFixture) -> None:
    for verb in ("train", "eval"):
        known = {
            name: action.nargs != 0
            for action in options.parser_of(verb)._actions
            for name in action.option_strings
            if name.startswith("--")
        }
        with pytest.raises(SystemExit) as left:
            main.main([verb, "--help"])
        assert left.value.code == 0
        help_text = capsys.readouterr().out
        usage = help_text[: help_text.index("\n\n")].replace("\n", " ")
        has_value = {name: bool(value.strip()) for name, value in re.findall(r"\[(--[a-z-]+)([^\]]*)\]", usage)}
        assert has_value | {"--help": False} == known, verb
    for words in (
        ["train", "--bogus"],
        ["train", "--chekpoint", "best"],
        ["eval", "--checkpoint"],
        ["eval", "x"],
        ["eval", "--protocol", "none"],
    ):
        argv = [words[0], str(exp), "nowhere", "64", *words[1:], "--dry-run"]
        assert launcher.main(argv[:-1] if words[-1] == "--checkpoint" else argv) == 2
        assert words[1] in capsys.readouterr().err
    assert launcher.main(["trian", str(exp), "local", "0"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_words_that_reach_main(exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(local, "run", lambda words, ranks: seen.append((words, ranks)) or 75)
    monkeypatch.chdir(exp.parent)
    code = launcher.main(["train", exp.name, "local", "2", "--set", "seed=3", "--fresh", "--set", "common.workers=1"])
    assert code == 75
    assert seen == [(["train", str(exp), "--set", "seed=3", "--set", "common.workers=1", "--fresh"], 2)]
    assert launcher.main(["eval", exp.name, "local", "0", "--", "--checkpoint", "best"]) == 75
    assert seen[1] == (["eval", str(exp), "--checkpoint", "best"], 0)
    (exp / "train.txt").unlink()  # an evaluation does not need it, and on another list not the config's either
    assert launcher.main(["eval", exp.name, "local", "0"]) == 75
    (exp / "val.txt").unlink()
    assert launcher.main(["eval", exp.name, "local", "0", "--list", "x.txt", "--root", "/"]) == 75
    assert launcher.main(["eval", exp.name, "local", "0"]) == 2


@pytest.mark.system
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "nowhere", "local", "2"], "there is no such experiment folder"),
        (["train", "{exp}", "VI_SP_VA_1080TI", "32"], "no partition called VI_SP_VA_1080TI"),
        (["train", "{exp}", "locl", "2"], "did you mean local?"),
        (["train", "{exp}", "local", "-1"], "N must be 0 or more"),
        (["train", "{exp}", "local", "2", "--set", "batchsize=2"], "did you mean batch_size?"),
        (["train", "{exp}", "local", "2", "--set", "val_source=/none.txt"], "there is no list file /none.txt"),
    ],
)
def test_refusals_start_nothing(
    exp: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/dev/null")
    monkeypatch.setattr(local, "run", lambda *_: pytest.fail("started"))
    assert launcher.main([word.replace("{exp}", str(exp)) for word in words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert says in errors


def test_the_launcher_is_fast_and_imports_no_torch(exp: Path) -> None:
    program = (
        "import sys; from launch.__main__ import main\n"
        "assert main(['train', sys.argv[1], 'slurm', '2']) == 2\n"
        "assert not {'torch', 'numpy', 'av', 'cv2'} & set(sys.modules), 'heavy'"
    )
    done = run([sys.executable, "-c", program, str(exp)], ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "exps")))
def test_shipped_scripts_are_what_new_writes(script: Path) -> None:
    assert script.read_text() == new.script(script.stem, script.parent)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", {(len(path.parts), path.stem): path for path in SINGLE_RUNS}.values(), ids=str)
def test_scripts_run_from_anywhere(script: Path) -> None:
    """One for each verb and depth of folder: those of a depth hold the same two lines."""
    done = run([str(script), "nowhere", "1"], Path("/"))
    assert done.returncode == 2
    assert "no partition called nowhere" in done.stderr
    done = run([str(script), "nowhere", "1", "--dry-run"], Path("/"))
    assert str(script.parent) in done.stdout + done.stderr


def test_the_command_that_seed_004_types() -> None:
    typed = (
        "./exps/exps/douyin_exps/tsn_v5_mobilenet/"
        "colorjitter_random_erasing_labelsmooth_0.1_nowd_coslr_bn16_gpu32_lr0.04_epoch100/train.sh"
    )
    done = run([typed, "VI_SP_VA_1080TI", "32"], ROOT)
    assert done.returncode == 2
    assert "no partition called VI_SP_VA_1080TI" in done.stderr
    done = run([typed, "VI_SP_VA_1080TI", "32", "--dry-run"], ROOT)
    assert "there is no list file" in done.stderr


def test_new_folder_anywhere_works_from_anywhere(exp: Path, tmp_path: Path) -> None:
    new_exp = new.make(tmp_path / "a folder's $(name)" / "run 1", exp)
    assert sorted(path.name for path in new_exp.iterdir()) == ["config.yaml", "eval.sh", "train.sh"]
    text = (new_exp / "config.yaml").read_text()
    assert text == f"# Made from {exp / 'config.yaml'}\n{SMALL}"
    (tmp_path / "utils").mkdir()  # a package of that name where the user stands must not be taken for ours
    (tmp_path / "utils/__init__.py").write_text("raise RuntimeError('the wrong utils')\n")
    for argv in (["./train.sh"], ["sh", "train.sh"], [str(new_exp / "eval.sh")]):
        done = run([*argv, "local", "0"], new_exp if "/" not in argv[0][1:] or argv[0] == "./train.sh" else tmp_path)
        assert done.returncode == 2, done.stderr
        assert "common.val_source: there is no list file" in done.stderr  # beside the old config, not this one
    done = run([str(new_exp / "train.sh")], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: train.sh PARTITION N")


def test_new_says_when_lists_stay_behind(exp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new.make(tmp_path / "new", exp)
    text = f"note: train_source was next to the old config; write its full path, {exp}/train.txt"
    assert text in capsys.readouterr().out


def test_new_refuses(exp: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an empty folder"):
        new.make(exp, exp)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not an empty folder"):
        new.make(tmp_path / "file", exp)
    with pytest.raises(UserError, match="cannot be written"):
        new.make(tmp_path / "file" / "below", exp)
    with pytest.raises(UserError, match="there is no such experiment folder"):
        new.make(tmp_path / "x", tmp_path / "none")
    assert not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    assert new.main([str(tmp_path / "empty"), "--from", str(exp)]) == 0
    assert config.load(tmp_path / "empty").batch_size == 8


def test_inside_the_repository_scripts_are_relative() -> None:
    folder = ROOT / "exps/demo_exps/tsm_resnet18/other"
    lines = new.script("train", folder).splitlines()
    assert len(lines) == 2
    assert str(ROOT) not in lines[1]
    assert not folder.exists()


def test_exp_sh_takes_the_virtual_environment_if_there_is_one(tmp_path: Path) -> None:
    root = tmp_path / "a clone"
    (root / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch/exp.sh", root / "launch/exp.sh")
    for place, name in ((root / ".venv/bin", "python"), (tmp_path / "bin", "python3")):
        place.mkdir(parents=True)
        (place / name).write_text(f'#!/bin/sh\nflag=$1; shift 2; echo {name} "$PYTHONPATH" "$flag" "$@"\n')
        (place / name).chmod(0o755)
    argv = [str(root / "launch/exp.sh"), "train", "/e", "local", "2"]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert run(argv, Path("/"), PATH=path).stdout == f"python {root} -c train /e local 2\n"
    shutil.rmtree(root / ".venv")
    assert run(argv, Path("/"), PATH=path, PYTHONPATH="/x").stdout == f"python3 {root}:/x -c train /e local 2\n"


def test_verbs_for_jobs_work_in_any_folder_as_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    assert "any other folder, put `PYTHONPATH=REPOSITORY` before" in " ".join(page.split())
    exp = ROOT / "exps/demo_exps/tsm_resnet18/motion8"
    done = run([sys.executable, "-m", "launch", "status", str(exp)], tmp_path, PYTHONPATH=str(ROOT))
    assert "No module named" not in done.stderr
    assert done.returncode == 2  # no job of this experiment
    assert done.stderr.startswith(f"error: {exp}")


def test_a_mistyped_source_is_proposed(tmp_path: Path) -> None:
    for word in ("demo_exps/tsm_resnet18/motoin8", "exps/demo_exps/tsm_resnet18/motoin8"):
        with pytest.raises(UserError, match=r"did you mean exps/demo_exps/tsm_resnet18/motion8\?"):
            new.make(tmp_path / "x", Path(word))
    assert not (tmp_path / "x").exists()
