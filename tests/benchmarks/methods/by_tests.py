"""Measurements that are tests: golden losses, operators, a toy method, one step of every experiment."""

from __future__ import annotations

import re
import sys

from tests.benchmarks.rows import command, run_rows

T = "tests/methods"
OPERATORS: dict[str, list[str]] = {
    "shift on a ramp and by its definition": [
        f"{T}/test_tsm.py::test_shift_on_a_ramp_in_time",
        f"{T}/test_tsm.py::test_shift_equals_its_definition",
        f"{T}/test_tsm.py::test_shift_gradients",
    ],
    "lateral strides": [f"{T}/test_slowfast.py::test_lateral_against_its_definition"],
    "frames of the Slow pathway": [f"{T}/test_slowfast.py::test_slow_frames"],
    "TPN modulation": [f"{T}/test_tpn.py::test_temporal_modulation_against_its_definition"],
    "TPN flow": [f"{T}/test_tpn.py::test_where_the_bottom_up_flow_starts"],
    "TPN fusion and tempos": [
        f"{T}/test_tpn.py::test_level_fusion_pools_the_faster_level",
        f"{T}/test_tpn.py::test_tempos_of_the_levels",
        f"{T}/test_tpn.py::test_shapes_of_the_necks_weights",
    ],
    "ResNet-vd shortcut": ["tests/networks/test_resnet_vd.py::test_shortcut_against_its_definition"],
    "non-local attention": [f"{T}/test_non_local.py::test_against_the_definition"],
    "inflation": ["tests/networks/test_resnet3d.py::test_inflated_network_answers_a_constant_clip_like_the_2d_network"],
    "precise-BN": ["tests/utils/engine/test_precise_bn.py::test_equals_a_slow_reference"],
    "KD and DML losses": [
        "tests/utils/engine/test_distill.py::test_kd_equals_its_closed_form",
        "tests/utils/engine/test_distill.py::test_kd_gradient_is_that_of_hinton_2015_equation_2",
        "tests/utils/engine/test_distill.py::test_mutual_equals_its_closed_form_and_paddlevideos",
    ],
}


def operators() -> dict:
    """The tests that hold each operator against a closed form or a slow reference: passed of run, by operator."""
    tests_to_run = [test for tests in OPERATORS.values() for test in tests]
    argv = ("-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *tests_to_run)
    done = command(*argv, check=False, env={"OMP_NUM_THREADS": "1"})
    results = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (\S+)", done.stdout, re.MULTILINE)
    passed, holds = {}, done.returncode == 0
    for name, tests in OPERATORS.items():
        outcomes = [word for word, test in results if re.split(r"[\[]", test)[0].startswith(tuple(tests))]
        passed[name] = f"{outcomes.count('PASSED')} of {len(outcomes)}"
        holds &= bool(outcomes) and set(outcomes) == {"PASSED"}
    return {"measured": passed | ({} if holds else {"output": done.stdout[-1500:]}), "holds": holds}


def passed(*tests: str) -> str:
    """The last line of pytest: `4 passed in 1.20s`; a name that is not there is an error in it."""
    argv = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    done = command(*argv, check=False, env={"OMP_NUM_THREADS": "1"})
    lines = (done.stdout + done.stderr).strip().splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)|no tests", line)), "")
    clean = done.returncode == 0 and "skipped" not in summary
    return summary.strip("= ") if clean else f"failed: {summary or lines[-1:]}"


def by_test(*tests: str) -> dict:
    """A row that is one test file."""
    line = passed(*tests)
    return {"measured": line, "holds": not line.startswith("failed")}


ROWS = {
    "golden": ("5-step golden losses", "rtol 1e-4", lambda: by_test("tests/methods/test_golden_losses.py")),
    "operators": ("operators against closed forms or slow references", "exact or <= 1e-6", operators),
    "toy": (
        "one new method file",
        "found by list, contract tests, train.sh",
        lambda: by_test("tests/test_toy_method.py"),
    ),
    "experiments": (
        "every experiment folder",
        "one training step each",
        lambda: by_test("--tier", "nightly", "tests/test_experiments.py"),
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
