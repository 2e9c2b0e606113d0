"""Configs of MMAction2 are parsed, never run: what is understood, and what a hostile file can do (nothing)."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from anal_tools.import_config import python_file
from utils.errors import UserError


def read(folder: Path, text: str, **others: str) -> dict:
    """Read a file of this text, beside files of other names."""
    for name, content in others.items():
        (folder / f"{name}.py").write_text(content)
    (folder / "config.py").write_text(text)
    return python_file.read(folder / "config.py")


def refusal(folder: Path, text: str, **others: str) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(UserError) as caught:
        read(folder, text, **others)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{folder}/", "")


def test_literals_names_and_arithmetic(tmp_path: Path) -> None:
    names = read(
        tmp_path,
        '''"""A docstring."""
base: float = 0.1
url = ('https://example.org/'
       'weights.pth')
common = dict(io='disk', mean=[1.5, -2], none=None)
steps = [dict(type='A', **common), dict(type='B', size=(-1, 256))]
both = steps + [dict(common, io='ram')]
lr = base * 8 / 2 + 2 ** 3 - 7 // 2 % 2
path = f'data/{common["io"]}/list_{8}.txt'
pairs = {86: 87, 87: 86}
zeros = [0] * 3
off = not True
gpus = range(0, 2)
''',
    )
    assert names["url"] == "https://example.org/weights.pth"
    assert names["steps"][0] == {"type": "A", "io": "disk", "mean": [1.5, -2], "none": None}
    assert names["both"][2] == {"io": "ram", "mean": [1.5, -2], "none": None}
    assert names["lr"] == pytest.approx(0.1 * 4 + 8 - 1)
    assert names["path"] == "data/disk/list_8.txt"
    assert names["gpus"] == [0, 1]
    assert (names["pairs"], names["zeros"], names["off"]) == ({86: 87, 87: 86}, [0, 0, 0], False)


def test_bases_are_merged_as_mmaction2_merges_them(tmp_path: Path) -> None:
    names = read(
        tmp_path,
        """_base_ = ['./model.py', 'schedule.py']
