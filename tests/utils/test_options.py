"""A mistyped command is one sentence: what is wrong, what was perhaps meant, where the options are."""

from __future__ import annotations

import pytest

import main
from launch import __main__ as launcher


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval EXP --protocol k400", "invalid choice: 'k400' (choose from"),
        ("eval EXP --protocol k400", " (did you mean k400-10x3?); `python main.py eval --help` shows the options"),
        ("eval EXP --vews 3x1", "unrecognized arguments: --vews 3x1 (did you mean --views?); `python main.py eval"),
        ("lists ucf11 --root R --out O", "(did you mean ucf101?)"),
        ("new PATH", "the following arguments are required: --from"),
        ("predict", "the following arguments are required: EXP|CKPT, SOURCE"),
        ("start F --fold 2x", "'2x'"),
        ("export EXP --to omnx", "(did you mean onnx?)"),
        ("train", "the following arguments are required: exp"),
        ("fetch resnet5O", "resnet50"),
        ("doctor --jsn", "(did you mean --json?)"),
    ],
)
def test_one_line_and_code_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_launcher_names_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["sweep", "lrs", "--grid", "a=1,2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("required: PARTITION, N; `python -m launch sweep --help` shows the options")


def test_help_is_as_long_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main.main(["eval", "--help"])
    assert left.value.code == 0
    assert "usage: main.py eval" in capsys.readouterr().out
