"""Where weights come from: licences, label order, what they have seen, the size of their frames. Planted cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from methods.interop import provenance
from tests import hf_folders, models
from utils.errors import UserError

CARD = """\
---
license: {licence}
datasets:
- kinetics-710
---
# VideoMAE base

Compared with networks trained on Kinetics-600. license: apache-2.0
"""


def start(folder: Path, **options: Any) -> provenance.Start:
    return models.from_pretrained(folder, **options).pretrained


def test_the_licence_of_a_card_and_of_a_family(tmp_path: Path) -> None:
    carded = start(hf_folders.write(tmp_path / "a", "vjepa2", card=CARD.format(licence="CC-BY-NC-4.0")))
    assert (carded.initial["licence"], carded.initial["licence_from"]) == ("cc-by-nc-4.0", "card")
    line = provenance.licence_line(carded.initial)
    assert line.startswith("licence of the initial weights a: CC-BY-NC 4.0, which forbids commercial use")
    assert "page" not in line
    family = start(hf_folders.write(tmp_path / "b", "videomae")).initial
    assert "not in the file; that of the published weights of this network is CC-BY-NC 4.0" in provenance.licence_line(
        family
    )
    free = start(hf_folders.write(tmp_path / "c", "videomae", card=CARD.format(licence="apache-2.0"))).initial
    assert provenance.licence_line(free) == "licence of the initial weights c: Apache 2.0"
    other = CARD.format(licence="other\nlicense_name: mine-nc-1")
    named = start(hf_folders.write(tmp_path / "d", "videomae", card=other)).initial
    assert named["licence"] == "mine-nc-1"
    assert provenance.is_non_commercial(named["licence"])
    assert not provenance.is_non_commercial("apache-2.0")
    assert not provenance.is_non_commercial("encore")


def test_a_checkpoint_hands_licence_and_training_data_on(tmp_path: Path) -> None:
    folder = hf_folders.write(tmp_path / "k", "videomae", card=CARD.format(licence="cc-by-nc-4.0"))
    model = models.from_pretrained(folder)
    config = {"model": {"type": "videomae", "backbone": "vit3d"}}
    content = {"model": model.state_dict(), "config": config, "initial": model.pretrained.initial}
    file = tmp_path / "ours.pth.tar"
    torch.save(content, file)
    second = provenance.of(file, "", None, content)
    assert second["licence"] == "cc-by-nc-4.0"
    assert "Kinetics-710" in provenance.seen_line(second, "data/kinetics400/lists/val.txt")
    damaged = content | {"initial": {"licence": 3}}
    assert provenance.of(file, "", None, damaged)["licence"] == ""


@pytest.mark.parametrize(
    ("about", "data", "warns"),
    [
        ("vit_b_k710_dl_from_giant.pth", "data/kinetics400/lists/val.txt", True),
        ("vit_b_K710.pth", "/data/k400/val.csv", True),
        ("videomae-base-finetuned-kinetics-600", "data/kinetics400/lists/val.txt", True),
        ("vit_b_k400.pth", "data/kinetics400/lists/val.txt", False),
        ("videomae-base-finetuned-kinetics", "data/kinetics400/lists/val.txt", False),
        ("vit_b_k710.pth", "data/ucf101/lists/val.txt", False),
        ("task4000.pth", "data/kinetics400/lists/val.txt", False),
        ("work710", "data/kinetics400/lists/val.txt", False),
    ],
)
def test_weights_that_have_seen_the_validation_data(about: str, data: str, warns: bool) -> None:
    line = provenance.seen_line({"name": "w", "about": about}, data)
    assert bool(line) == warns
    if warns:
        assert line.startswith("WARNING: the initial weights w name Kinetics-")
        assert "Kinetics-400" in line


def test_the_card_counts_but_not_its_text(tmp_path: Path) -> None:
    initial = start(hf_folders.write(tmp_path / "a", "videomae", card=CARD.format(licence="mit"))).initial
    assert "Kinetics-710 as training data" in provenance.seen_line(initial, "k400")
    assert "600" not in provenance.seen_line(initial, "k400")


def test_label_order() -> None:
    theirs = ["Opening [something]", "air drumming", "zumba", "b_c"]
    check = provenance.check_labels
    assert check(theirs, ["opening something", "Air_drumming", "ZUMBA", "b c"], "f") == ""
    with pytest.raises(
        UserError, match=r"f: .* not in the order .*: 2 of 4, such as 'air drumming', class 1 there and class 2"
    ):
        check(theirs, ["opening something", "zumba", "air drumming", "b c"], "f")
    renamed = check(theirs, ["opening something", "air drumming", "yoga", "b c"], "f")
    assert "1 of its 4 classes have names that differ from the list's ('zumba' is 'yoga' here)" in renamed
    assert check(theirs, ["0", "1", "2", "3"], "f") == ""  # a list without names
    assert check(theirs, ["one", "two"], "f") == ""  # another classifier
    assert check(["a", "a", "b"], ["a", "a", "b"], "f") == ""
    assert provenance.reordered(theirs, ["zumba", "b c", "opening something", "air drumming"]) == [2, 3, 0, 1]
    assert provenance.reordered(theirs, ["zumba", "b c", "opening something", "yoga"]) is None
    assert provenance.reordered(["a", "a"], ["a", "a"]) is None


def test_labels_of_a_start(tmp_path: Path) -> None:
    names = ["run", "jump", "sit", "stand", "fall"]
    folder = hf_folders.write(tmp_path / "f", "videomae", labels=names)
    with pytest.raises(UserError, match="puts the classifier in the list's order"):
        provenance.check_start(start(folder), ["jump", "run", "sit", "stand", "fall"], 32)
    assert not any(provenance.check_start(start(folder), names, 32))
    assert start(folder, num_class=6).labels is None  # its classifier was left out
    (warning,) = filter(None, provenance.check_start(start(folder), list("abcde"), 32))
    assert "5 of its 5 classes have names that differ" in warning


def test_frames_several_times_the_training_size(tmp_path: Path) -> None:
    begun = start(hf_folders.write(tmp_path / "f", "videomae"))
    (line,) = filter(None, provenance.check_start(begun, [], 96))
    assert line.startswith("REMARK: frames of 96 pixels are 3 times the 32 pixels that the initial weights")
    assert not any(provenance.check_start(begun, [], 63))
    assert provenance.size_line(448, None, "x") == ""


def test_the_list_of_the_training() -> None:
    assert provenance.list_line({"train": "abc"}, "abc", "the weights w").startswith(
        "WARNING: the weights w were trained"
    )
    assert provenance.list_line({"train": "abc", "val": "def"}, "def", "w") == ""
    assert provenance.list_line(None, "abc", "w") == ""
