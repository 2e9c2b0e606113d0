"""What surrounds the code: the workflow, the hooks before a commit, the lists of packages, spelling, sizes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import git
from tests.conftest import ROOT
from tests.house import dependencies, large_files

WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"
README = (ROOT / "README.md").read_text("utf-8")


def workflow() -> dict[Any, Any]:
    return yaml.safe_load(WORKFLOW.read_text("utf-8"))


def pairs() -> set[tuple[str, str]]:
    """Return the pairs of Python and PyTorch that the workflow tests."""
    return {(row["python"], row["torch"]) for row in workflow()["jobs"]["test"]["strategy"]["matrix"]["include"]}


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z]+):", text, re.MULTILINE))


def test_the_workflow_tests_the_pairs_that_the_readme_names() -> None:
    sentence = re.sub(r"\s+", " ", README).partition("(tested: ")[2].partition("):")[0]
    assert set(re.findall(r"(\d+\.\d+) with (?:PyTorch )?(\d+\.\d+)", sentence)) == pairs()


def test_the_pairs_are_the_oldest_the_usual_and_the_newest_versions() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    (torch,) = (one for one in dependencies.requirements()[dependencies.CORE] if one.name == "torch")
    pythons, torches = (sorted(set(names), key=Version) for names in zip(*pairs(), strict=True))
    assert f'requires-python = ">={pythons[0]}"' in text
    assert [f"3.{minor}" for minor in re.findall(r":: Python :: 3\.(\d+)", text)] == pythons
    low, high = Version(torches[0]), Version(torches[-1])
    assert (min(pairs())[1], torch.specifier) == (
        torches[0],
        Requirement(f"torch>={low},<{high.major}.{high.minor + 1}").specifier,
    )
    usual = re.findall(r"^torch==(\d+\.\d+)", (ROOT / ".ci" / "cpu.txt").read_text("utf-8"), re.MULTILINE)
    assert ("3.11", usual[0]) in pairs()


def test_the_workflow_calls_targets_that_there_are_and_pins_its_actions() -> None:
    jobs = workflow()["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    called = {name for step in steps for name in re.findall(r"\bmake (\w+)", step.get("run", ""))}
    assert called == {"check", "test", "nightly"}
    assert called <= targets()
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", name)] == []
    # `on` is a boolean in YAML 1.1
    assert {"push", "pull_request", "schedule"} <= set(workflow()[True])
    assert workflow()["permissions"] == {"contents": "read"}


def test_hooks_are_programs_of_the_environment_and_pyright_runs_before_a_push() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    assert {hook["language"] for hook in hooks.values()} == {"system"}
    assert {name for name, hook in hooks.items() if hook.get("stages") == ["pre-push"]} == {"pyright"}
    assert {"codespell", "large-files", "house"} <= set(hooks)
    entries = [word for hook in hooks.values() for word in hook["entry"].split() if word.startswith("tests/")]
    assert [name for name in entries if not (ROOT / name).exists()] == []


def test_no_file_makes_clones_large() -> None:
    assert large_files.too_large(git.files()) == []
    assert set(git.files()) >= large_files.ALLOWED


def test_spelling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    codespell = pytest.importorskip("codespell_lib", reason="needs codespell, of the extra dev")
    monkeypatch.chdir(ROOT)  # for the words in pyproject.toml
    assert codespell.main(*git.files()) == 0, capsys.readouterr().out


def test_every_dependency_has_a_licence() -> None:
    rows = dependencies.rows(dependencies.PAGE.read_text("utf-8"))
    required = {canonicalize_name(one.name) for names in dependencies.requirements().values() for one in names}
    assert required - set(rows) == set()
    assert {name for name, (_, licence, uses) in rows.items() if not licence or not uses} == set()
    assert {use for _, _, uses in rows.values() for use in uses.split(", ")} <= set(dependencies.requirements())


def test_packages_of_ci_have_hashes_and_fit() -> None:
    listed = {}
    for line in dependencies.HASHES.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
            assert match, line
            listed[match[1]] = match[2]
    for extra in (dependencies.CORE, "export", "dali", "dev"):
        for one in dependencies.requirements()[extra]:
            name = canonicalize_name(one.name)
            assert name in dependencies.UNHASHED or one.specifier.contains(listed[name], prereleases=True), name
    cpu = (ROOT / ".ci" / "cpu.txt").read_text("utf-8")
    assert f"torchvision=={listed['torchvision']}" in cpu


def test_requirements_are_read_as_pip_reads_them() -> None:
    by_extra = dependencies.requirements()
    assert [one.name for one in by_extra[dependencies.CORE]][:3] == ["torch", "torchvision", "numpy"]
    assert {"dali", "dali-cuda12", "export", "wandb", "mlflow", "dev"} < set(by_extra)
    assert "numpy==1.26" in dependencies.oldest()
