"""The suite catches what it is for: each mistake is planted once; and the loader copies ahead."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.fake_cuda import build, steps


@functools.cache
def plants() -> dict[str, dict[str, Any]]:
    return {row["plant"]: row for row in build.run("plants")}


def test_a_clean_step_waits_once() -> None:
    assert steps.without_lines(plants()["nothing"]["waits"]) == steps.ONE_WAIT


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        ("item", "a number is read"),
        ("bool", "a number is read"),
        ("cpu", "copy to the host"),
        ("tolist", "copy to the host"),
        ("blocking copy", "copy to the GPU"),
        ("pageable copy", "copy to the GPU"),
        ("mask", "a mask is counted"),
        ("nonzero", "nonzero reads how many"),
    ],
)
def test_a_planted_wait_is_found(plant: str, what: str) -> None:
    more = [wait.partition(" at ")[0] for wait in plants()[plant]["waits"]]
    assert sorted(more) == sorted([what, "an event is waited for"])


def test_a_planted_tensor_of_the_host_is_found() -> None:
    assert "mixes the devices cuda and cpu" in plants()["CPU tensor"]["error"]


@functools.cache
def loading() -> list[dict[str, Any]]:
    return build.run("loading")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_loader_gives_every_step_and_loses_no_slot(number: int) -> None:
    result = loading()[number]
    assert result["steps"] == 4
    assert result["slots_lost"] == 0
    assert steps.without_lines(result["waits"]) == steps.ONE_WAIT


def test_the_next_batch_is_copied_before_the_numbers_are_read() -> None:
    for result in loading()[:2]:
        assert result["clips_copied_before_the_wait"] == 2  # micro-batches


def test_the_main_thread_copies_no_clip() -> None:
    direct, refused, _ = loading()
    assert direct["main_thread_bytes_of_clips"] == 0
    # Where the system does not let pages be pinned, clips are copied, and training works all the same.
    assert refused["main_thread_bytes_of_clips"] == 2 * refused["clip_bytes"]


def test_pages_are_unpinned_at_the_end() -> None:
    assert [result["pinned_left"] for result in loading()] == [0, 0, 0]
