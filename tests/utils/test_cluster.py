"""cluster.yaml and the allow-list behind every field of a SLURM request."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils import cluster
from utils.errors import UserError

FILE = """\
defaults:
    gpus_per_node: 4
    time: 60
    environment: {NCCL_DEBUG: WARN}
partitions:
    big: {gpus_per_node: 8, mem: 64G, environment: {NCCL_SOCKET_IFNAME: eth0, N: 3}}
    debug:
        time: 30
        setup: ["module load cuda; ulimit -n 4096"]
"""


def write(tmp_path: Path, text: str = FILE) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return file


def test_partition_over_defaults_and_flags_over_both(tmp_path: Path) -> None:
    site = cluster.load(write(tmp_path))
    big = site.settings("big", {"time": None, "qos": "high"})
    assert (big.gpus_per_node, big.mem, big.time, big.qos) == (8, "64G", 60, "high")
    assert big.environment == {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "eth0", "N": "3"}
    assert site.settings("debug", {}).setup == ("module load cuda; ulimit -n 4096",)
    assert site.settings("debug", {"time": 90}).time == 90
    assert site.settings("other", {}).gpus_per_node == 4


def test_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZOETROPE_CLUSTER", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert cluster.load().file == cluster.SHIPPED
    user_file = tmp_path / "zoetrope" / "cluster.yaml"
    user_file.parent.mkdir()
    user_file.write_text(FILE)
    assert cluster.load().file == user_file
    monkeypatch.setenv("ZOETROPE_CLUSTER", str(write(tmp_path)))
    assert cluster.load().file == tmp_path / "cluster.yaml"
    monkeypatch.setenv("ZOETROPE_CLUSTER", str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="none.yaml: cannot be read"):
        cluster.load()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("defaults: {tiem: 3}", ":1: defaults.tiem: there is no such key (did you mean time?)"),
        ("default: {}", ":1: default: there is no such key (did you mean defaults?)"),
        ("defaults:\n    time: 1h", ":2: defaults.time: '1h' is not a whole number"),
        ("partitions:\n    a b: {}", ":2: partitions.a b: 'a b' is not allowed here"),
        ("partitions:\n  x:\n    mem: 4 GB", ":3: partitions.x.mem: '4 GB' is not allowed here"),
        ("partitions:\n  x: 3", ":2: partitions.x: must be a table"),
        ("defaults: {setup: module load x}", ":1: defaults.setup: must be a list of shell lines"),
        ('defaults: {setup: ["a\\nb"]}', ":1: defaults.setup: must be a list of shell lines"),
        ("defaults: {environment: {A-B: 1}}", "'A-B' cannot be the name of a variable"),
        ('defaults: {environment: {A: "x\\ny"}}', "A: 'x\\ny' is not a text on one line"),
        ("defaults: {gpu_request: gpus}", "'gpus' is not one of gpus-per-node, gres, none"),
        ("defaults: {gpus_per_node: true}", "True is not a whole number"),
        ("defaults: {time: 1, time: 2}", ":1: defaults.time: given twice"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        cluster.load(write(tmp_path, text))
    assert says in str(caught.value)
    assert str(tmp_path / "cluster.yaml") in str(caught.value)


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        cluster.load(write(tmp_path, "defaults:\n    a: 1\n    time: x\n    mem: 1 G\n"))
    assert len(str(caught.value).splitlines()) == 3


HOSTILE = [
    "a b",
    "a'b",
    'a"b',
    "a\nb",
    "a;b",
    "$(touch x)",
    "`touch x`",
    "-x",
    "--wrap=x",
    "",
    "a\\b",
    "é",
    "a>b",
    "a#b",
]


@pytest.mark.parametrize("name", [*cluster._PATTERNS])
@pytest.mark.parametrize("value", HOSTILE)
def test_no_field_takes_a_hostile_text(name: str, value: str) -> None:
    assert cluster.check(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition", "VI_SP_VA_1080TI"),
        ("account", "team-a.b@c"),
        ("nodelist", "n1,n[4-7],gpu-0[1,3]"),
        ("constraint", "[rack1*2&rack2*4]"),
        ("constraint", "(a100|h100)&ib"),
        ("dependency", "afterok:12:13_4,afterany:9+5"),
        ("dependency", "singleton"),
        ("mem", "240G"),
    ],
)
def test_what_slurm_users_write_is_taken(name: str, value: str) -> None:
    assert cluster.check(name, value) is None


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("12:00:00", 720),
        ("3-00:00", 4320),
        ("1-2", 1560),
        ("1-02:03:04", 1564),
        ("0:1:0", 1),
    ],
)
def test_times(text: str, minutes: int) -> None:
    assert cluster.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "-5", "0", "3-", "1d", "1;2", "9999-00"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        cluster.minutes(text)


def test_time_limit_leaves_room_for_the_signal(tmp_path: Path) -> None:
    site = cluster.load(write(tmp_path))
    with pytest.raises(UserError, match=r"ask for --time 4 or more"):
        site.settings("x", {"time": 3})
    assert site.settings("x", {"time": 4}).time == 4
