"""Everything that decides a score belongs to the identity of an evaluation; what decides none does not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import main
from anal_tools.evaluate import identity, result_parts
from anal_tools.evaluate.results import Results
from tests.evaluated import summary_of
from tests.experiment import few_videos, make
from utils.errors import UserError


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """An experiment with a checkpoint and a list of four validation videos."""
    folder = make(tmp_path_factory.mktemp("identity") / "exp", motion_videos, steps=3, backbone="mobilenetv2")
    assert main.train(folder, overrides=[few_videos(folder, motion_videos)]) == 0
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(f"{motion_videos}/lists/val.txt", f"{folder}/few.txt"))
    return folder


def evaluated(exp: Path, *words: str, stop_after: int = 0) -> int:
    """Run `eval EXP --name n WORDS`; with `stop_after` a signal stops it after so many videos."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result_parts, "PART_SECONDS", -1.0)
        if stop_after:
            keep, seen = result_parts.PartWriter.keep, []

            def keep_and_stop(self: Any, item: Any, logits: Any) -> None:
                keep(self, item, logits)
                seen.append(item.sample)
                if len(seen) == stop_after:
                    os.kill(os.getpid(), signal.SIGUSR2)

            patch.setattr(result_parts.PartWriter, "keep", keep_and_stop)
        return main.main(["eval", str(exp), "--name", "n", "--chunk", "1", *words])  # videos one by one


@pytest.fixture
def fresh(exp: Path, tmp_path: Path) -> Path:
    """A copy of the experiment without results."""
    shutil.copytree(exp, tmp_path / "exp", ignore=shutil.ignore_patterns("results", "jobs", "events", "log.txt"))
    return tmp_path / "exp"


def other_root(folder: Path, data: Path) -> Path:
    """A root with other videos under the names of the first."""
    videos = sorted((data / "videos").iterdir())
    (folder / "videos").mkdir(parents=True)
    for path, source in zip(videos, videos[1:] + videos[:1], strict=True):
        shutil.copy(source, folder / "videos" / path.name)
    return folder


