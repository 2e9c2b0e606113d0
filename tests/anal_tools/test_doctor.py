"""`main.py doctor`: planted faults of the real kind are each named, with what to do; a sound machine is `ok`."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from anal_tools import doctor
from anal_tools.doctor import codecs, experiment, finding, gpu, machine, site, storage
from anal_tools.doctor.finding import Finding, Subject
from tests import experiment as experiments
from utils import config, run_lock

pytestmark = pytest.mark.system

EXPERIMENT = ("config", "files", "classes")


def findings_of(check: str, subject: Subject, *before: str) -> list[Finding]:
    """Return what a check finds, after those that it builds on."""
    names = [*before, check]
    rows = doctor.look(subject, {name: doctor.CHECKS[name] for name in names})
    return [each for name, each in rows if name == check]


def the_fault(findings: list[Finding], level: str, *words: str, advice: str) -> None:
    """See that one finding of this level holds the words and the advice."""
    texts = [str(each) for each in findings if each.level == level]
    assert any(all(word in text for word in (*words, advice)) for text in texts), findings


@pytest.fixture(scope="module")
def make_exp(tmp_path_factory: pytest.TempPathFactory, tiny_videos: Path) -> Callable[..., Path]:
    def make(**changes: object) -> Path:
        return experiments.make(tmp_path_factory.mktemp("doctor") / "exp", tiny_videos, **changes)

    return make


@pytest.fixture
def edited(make_exp: Callable[..., Path]) -> Callable[..., Path]:
    """An experiment in whose config texts are replaced."""

    def edit(*pairs: tuple[str, str], **changes: object) -> Path:
        exp = make_exp(**changes)
        text = (exp / "config.yaml").read_text()
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        (exp / "config.yaml").write_text(text)
        return exp

    return edit


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Tiny file systems of their own."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"fs{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def soft_limit() -> Iterator[Callable[[int, int], None]]:
    """Lower a soft limit of this process, for one test."""
    before: dict[int, tuple[int, int]] = {}

    def lower(kind: int, value: int) -> None:
        before[kind] = resource.getrlimit(kind)
        resource.setrlimit(kind, (value, before[kind][1]))

    yield lower
    for kind, values in before.items():
        resource.setrlimit(kind, values)


def program(folder: Path, name: str, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program first on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


# ------------------------------------------------------------------------------------------------- nothing wrong
@pytest.mark.slow
def test_a_sound_experiment_has_no_error_within_twenty_seconds(make_exp: Callable[..., Path], repo_root: Path) -> None:
    began = time.monotonic()
    words = [sys.executable, "main.py", "doctor", str(make_exp()), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=repo_root, env=environment, capture_output=True, text=True, check=False)
    assert time.monotonic() - began <= 20
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema"] == 1
    assert {row["check"] for row in answer["findings"]} == set(doctor.CHECKS)
    assert [row for row in answer["findings"] if row["level"] == "error"] == []
    rate = next(row["text"] for row in answer["findings"] if row["check"] == "readers")
    assert "clips/s" in rate or "no answer" in rate


def test_what_is_absent_and_not_asked_for_is_ok() -> None:
    for name in (*EXPERIMENT, "packages asked for", "memcached", "weights", "data", "memory", "run", "readers"):
        assert findings_of(name, Subject()) == [finding.ok("none")]
    if not torch.cuda.is_available():
        assert [findings_of(name, Subject()) for name in ("nccl", "nvdec")] == [[finding.ok("none")]] * 2


def test_all_codecs_of_this_build_decode_and_leave_the_priority_alone() -> None:
    before = os.sched_getscheduler(0)
    (line,) = findings_of("codecs", Subject())
    assert line.level == "ok"
    assert line.text.startswith("H.264, HEVC, VP9")
    assert os.sched_getscheduler(0) == before


# ------------------------------------------------------------------------------------------------- planted faults
def test_1_no_decoder() -> None:
    table = {"VVC": ("vvc_not_in_this_build", ())}  # PyAV itself answers that it has none
    the_fault(list(codecs.codecs(Subject(), table)), "warning", "does not decode VVC", advice="pip install")


def test_2_a_decoder_that_gives_wrong_pixels() -> None:
    images = codecs.frames()
    shifted = [image[::-1] for image in codecs.decoded(codecs.encoded(images, "libx264"), "h264")]
    assert codecs.quality(images, shifted) < codecs.LEAST_PSNR < codecs.quality(images, images)
    with pytest.raises(ValueError, match="7 of 8 frames"):
        codecs.quality(images, images[:7])


def test_3_pyav_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    the_fault(findings_of("codecs", Subject()), "error", "av cannot be imported", advice="install")


def test_4_a_package_missing_and_one_too_old(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        'requires-python = ">=3.99"\ndependencies = [\n    "zoetrope-none>=1",\n    "numpy>=99",  # why\n]\n'
    )
    lines = list(machine.python(Subject(), project))
    the_fault(lines, "error", "zoetrope-none is missing", advice="-m pip install 'zoetrope-none>=1'")
    the_fault(lines, "error", "numpy", "does not fit", advice="-m pip install 'numpy>=99'")
    the_fault(lines, "error", "is too old", advice="use Python 3.99")


def test_5_a_full_disk(tmpfs: Callable[..., Path]) -> None:
    folder = tmpfs("size=1m")
    (folder / "fill").write_bytes(bytes((1 << 20) - 4096))
    the_fault(list(storage.disk(Subject(folder))), "error", "No space left", advice="make room")


def test_6_too_little_room_for_checkpoints(tmpfs: Callable[..., Path]) -> None:
    folder = tmpfs("size=64m")
    lines = list(storage.disk(Subject(folder, parameters=11_000_000)))
    the_fault(lines, "error", "4 checkpoints take 352 MB", advice="main.py clean")


def test_7_a_folder_that_cannot_be_written(tmpfs: Callable[..., Path]) -> None:
    folder = tmpfs("ro")
    the_fault(list(storage.disk(Subject(folder))), "error", "Read-only file system", advice="choose a folder")


def test_8_no_inodes(tmpfs: Callable[..., Path]) -> None:
    folder = tmpfs("nr_inodes=50,size=2g")
    the_fault(list(storage.disk(Subject(folder))), "warning", "more files can be made", advice="inodes")


def test_9_few_open_files(soft_limit: Callable[[int, int], None]) -> None:
    soft_limit(resource.RLIMIT_NOFILE, 200)
    the_fault(findings_of("limits", Subject()), "warning", "only 200 files", advice="ulimit -n 2048")


def test_many_readers_need_more_open_files(
    make_exp: Callable[..., Path], soft_limit: Callable[[int, int], None]
) -> None:
    soft_limit(resource.RLIMIT_NOFILE, machine.OPEN_FILES + 100)
    assert not any("files may be open" in each.text for each in machine.limits(Subject()))
    eight = Subject(cfg=config.load(make_exp(), ["common.workers=8"]))
    the_fault(
        list(machine.limits(eight)),
        "warning",
        "files may be open",
        advice=f"ulimit -n {2 * (machine.OPEN_FILES + 256)}",
    )


def test_10_a_limit_of_file_size(soft_limit: Callable[[int, int], None]) -> None:
    soft_limit(resource.RLIMIT_FSIZE, 50_000_000)
    the_fault(findings_of("limits", Subject()), "error", "larger than 50 MB", advice="ulimit -f unlimited")


def test_11_few_processes(soft_limit: Callable[[int, int], None]) -> None:
    soft_limit(resource.RLIMIT_NPROC, 30)
    the_fault(findings_of("limits", Subject()), "warning", "30 processes and threads", advice="ulimit -u")


def test_12_a_small_shared_memory(tmpfs: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmpfs("size=64m")  # docker's default
    the_fault(list(machine.shared_memory(Subject(), folder)), "warning", "67.1 MB left", advice="--shm-size")
    lines = list(machine.shared_memory(Subject(), tmp_path / "none"))
    the_fault(lines, "warning", "No such file", advice="mount a tmpfs")


def test_13_too_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    count = finding.cores()
    the_fault(
        findings_of("threads", Subject()), "warning", f"64 threads on {count} cores", advice=f"OMP_NUM_THREADS={count}"
    )


def test_14_too_many_reader_processes(make_exp: Callable[..., Path]) -> None:
    lines = findings_of("threads", Subject(make_exp(workers=500)), "config")
    the_fault(lines, "warning", "workers: 500", advice="set common.workers to")


def test_15_the_clock_is_behind(tmp_path: Path) -> None:
    code = tmp_path / "main.py"
    code.touch()
    tomorrow = time.time() + 86_400
    os.utime(code, (tomorrow, tomorrow))
    the_fault(list(machine.clock(Subject(), code)), "warning", "behind the files of the code", advice="NTP")


def test_16_a_wrong_cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("partitions:\n    gpu: {tmie: 30, gpus_per_node: 900}\n")
    monkeypatch.setenv("ZOETROPE_CLUSTER", str(file))
    lines = findings_of("cluster file", Subject())
    the_fault(lines, "error", f"{file}:2", advice="did you mean time?")
    the_fault(lines, "error", "gpus_per_node", advice="1 to 64")


SINFO = 'printf "video|up|64|gpu:a100:4(S:0-1)\\nold|down|16|(null)\\n"'


def test_17_a_cluster_file_that_does_not_fit_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "partitions:\n    viedo: {}\n    video: {gpus_per_node: 8, cpus_per_gpu: 16}\n    old: {cpus_per_gpu: 1}\n"
    )
    monkeypatch.setenv("ZOETROPE_CLUSTER", str(file))
    program(tmp_path / "bin", "sinfo", SINFO, monkeypatch)
    lines = findings_of("slurm", Subject())
    the_fault(lines, "error", "no partition viedo", advice="correct the name")
    the_fault(lines, "error", "8 x 16 cores", advice="set cpus_per_gpu to 8")
    the_fault(lines, "error", "gpus_per_node is 8", advice="set gpus_per_node to 4")
    the_fault(lines, "warning", "the partition is down", advice="administrator")


def test_18_slurm_that_refuses_and_slurm_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "sinfo", "echo 'slurm_load_partitions: Unable to contact' >&2; exit 1", monkeypatch)
    the_fault(findings_of("slurm", Subject()), "warning", "Unable to contact", advice="administrator")
    program(tmp_path / "bin", "sinfo", "exec sleep 20", monkeypatch)
    began = time.monotonic()
    rows = list(doctor.look(Subject(), {"slurm": site.slurm, "shared memory": machine.shared_memory}, seconds=2))
    assert time.monotonic() - began < 4
    the_fault([each for _, each in rows], "warning", "no answer within 2 s", advice="administrator")
    the_fault([each for _, each in rows], "warning", "not checked", advice="run it again")


def test_ports_of_jobs_among_those_of_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", "sinfo", "exit 0", monkeypatch)
    taken, kept = tmp_path / "taken", tmp_path / "kept"
    taken.write_text("10000\t65535\n")
    kept.write_text("\n")
    the_fault(list(site.ports(Subject(), taken, kept)), "warning", "10000 to 65535", advice="ports = 20000-31999")
    kept.write_text("111,20000-25999,26000-31999\n")
    assert [line.level for line in site.ports(Subject(), taken, kept)] == ["ok"]
    kept.write_text("20000-31998\n")
    assert [line.level for line in site.ports(Subject(), taken, kept)] == ["warning"]
    taken.write_text("32768 60999\n")  # Linux, as it comes
    assert [line.level for line in site.ports(Subject(), taken, tmp_path / "none")] == ["ok"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert [str(line) for line in site.ports(Subject(), taken, kept)] == ["none"]


def test_19_a_dead_memcached(edited: Callable[..., Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        name = f"127.0.0.1:{taken.getsockname()[1]}"
    exp = edited(("reader: video", f"reader: memcached, memcached: {{servers: ['{name}']}}"))
    the_fault(findings_of("memcached", Subject(exp), "config"), "warning", name, "refused", advice="start it")


def test_20_a_missing_root_and_a_missing_list(edited: Callable[..., Path], tiny_videos: Path) -> None:
    roots = (f"train_root: {tiny_videos}", "train_root: /none/here"), (f"{tiny_videos}/lists/val", "/none/lists/val")
    lines = findings_of("files", Subject(edited(*roots)), "config")
    the_fault(lines, "error", "common.train_root: there is no folder /none/here", advice="put it there")
    the_fault(lines, "error", "no list file /none/lists/val.txt", advice="put it there")


def test_21_labels_beyond_the_classes_and_classes_without_videos(edited: Callable[..., Path]) -> None:
    lines = findings_of("files", Subject(edited(("num_class: 8", "num_class: 4"))), "config")
    the_fault(lines, "error", "is outside 0..3", advice="num_class must be at least 8")
    lines = findings_of("classes", Subject(edited(("num_class: 8", "num_class: 10"))), "config", "files")
    the_fault(lines, "warning", "2 of 10 classes", "8, 9", advice="split again")


def test_22_a_typing_error_in_the_config(edited: Callable[..., Path]) -> None:
    lines = findings_of("config", Subject(edited(("batch_size:", "batch_sise:"))))
    the_fault(lines, "error", "batch_sise", advice="did you mean batch_size?")


def test_23_weights_of_another_network(edited: Callable[..., Path], tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.zeros(4, 3, 7, 7)}}, tmp_path / "other.pth")
    exp = edited(("pretrained: False", f"pretrained: {tmp_path / 'other.pth'}"))
    lines = findings_of("weights", Subject(exp), "config")
    assert [each.level for each in lines] == ["error"]
    assert "other.pth" in str(lines[0])


def test_24_a_batch_that_fits_into_no_memory(edited: Callable[..., Path]) -> None:
    lines = findings_of("memory", Subject(edited(("batch_size: 4", "batch_size: 100000"))), "config")
    the_fault(lines, "error", "a step takes about", advice="set common.batch_size to")


def test_25_the_wrong_reader_and_unreadable_videos(edited: Callable[..., Path], tmp_path: Path) -> None:
    lines = findings_of("files", Subject(edited(("reader: video", "reader: frames"))), "config")
    the_fault(lines, "error", "its videos are video files", advice="set data.reader: video")
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("broken.mp4 0\n")
    exp = edited(
        *(
            (f"{split}_{key}: ", f"{split}_{key}: {tmp_path}/{split}.txt #")
            for split in ("train", "val")
            for key in ("source",)
        )
    )
    text = (exp / "config.yaml").read_text().replace("train_root: ", f"train_root: {tmp_path} #")
    (exp / "config.yaml").write_text(text.replace("val_root: ", f"val_root: {tmp_path} #"))
    lines = findings_of("readers", Subject(exp), "config", "files")
    the_fault(lines, "error", "none of", "could be read", advice="main.py scan")


def test_26_readers_slower_than_the_device(make_exp: Callable[..., Path]) -> None:
    exp = make_exp()
    (exp / "log.txt").write_text("[x] Iter: [20/60] Time 0.001 (0.001) Data 0.000 (0.0001) Loss 2 (2)\n")
    lines = findings_of("readers", Subject(exp), "config", "files")
    the_fault(lines, "warning", "the device uses 4444.4 (from its log)", advice="main.py dump")


def test_27_a_checkpoint_that_cannot_be_read(make_exp: Callable[..., Path]) -> None:
    exp = make_exp()
    (exp / "ckpt.pth.tar").write_bytes(b"torn")
    the_fault(findings_of("run", Subject(exp)), "error", "no checkpoint can be read", advice="--fresh")


def test_28_a_driver_without_a_torch_for_it(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this torch sees a GPU")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    lines = list(gpu.gpu(Subject(), tmp_path / "version"))
    the_fault(lines, "error", "550.54.15", "sees no GPU", advice="nvidia-smi")


def test_without_a_driver_torch_is_not_imported(repo_root: Path) -> None:
    if gpu.DRIVER.is_file() or any(place.exists() for place in gpu.OTHER_DRIVERS):
        pytest.skip("a GPU is here")
    code = "import sys; from anal_tools.doctor import Subject, gpu; found = list(gpu.gpu(Subject())); "
    code += "print(*found, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["none", "False"]


def test_29_a_container_with_less_than_it_shows(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert finding.cpu_quota(tmp_path / "cpu.max") == 1.5
    assert experiment.free_memory(tmp_path) == 600_000


# ------------------------------------------------------------------------------------------------- the lines
def test_a_live_run_is_named(make_exp: Callable[..., Path]) -> None:
    exp = make_exp()
    (exp / "jobs").mkdir()
    held = run_lock.take(exp / "jobs" / "lock.json")
    try:
        (line,) = findings_of("run", Subject(exp))
        assert f"process {os.getpid()} on {socket.gethostname()} has been training here" in line.text
    finally:
        held.release()
    assert findings_of("run", Subject(exp)) == [finding.ok("none")]


def test_a_check_that_fails_does_not_hide_the_others() -> None:
    def broken(subject: Subject) -> Iterator[Finding]:
        yield finding.ok("first")
        raise KeyError("bug")

    rows = [each for _, each in doctor.look(Subject(), {"broken": broken, "clock": machine.clock})]
    assert [each.level for each in rows] == ["ok", "error", "ok"]


def test_exit_codes_and_lines(
    make_exp: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {"config": experiment.config, "memcached": site.memcached})
    assert doctor.main([str(make_exp())]) == 0
    assert "memcached           ok (none)" in capsys.readouterr().out
    assert doctor.main([str(make_exp()), "--set", "common.batch_size=0"]) == 2
    out = capsys.readouterr().out
    assert "config              error: " in out
    assert "1 error(s), 0 warning(s)" in out


def test_the_memory_estimate_is_what_a_real_forward_pass_keeps(make_exp: Callable[..., Path]) -> None:
    """The same count on the CPU, where tensors have bytes: the meta device must not lose or add any."""
    import methods
    from utils import config
    from utils.engine.network import model_arguments

    cfg = config.load(make_exp())
    net = methods.build(**model_arguments(cfg, pretrained=False)).train()
    parameters = {parameter.data_ptr() for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = net(torch.randn(4, 3, 2, 32, 32))
    assert answer is not None
    fixed, clip = experiment.needed(cfg)
    assert fixed == 12 * sum(parameter.numel() for parameter in net.parameters())
    assert clip == pytest.approx(sum(kept.values()) / 4, rel=0.05)
