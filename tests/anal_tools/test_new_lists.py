"""`new --lists --root`: a new experiment over other videos, in one command."""

from __future__ import annotations

from pathlib import Path

import pytest

from anal_tools import new
from tests.experiment import make
from utils import config
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "exps/demo_exps/tsm_resnet18/motion8"


def lists(folder: Path, root: Path, prefix: str = "") -> Path:
    """Three classes of empty video files, and their lists."""
    folder.mkdir()
    for number in range(3):
        (root / f"class {number}").mkdir(parents=True)
        for name in ("a", "b"):
            (root / f"class {number}/{name}.mp4").touch()
    for name, video in (("train", "a"), ("val", "b")):
        text = "".join(f"class {number}/{video}.mp4\t{number}\n" for number in range(3))
        (folder / f"{prefix}{name}.txt").write_text(text)
    (folder / "classInd.txt").write_text("0 x\n1 y\n2 z\n")
    return folder


def test_the_comments_of_the_source_stay_and_the_values_are_those_of_the_lists(tmp_path: Path, capsys) -> None:
    folder = lists(tmp_path / "it's lists", tmp_path / "root")
    words = ["--from", str(DEMO), "--lists", str(folder), "--root", str(tmp_path / "root")]
    assert new.main([str(tmp_path / "exp"), *words]) == 0
    cfg = config.load(tmp_path / "exp")
    assert (cfg.model.num_class, cfg.data.reader, cfg.data.folds) == (3, "video", None)
    assert (cfg.train_root, cfg.val_source) == (str(tmp_path / "root"), str(folder / "val.txt"))
    assert cfg.data.class_names == str(folder / "classInd.txt")
    config.check_files(cfg)
    text, before = ((exp / "config.yaml").read_text() for exp in (tmp_path / "exp", DEMO))
    changed = [line for line in text.splitlines() if line not in before]
    assert len(changed) == 7, "one line about its source, and six values"
    assert "    num_class: 3         # left, right" in text
    assert "note:" not in capsys.readouterr().out


def test_folds_and_a_config_in_flow_style(tmp_path: Path) -> None:
    folder = lists(tmp_path / "lists", tmp_path / "root", "fold01_")
    source = make(tmp_path / "source", tmp_path / "none")
    (source / "config.yaml").write_text(
        (source / "config.yaml").read_text().replace("sampling: tsn}", "sampling: tsn, metadata: /f}")
    )
    assert (
        new.main(
            [str(tmp_path / "exp"), "--from", str(source), "--lists", str(folder), "--root", str(tmp_path / "root")]
        )
        == 0
    )
    cfg = config.load(tmp_path / "exp")
    assert (cfg.data.folds, cfg.data.metadata, cfg.model.num_class, cfg.model.num_segments) == ("lists", None, 3, 2)
    assert cfg.train_source == str(folder / "fold01_train.txt")


def test_what_is_refused(tmp_path: Path) -> None:
    folder = lists(tmp_path / "lists", tmp_path / "root")
    with pytest.raises(UserError, match="--lists and --root together"):
        new.main([str(tmp_path / "exp"), "--from", str(DEMO), "--lists", str(folder)])
    with pytest.raises(UserError, match=r"holds none of the videos .* for example .*class 0/a.mp4"):
        new.main([str(tmp_path / "exp"), "--from", str(DEMO), "--lists", str(folder), "--root", str(tmp_path)])
    with pytest.raises(UserError, match=r"holds no train.txt"):
        new.main([str(tmp_path / "exp"), "--from", str(DEMO), "--lists", str(tmp_path), "--root", str(tmp_path)])
    assert not (tmp_path / "exp").exists()