model = dict(head=dict(classes=174), backbone=dict(type='Other', _delete_=True))
epochs = 50
twice = _base_.epochs * 2
again = {{_base_.model.head.std}}
""",
        model="model = dict(type='R', head=dict(classes=400, std=.01), backbone=dict(type='ResNet', depth=50))",
        schedule="epochs = 100",
    )
    assert names["model"] == {"type": "R", "head": {"classes": 174, "std": 0.01}, "backbone": {"type": "Other"}}
    assert (names["epochs"], names["twice"], names["again"]) == (50, 200, 0.01)


def test_a_copy_is_changed_alone(tmp_path: Path) -> None:
    names = read(tmp_path, "val = dict(a=1, steps=[1])\ntest = val.copy()\ntest['a'] = 2\nboth = [val, test]\n")
    assert names["both"] == [{"a": 1, "steps": [1]}, {"a": 2, "steps": [1]}]


def test_a_change_that_python_would_share_is_refused(tmp_path: Path) -> None:
    assert "config.py:3:" in refusal(tmp_path, "a = dict(x=1)\nb = [a]\na['x'] = 2\n")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("import os\nos.system('touch CANARY')\n", 1, "an import of os"),
        ("from os import system\n", 1, "an import of os"),
        ("a = 1\nb = __import__('os').system('touch CANARY')\n", 2, "a call of ....system"),
        ("a = open('CANARY', 'w')\n", 1, "a call of open"),
        ("def f():\n    pass\n", 1, "a function"),
        ("class A:\n    pass\n", 1, "a class"),
        ("for i in range(9):\n    pass\n", 1, "a loop"),
        ("while True:\n    pass\n", 1, "a loop"),
        ("a = [i for i in (1, 2)]\n", 1, "a comprehension"),
        ("a = lambda: 0\n", 1, "a function"),
        ("a = 1\na += 1\n", 2, "code"),
        ("a = ().__class__\n", 1, "an attribute"),
        ("a = {1, 2}\n", 1, "a set"),
        ("a = 1 if True else 2\n", 1, "a condition"),
        ("a = 1 << 40\n", 1, "code"),
        ("a = '%s' % 3\n", 1, "code"),
        ("a = [1] - [2]\n", 1, "code"),
        ("a = -'x'\n", 1, "code"),
        ("a = b'x'\n", 1, "code"),
        ("a = 3j\n", 1, "code"),
        ("with open('x') as f:\n    pass\n", 1, "a with block"),
        ("x.y = 1\n", 1, "code"),
    ],
)
def test_code_is_named_with_its_line_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(tmp_path, text)
    assert message.startswith(f"config.py:{line}: ")
    assert words in message
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a = [0] * 1000000000",
        "a = 1000000000 * [[0] * 10]",
        "a = 'x' * 1000000000",
        "a = range(1000000000)",
        "a = range(10 ** 17)",
        "a = ('x' * 90000) * 1000",
        "a = 10 ** 6 ** 6",
        "a = 9999999 ** 99999999",
        f"a = {'9' * 500}",
        f"a = 0x{'f' * 100_000}",
        "a = [0] * 300\nb = [a] * 300\nc = [b] * 300\nd = [c] * 300",
        "a = 'x' * 90000\n" + "\n".join(f"a{i + 1} = a{i or ''} + a{i or ''}" for i in range(40)),
        "a = [1]\n" + "\n".join("a = [a, a]" for _ in range(60)),
        "a = f'{1:1000000000}'",
        "a = 1 / 0",
        "a = " + "[" * 150 + "]" * 150,
        "a = " + "[" * 100_000,
        "a = " + "-" * 100_000 + "1",
        "a = " + "(" * 5000 + "1" + ")" * 5000,
        "a = " + "+".join(["1"] * 20_000),
        "a = x" + ".y" * 50_000,
        "a = [1]\n" + "\n".join("a = [a]" for _ in range(3000)),
        "a = " + ", ".join(["0"] * 150_000),
        "a = 1\0",
        "a = = 1",
        "x" * 300_000,
    ],
    ids=range(26),
)
def test_a_hostile_text_is_refused_in_bounded_time_and_memory(tmp_path: Path, text: str) -> None:
    started = time.process_time()
    tracemalloc.start()
    try:
        message = refusal(tmp_path, text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message.startswith("config.py")
    assert len(message) < 400
    assert peak < 300e6
    assert time.process_time() - started < 10


def test_bases_that_lead_back_are_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, "_base_ = 'other.py'\n", other="_base_ = ['config.py']\n")
    assert "leads back to itself (config.py -> other.py -> config.py)" in message


def test_bases_that_fan_out_are_limited(tmp_path: Path) -> None:
    others = {f"b{i}": f"_base_ = ['b{i + 1}.py', 'c{i + 1}.py']\n" for i in range(30)}
    others |= {f"c{i}": f"_base_ = ['b{i + 1}.py', 'c{i + 1}.py']\n" for i in range(30)}
    assert "more than 50 _base_ files" in refusal(tmp_path, "_base_ = 'b0.py'\n", **others, b30="", c30="")


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("'missing.py'", "missing.py is missing"),
        ("'mmaction::_base_/x.py'", "copy the file here"),
        ("'https://example.org/x.py'", "copy the file here"),
        ("'/dev/zero'", "not the path of a .py file"),
        ("5", "must be a path"),
        ("[['x.py']]", "not the path of a .py file"),
    ],
)
def test_a_base_that_is_none_is_named(tmp_path: Path, base: str, words: str) -> None:
    message = refusal(tmp_path, f"a = 1\n_base_ = {base}\n")
    assert message.startswith("config.py:2: ")
    assert words in message


def test_two_bases_with_one_name_are_refused_as_in_mmaction2(tmp_path: Path) -> None:
    message = refusal(tmp_path, "_base_ = ['x.py', 'y.py']\n", x="lr = 1\n", y="lr = 2\n")
    assert "two _base_ files define lr" in message


def test_a_dict_over_something_else_is_refused_as_in_mmaction2(tmp_path: Path) -> None:
    assert "add _delete_=True" in refusal(tmp_path, "_base_ = 'x.py'\na = dict(b=1)\n", x="a = None\n")
    assert read(tmp_path, "_base_ = 'x.py'\na = dict(b=1, _delete_=True)\n", x="a = 3\n")["a"] == {"b": 1}


def test_a_pipe_in_place_of_a_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.py")
    with pytest.raises(UserError, match="named pipe"):
        python_file.read(tmp_path / "config.py")
