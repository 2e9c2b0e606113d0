"""Old names are read, and reported once a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiment import make
from utils import config, renamed
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
    keys = {key for key, _ in config.schema.leaves()}
    assert {*renamed.CONFIG_KEYS.values(), *renamed.CONFIG_VALUES} <= keys
    assert not keys & set(renamed.CONFIG_KEYS)