def test_another_root_or_form_starts_over_and_the_first_settings_resume(
    fresh: Path, tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = other_root(tmp_path / "other", motion_videos)
    assert evaluated(fresh, stop_after=2) == 75
    assert evaluated(fresh, "--root", str(root), "--plain", stop_after=1) == 75
    output = capsys.readouterr().out
    assert "resuming" not in output
    assert f"root ({motion_videos} -> {root})" in output
    assert "form (fastest -> as trained (--plain))" in output

    assert evaluated(fresh) == 0  # the mistyped command has cost nothing
    assert "resuming: 2 of 4 videos were scored before" in capsys.readouterr().out
    mixed = np.array(Results.load(fresh).logits)
    assert evaluated(fresh) == 0
    assert np.array_equal(mixed, Results.load(fresh).logits)
    assert not (fresh / "results/n/aside").exists()


def test_order_of_keys_and_name_of_the_root_do_not_matter(
    fresh: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert evaluated(fresh, stop_after=2) == 75
    text = (fresh / "config.yaml").read_text()
    rows = text.splitlines(keepends=True)
    data, size = (next(i for i, row in enumerate(rows) if word in row) for word in ("data: {", "workers:"))
    rows[data], rows[size] = rows[size], "    data: {sampling: tsn, reader: video}\n"
    (fresh / "config.yaml").write_text("".join(rows))
    (tmp_path / "link").symlink_to(motion_videos)
    monkeypatch.chdir(tmp_path)
    assert evaluated(fresh, "--root", "link") == 0
    assert "resuming: 2 of 4" in capsys.readouterr().out


def test_a_video_that_failed_is_tried_again(
    fresh: Path, tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    shutil.copytree(motion_videos / "videos", root / "videos")
    first = root / (fresh / "few.txt").read_text().split()[0]
    hidden = first.with_name("hidden")
    first.rename(hidden)
    assert evaluated(fresh, "--root", str(root), stop_after=3) == 75
    hidden.rename(first)
    assert evaluated(fresh, "--root", str(root)) == 0
    assert "resuming: 2 of 4" in capsys.readouterr().out
    results = Results.load(fresh)
    assert summary_of(results)["counts"]["failed"] == 0
    assert not np.isnan(results.logits).any()


def test_no_readable_video_is_an_error_that_leaves_nothing(
    fresh: Path, tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(fresh, stop_after=2) == 75
    (tmp_path / "wrong").mkdir()
    assert evaluated(fresh, "--root", str(tmp_path / "wrong")) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    first = (fresh / "few.txt").read_text().split()[0]
    for words in ("none of the 4 videos of", f"{tmp_path}/wrong/{first}", "the root", "data.reader"):
        assert words in message
    assert not (fresh / "results/n.json").exists()
    assert evaluated(fresh, "--set", "common.data.reader=frames") == 2
    assert "Check data.reader, frames" in capsys.readouterr().err
    assert evaluated(fresh) == 0
    assert "resuming: 2 of 4 videos" in capsys.readouterr().out, "the work under the right root is still there"
    (fresh / "results/n.json").unlink()
    shutil.rmtree(fresh / "results")
    assert evaluated(fresh, "--root", str(tmp_path / "wrong")) == 2
    assert not (fresh / "results").exists()


def test_the_first_validation_that_reads_nothing_stops_the_run(
    fresh: Path, tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in fresh.glob("ckpt*"):
        path.unlink()
    # Files are there, so that the look before the first step finds nothing wrong.
    for line in (fresh / "few.txt").read_text().splitlines():
        (tmp_path / "wrong" / line.split()[0]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "wrong" / line.split()[0]).write_bytes(b"no video at all")
    assert main.main(["train", str(fresh), "--set", f"common.val_root={tmp_path}/wrong"]) == 2
    message = capsys.readouterr().err
    assert "none of the 4 videos" in message
    assert str(tmp_path / "wrong/videos") in message
    assert not (fresh / "ckpt_best.pth.tar").exists()
    assert not (fresh / "jobs/bad_samples.jsonl").exists()
    assert main.train(fresh) == 0, "the step was saved, and its validation is done under the right root"
    assert "Iter" not in capsys.readouterr().out
    assert (fresh / "ckpt_best.pth.tar").exists()


def test_files_follow_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = identity.source_files(["methods.tsm"])
    expected = {"methods/tsm.py", "methods/_backbones.py", "networks/resnet.py", "networks/mobilenet.py"}
    assert expected <= sources.keys()
    assert not any(name.startswith(("anal_tools/", "launch/")) for name in sources)
    all_files = identity.source_hashes({"methods.tsm"})
    for name in ("utils/transforms.py", "datasets/plan/views.py", "datasets/readers/resize.py", "methods/folding.py"):
        assert name in all_files

    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text("def build():\n    from mine import layer\n")
    (package / "layer.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mine.types_only\n"
    )
    (package / "types_only.py").write_text("")
    for name in ("mine", "mine.net", "mine.layer", "mine.types_only"):
        module = ModuleType(name)
        place = package / ("__init__.py" if name == "mine" else f"{name.split('.')[1]}.py")
        module.__file__ = str(place)
        monkeypatch.setitem(sys.modules, name, module)
    identity._file_of.cache_clear()
    try:
        assert set(identity.source_files(["mine.net"])) == {"mine", "mine.net", "mine.layer"}
    finally:
        identity._file_of.cache_clear()


def test_differences_are_named() -> None:
    old = {"weights": "a", "model": {"type": "tsm", "shift_div": 8}, "code": {"methods/tsm.py": "1", "x.py": "2"}}
    new = json.loads(json.dumps(old))
    assert identity.differences(old, new) == ""
    new["model"]["shift_div"], new["code"]["methods/tsm.py"], new["weights"] = 4, "3", "b"
    assert identity.differences(old, new) == "weights, model.shift_div (8 -> 4), code (methods/tsm.py)"
    assert "cannot be read" in identity.differences("old text", new)


def test_a_part_that_vanishes_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 rows for 3 videos"):
        result_parts.merge(
            tmp_path, ["a", "b", "c"], np.zeros(3), {"class_names": ["x"], "metrics": {}, "protocol": {}}
        )
