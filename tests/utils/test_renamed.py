"""Old names are read, and reported once a process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from anal_tools.evaluate.protocols import Protocol
from datasets.dump import verb as dump
from datasets.dump.settings import DumpSettings
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec
from launch import attempts
from launch.grid import Sweep
from tests.experiment import make
from utils import config, renamed
from utils.config import schema
from utils.errors import UserError


@pytest.fixture(autouse=True)
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "_reported", set())


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    """An experiment whose config has an old key."""
    folder = make(tmp_path / "exp", tmp_path)
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("data: {", "data: {facts: /old.bin, ", 1))
    assert "facts" in file.read_text()
    return folder


def test_an_old_key_of_a_config_is_read(exp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        cfg = config.load(exp)
        assert cfg.data.metadata == "/old.bin"
        assert cfg.origin("data.metadata").startswith(f"{exp}/config.yaml:")
    assert capsys.readouterr().err == "config: data.facts is called data.metadata now\n"


@pytest.mark.parametrize("key", ["data.facts", "common.data.facts", "data.metadata"])
def test_an_override_has_either_name(key: str, exp: Path) -> None:
    assert config.load(exp, [f"{key}=/new.bin"]).data.metadata == "/new.bin"


def test_both_names_at_once_are_refused(exp: Path) -> None:
    file = exp / "config.yaml"
    file.write_text(file.read_text().replace("facts: /old.bin", "facts: /old.bin, metadata: /new.bin"))
    with pytest.raises(UserError, match=r"data\.facts: the old name of data\.metadata, which is given too"):
        config.load(exp)


def test_every_new_name_exists() -> None:
    keys = {key for key, _ in schema.leaves()}
    assert {*renamed.CONFIG_KEYS.values(), *renamed.CONFIG_VALUES} <= keys
    assert not keys & set(renamed.CONFIG_KEYS)


@pytest.mark.parametrize(("old", "new"), renamed.CONFIG_VALUES["data.sampling"].items())
def test_old_sampling_presets_are_read(old: str, new: str, exp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert config.load(exp, [f"data.sampling={old}"]).data.sampling == new
    assert f"data.sampling: {old} is called {new} now\n" in capsys.readouterr().err


def test_the_protocol_of_an_old_result_is_read() -> None:
    new = Protocol(EvalSpec(Sampling("pyslowfast", 1, 8, 8), 10, "three_pyslowfast", 256, 256, "pyslowfast"))
    new = dataclasses.replace(new, family="pyslowfast")
    old = new.to_dict() | {"crops": "three_psf", "family": "psf", "rounding": "psf"}
    old["sampling"] = {**dataclasses.asdict(new.spec.sampling), "preset": "pysf"}
    assert Protocol.from_dict(old) == new


def test_a_checkpoint_has_the_new_names() -> None:
    old = {
        "best_prec1": 1.5,
        "window": {"prec1": [2.0], "acc1_train/head03": [3.0]},
        "config": {"data": {"facts": None}},
    }
    assert renamed.checkpoint(old) == {
        "best_metric": 1.5,
        "window": {"top1": [2.0], "top1_train/head03": [3.0]},
        "config": {"data": {"metadata": None}},
    }


def test_an_old_form_of_a_dump_keeps_its_digest(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["list.txt", "out", "--as", "shards"]
    assert dump.parse(argv).form == "packs"
    assert capsys.readouterr().err == "dump --as: shards is called packs now\n"
    assert json.loads(DumpSettings("packs").to_json())["form"] == "shards", (
        "a folder of an earlier version is continued"
    )


def test_a_sweep_of_an_earlier_version_keeps_its_folders(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "train", (tmp_path / "a/b/exp",), ("seed=1",))
    (trial,) = sweep.trials()
    assert sweep.exp_of(trial) == tmp_path / "trials" / trial.name
    (tmp_path / "cells").mkdir()
    assert sweep.exp_of(trial) == tmp_path / "cells" / trial.name
    (tmp_path / attempts.FILE).write_text('{"cell": "x", "event": "end", "code": 0}\n')
    assert attempts.read(tmp_path) == [{"trial": "x", "event": "end", "code": 0}]
