"""Each command on a page of the site parses, and a test runs it, or the table says why none does.

The table is tests/data/docs_commands.json. It has each command in its normal form: what runs, and the names of the
options in alphabetical order. A form has the tests that run it, between them with all its options.
"""

from __future__ import annotations

import functools
import json
import re

import pytest

from tests import docs_commands
from tests.conftest import ROOT
from tests.docs_commands import Command
from utils import config
from utils.errors import UserError

# `--set common.val_dense=true`; keys of `eval.` are options of the verb, which a sweep checks
SET_KEY = r"--(?:set|grid) (?!common\.key)((?:common|data|model)\.[a-z_.]+)="
TABLE = ROOT / "tests/data/docs_commands.json"
# Why no test runs a command; those of the last three need not parse.
FOREIGN = {"belongs to another program", "stands for several commands", "was removed"}
REASONS = FOREIGN | {
    "draws a picture of a page", "needs a GPU", "needs several nodes", "needs the network", "runs for minutes to hours",
    "runs the tests",
}  # fmt: skip


@functools.cache
def run_by() -> dict[str, list[str]]:
    """The normal forms that tests run."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["run by a test"]


@functools.cache
def not_run() -> dict[str, str]:
    """The normal forms that no test runs, and why."""
    groups = json.loads(TABLE.read_text(encoding="utf-8"))["not run"]
    return {form: reason for reason, forms in groups.items() for form in forms}


def complaint(command: Command) -> str | None:
    """Return what has to be done about a command of a page, None if nothing."""
    form, reason = command.form, not_run().get(command.form)
    if reason not in FOREIGN and (problem := docs_commands.mistake(command)):
        return f"{command.place}: `{command.text}`: {problem}"
    if form not in run_by() and not reason:
        return (
            f"{command.place}: `{command.text}`: no test is known that runs it. Add to {TABLE.name} either "
            f'{json.dumps(form)}: ["tests/FILE.py::TEST"] with a test that runs it with these options, or the form '
            f"below one of the reasons: {', '.join(sorted(REASONS))}"
        )
    return None


@pytest.mark.parametrize("page", docs_commands.pages())
def test_commands_parse_and_are_run(page: str) -> None:
    complaints = [complaint(command) for command in docs_commands.commands_of(page)]
    assert [text for text in complaints if text] == []


@pytest.mark.parametrize("page", docs_commands.pages())
def test_blocks_of_commands_are_marked(page: str) -> None:
    assert docs_commands.unmarked(page) == [], "write ```sh above them"


@pytest.mark.parametrize("page", docs_commands.pages())
def test_keys_that_commands_set_are_known(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [key for key in re.findall(SET_KEY, text) if is_unknown(key)] == []


def is_unknown(key: str) -> bool:
    """Return True if configs have no such key."""
    try:
        config.load(ROOT / "exps/demo_exps/tsm_resnet18/motion8", [f"{key}=1"])
    except UserError as error:
        return f"{key}: unknown key" in str(error)
    return False


def forms() -> dict[str, Command]:
    """The normal forms of all pages."""
    return {command.form: command for page in docs_commands.pages() for command in docs_commands.commands_of(page)}


def test_the_tests_of_the_table_are_there_and_have_the_words() -> None:
    wrong = []
    for form, command in forms().items():
        try:
            lacking = docs_commands.lacking(command, run_by()[form]) if form in run_by() else set()
        except LookupError as error:
            wrong.append(f"{form}: there is no test {error.args[0]}")
            continue
        if lacking:
            wrong.append(f"{form}: {', '.join(run_by()[form])} do not have {', '.join(sorted(lacking))}")
    assert wrong == []


def test_the_table_has_no_other_forms_and_no_other_reasons() -> None:
    assert not run_by().keys() & not_run().keys()
    assert sorted(run_by().keys() | not_run().keys()) == sorted(forms())
    assert set(not_run().values()) == REASONS


# ------------------------------------------------------------------------------------------------- what the rules find
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("python main.py evl EXP", "main.py has no verb evl"),
        ("python main.py eval EXP --chekpoint best", "unrecognized arguments: --chekpoint"),
        ("python main.py eval EXP --protocol k400", "invalid choice: 'k400'"),
        ("python main.py eval", "the following arguments are required: exp"),
        ("python main.py benchmark stpe EXP", "no benchmark called 'stpe'"),
        ("python main.py report EXP --clips many", "invalid int value: 'many'"),
        ("python main.py report exps/demo_exps/none", "there is no exps/demo_exps/none"),
        ("python -m launch states EXP", "launch has no verb states"),
        ("python -m launch log EXP --tail", "unrecognized arguments: --tail"),
        ("EXP/train.sh local", "the following arguments are required: N"),
        ("EXP/eval.sh local 4 --fresh", "unrecognized arguments: --fresh"),
        ("make checks", "the Makefile has no target checks"),
        ("make accept ISSUE=04 ROWS=speed", "issue 04 has no row speed"),
        ("make soak HOURS=1", "the Makefile has no variable HOURS"),
        ("python -m tests.benchmarks.training.none", "there is no module tests.benchmarks.training.none"),
        ("python -m tests.benchmarks.training.step --rows stride", "knows no stride"),
        ("python tests/gpu/none.py", "there is no tests/gpu/none.py"),
        ("pip install '.[dalli]'", "there is no extra dalli"),
        ("EXP/eval.sh VI_SP_VA_1080TI N --time 90 --set KEY=VALUE --views 10x3 --dry-run", None),
        ("python main.py score EXP... [--views centre,10x1] [--weights 2,1]", None),
    ],
)
def test_a_wrong_command_is_found(line: str, says: str | None) -> None:
    (command,) = docs_commands.commands_in("docs/page.md", f"# Page\n\n```sh\n{line}   # why\n```\n")
    problem = docs_commands.mistake(command)
    assert problem is None if says is None else says in (problem or "")
    assert command.place == "docs/page.md:4"


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        ("`python main.py eval EXP [--list F --root R] --views 10x3`", ["main.py eval --list --root --views"]),
        ("`main.py eval EXP [--views V \\| --protocol P]`", ["main.py eval --views", "main.py eval --protocol"]),
        ("`python -m launch status|log EXP --json`", ["launch status --json", "launch log --json"]),
        ("`train.sh` of `exps/x`, `eval.sh ... --views\n3crop`", ["eval.sh ... --views"]),
        ("`MALLOC=1 exps/.../train.sh local 2 | head`", ["train.sh local"]),
        ("```sh\nA=1 srun \\\n  python $REPO/main.py train EXP --set a=b  # why\n```", ["srun main.py train --set"]),
        ("```\n1. python main.py scan LIST    what is there\nother text\n```", ["main.py scan"]),
        ("```python\nmake = 1\n```\n\n`lists LIST --drop FILE`, the `eval --root` of `predict`", [
            "main.py lists --drop", "main.py eval --root",
        ]),
    ],
)  # fmt: skip
def test_what_is_a_command_and_its_normal_form(text: str, forms: list[str]) -> None:
    assert [command.form for command in docs_commands.commands_in("docs/page.md", text)] == forms


def test_a_key_that_is_not_there_is_found() -> None:
    assert re.findall(SET_KEY, "EXP/eval.sh local 4 --set common.val_dens=true") == ["common.val_dens"]
    assert is_unknown("common.val_dens")
    assert not is_unknown("common.val_dense")
    assert not is_unknown("common.batch_size"), "the value is another matter"


def test_a_command_without_a_test_is_named_with_what_to_add() -> None:
    (command,) = docs_commands.commands_in("docs/page.md", "\n`python main.py eval EXP --keep float16`\n")
    assert (complaint(command) or "").startswith(
        "docs/page.md:2: `python main.py eval EXP --keep float16`: no test is known that runs it. Add to "
        'docs_commands.json either "main.py eval --keep": ["tests/FILE.py::TEST"]'
    )


def test_the_words_of_a_test_are_those_of_its_helpers_too() -> None:
    name = test_a_command_without_a_test_is_named_with_what_to_add.__name__
    words = docs_commands.words_of(f"tests/test_docs_commands.py::{name}")
    assert {"--keep", "belongs", "docs_commands.json"} <= words
    with pytest.raises(LookupError):
        docs_commands.words_of("tests/test_docs_commands.py::test_of_nothing")
