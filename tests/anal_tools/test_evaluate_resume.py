"""An evaluation that was stopped or killed resumes where it was, but only if it is the same evaluation."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import main
from anal_tools.evaluate import part_file, result_parts, results
from datasets.loading.eval import VideoItem
from tests.experiment import make

KEY = {"weights": "w", "list": "l"}


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """A trained experiment and its undisturbed evaluation, named calm."""
    folder = make(tmp_path_factory.mktemp("evaluated") / "exp", motion_videos, steps=3)
    assert main.train(folder) == 0
    assert main.main(["eval", str(folder), "--name", "calm"]) == 0
    return folder


def stopping(keep: Callable[..., None], after: int, seen: list[int]) -> Callable[..., None]:
    """`PartWriter.keep` that lists what it has seen, and sends this process a signal after so many videos."""

    def keep_and_signal(self: Any, item: Any, logits: Any) -> None:
        keep(self, item, logits)
        seen.append(item.sample)
        if len(seen) == after:
            os.kill(os.getpid(), signal.SIGUSR2)

    return keep_and_signal


def test_stopped_by_a_signal_it_goes_on(exp: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen: list[int] = []
    monkeypatch.setattr(result_parts.PartWriter, "keep", stopping(result_parts.PartWriter.keep, 6, seen))
    assert main.main(["eval", str(exp), "--name", "rough"]) == 75
    assert not (exp / "results/rough.json").exists()
    before = len(seen)
    assert 6 <= before < 23
    assert main.main(["eval", str(exp), "--name", "rough"]) == 0
    assert len(seen) == 23, "each video is scored once"
    assert f"resuming: {before} of 23 videos were scored before" in capsys.readouterr().out
    calm, rough = (results.Results.load(exp, name) for name in ("calm", "rough"))
    assert rough.summary["metrics"] == calm.summary["metrics"]
    assert rough.ids == calm.ids
    assert np.array_equal(rough.logits, calm.logits)
    assert [path.name for path in (exp / "results/rough").glob("part*")] == []


def test_other_weights_start_anew(exp: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(result_parts.PartWriter, "keep", stopping(result_parts.PartWriter.keep, 6, []))
    assert main.main(["eval", str(exp), "--name", "other"]) == 75
    monkeypatch.undo()
    assert main.main(["eval", str(exp), "--name", "other", "--checkpoint", str(exp / "ckpt_prev.pth.tar")]) == 0
    assert "resuming" not in capsys.readouterr().out


def part(folder: Path, name: str, samples: list[int], failed: int = 0, key: dict[str, str] = KEY) -> None:
    why = np.array([""] * (len(samples) - failed) + ["torn"] * failed, dtype=str)
    good = len(samples) - failed
    arrays = {"samples": np.array(samples, np.int64), "failed": why, "repaired": np.full(len(samples), "")}
    arrays |= {"logits": np.zeros((good, 1, 3), np.float32), "frames": np.zeros((good, 1, 2), np.int32)}
    arrays["boxes"] = np.zeros((1, 4), np.int64)
    part_file.write(folder / name, arrays, result_parts.owner_of(key))


def test_only_whole_parts_of_the_same_evaluation_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "best"
    assert result_parts.earlier_parts(folder, KEY, 9) == (0, [])
    part(folder, "part-0000-0000-000000.npz", [0, 2, 4, 7], failed=1)  # 7 is tried again
    part(folder, "part-0000-0001-000000.npz", [1, 3])
    part(folder, "part-0000-0001-000001.npz", [5, 4])  # 4 is there already
    part(folder, "part-0000-0001-000002.npz", [9])  # the list has 0..8
    part(folder, "part-0000-0001-000003.npz", [6, 6])
    part(folder, "part-0000-0001-000004.npz", [6], key={**KEY, "weights": "v"})  # copied from another evaluation
    whole = (folder / "part-0000-0000-000000.npz").read_bytes()
    (folder / "part-0000-0002-000000.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "part-0000-0003-000000.npz").write_bytes(b"")
    (folder / "part-0000-0004-000000.tmp").write_bytes(whole)
    (folder.with_suffix(".json")).write_text("{}")
    start, parts = result_parts.earlier_parts(folder, KEY, 9)
    assert start == 1
    assert [list(part["samples"]) for part in parts] == [[0, 2, 4], [1, 3]]
    assert sorted(path.name for path in folder.glob("part-*")) == [
        "part-0000-0000-000000.npz",
        "part-0000-0001-000000.npz",
    ]
    assert folder.with_suffix(".json").read_text() == "{}", "an earlier result stays until there is a new one"
    assert result_parts.earlier_parts(folder, KEY, 9)[0] == 2
    capsys.readouterr()

    other = {**KEY, "weights": "v"}
    assert result_parts.earlier_parts(folder, other, 9) == (0, [])
    assert "differs in weights" in capsys.readouterr().out
    assert list(folder.glob("part-*")) == []
    part(folder, "part-0000-0000-000000.npz", [8], key=other)
    start, parts = result_parts.earlier_parts(folder, KEY, 9)  # the first settings again: its scores are still there
    assert start == 3
    assert [list(part["samples"]) for part in parts] == [[0, 2, 4], [1, 3]]
    start, parts = result_parts.earlier_parts(folder, other, 9)
    assert (start, [list(part["samples"]) for part in parts]) == (1, [[8]])

    part(folder, "part-0000-0000-000000.npz", [0], key=other)
    (folder / "parts.json").write_text(json.dumps({"key": 3}))
    assert result_parts.earlier_parts(folder, other, 9) == (0, [])


def test_a_kill_while_evaluations_are_exchanged_loses_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at each of its steps; then either evaluation finds all its parts."""
    other = {**KEY, "weights": "v"}
    for chosen_key, expected in ((KEY, [[0, 1], [2]]), (other, [[5], [6, 7]])):
        step = 0
        for step in range(20):
            folder = tmp_path / f"{len(expected[0])}-{step}"
            result_parts.earlier_parts(folder, other, 9)
            part(folder, "part-0000-0000-000000.npz", [5], key=other)
            part(folder, "part-0000-0000-000001.npz", [6, 7], key=other)
            result_parts.earlier_parts(folder, KEY, 9)
            part(folder, "part-0000-0000-000000.npz", [0, 1])
            part(folder, "part-0000-0000-000001.npz", [2])

            # `other` comes back in the place of KEY, and is killed at this step
            left, rename = iter(range(step)), Path.rename

            def killed(path: Path, target: Path, left: Iterator[int] = left, rename: Callable = rename) -> Path:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return rename(path, target)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "rename", killed)
                try:
                    result_parts.earlier_parts(folder, other, 9)
                    done = True
                except KeyboardInterrupt:
                    done = False

            _, parts = result_parts.earlier_parts(folder, chosen_key, 9)
            assert [list(part["samples"]) for part in parts] == expected, step
            for key, videos in ((KEY, [[0, 1], [2]]), (other, [[5], [6, 7]])):
                _, parts = result_parts.earlier_parts(folder, key, 9)
                assert [list(part["samples"]) for part in parts] == videos, step
            if done:
                break
        assert step >= 6


def test_a_lower_number_of_starts_overwrites_no_part(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    result_parts.earlier_parts(folder, KEY, 9)
    part(folder, "part-0004-0000-000000.npz", [0])
    (folder / "parts.json").write_text(json.dumps({"key": KEY, "starts": 1}))
    assert result_parts.earlier_parts(folder, KEY, 9)[0] == 5


def test_a_slow_evaluation_writes_parts_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_parts, "PART_SECONDS", -1.0)
    writer = result_parts.PartWriter(tmp_path, 2, start=4)
    writer.keep(VideoItem(3, 0, None, None, failure="x"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["part-0004-0002-000000.npz"]
