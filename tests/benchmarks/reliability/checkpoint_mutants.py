"""Row `checkpoint_mutants`: bit flips and truncations of a real checkpoint through every verb that reads weights."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
RUN = ["common.ema=0.5", "common.precise_bn.batches=2", "common.lr_scheduler.max_iter=4", "common.val_freq=2"]
RUN += ["common.shards=2"]  # two groups of batch norm, whose statistics the checkpoint keeps
ENTRIES = ("resume", "eval", "predict", "export", "pretrained", "pretrained EXP", "teacher", "teacher EXP")
VERBS = ("eval", "predict", "export", "pretrained", "teacher")


def trained(folder: Path) -> tuple[Path, Path]:
    """Train a tiny run with moving average, precise batch norm and two BN groups; return (experiment, videos)."""
    import main
    from datasets.demo import verb as demo
    from tests import experiment
    from utils import checkpoint

    data, exp = folder / "data", folder / "exp"
    with contextlib.redirect_stdout(io.StringIO()):
        assert demo.main(["--out", str(data), "--train", "16", "--val", "8", "--workers", "1"]) == 0
        experiment.make(exp, data, backbone="mobilenetv2", sync_stats=False, print_freq=1)
        assert main.train(exp, overrides=RUN) == 0
    state = checkpoint.load(exp / checkpoint.BEST)
    assert state["ema"]
    assert state["precise_bn"]
    assert state["group_statistics"] is not None
    return exp, data


def mutants(data: bytes, flips: int, cuts: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield (description, bytes): each flip in a region drawn first, so that the few bytes of headers are hit too."""
    regions = regions_of(data)
    for number in range(flips):
        name = rng.choice(sorted(regions)) if number % 4 else "anywhere"
        begin, end = (0, len(data)) if name == "anywhere" else rng.choice(regions[name])
        place, bit = rng.randrange(begin, end), rng.randrange(8)
        yield f"bit {bit} at {place} ({name})", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    for number in range(cuts):
        near = number % 4 == 3
        length = len(data) - rng.randrange(1, 120) if near else rng.randrange(len(data))
        yield f"cut to {length}", data[:length]


def regions_of(data: bytes) -> dict[str, list[tuple[int, int]]]:
    """Return (begin, end) of the parts of a checkpoint: pickle, storages, headers, directory."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    parts: dict[str, list[tuple[int, int]]] = {"directory": [(archive.start_dir, len(data))]}
    at = 0
    for info in archive.infolist():
        begin = (
            info.header_offset
            + 30
            + sum(int.from_bytes(data[info.header_offset + k : info.header_offset + k + 2], "little") for k in (26, 28))
        )
        parts.setdefault("headers", []).append((at, begin))
        at = begin + info.compress_size
        name = "pickle" if info.filename.endswith("data.pkl") else "storages" if "/data/" in info.filename else "notes"
        parts.setdefault(name, []).append((begin, at))
    parts["storages"] = [part for part in parts["storages"] if part[1] > part[0]]
    return parts


def readers(exp: Path, work: Path) -> dict[str, Callable[[Path], Any]]:
    """Return, by name, the functions through which the verbs read weights; each returns all that it took from them."""
    import methods
    from anal_tools.evaluate.network import build_for_evaluation, read_steady
    from anal_tools.predict import predictor
    from methods import interop
    from utils import checkpoint, config
    from utils.dist import World
    from utils.engine import distill
    from utils.engine.network import model_arguments

    cfg = config.load(exp, RUN)
    arguments = model_arguments(cfg, pretrained=False)
    folder = work / "folder"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(exp / "config.yaml", folder / "config.yaml")

    def in_folder(file: Path) -> Path:
        with contextlib.suppress(FileNotFoundError):
            (folder / checkpoint.BEST).unlink()
        os.link(file, folder / checkpoint.BEST)
        return folder

    def evaluated(file: Path) -> Any:
        state, _ = read_steady(
            file, functools.partial(interop.load_checkpoint, build=lambda: methods.build(**arguments)), World()
        )
        net = build_for_evaluation(cfg, state, file, World())
        return net.state_dict(), checkpoint.evaluated_weights(state), state

    def predicted(target: Path, name: str | None) -> Any:
        loaded = predictor.from_experiment(target, name, [], World(), as_is=True)
        return loaded.net.state_dict(), loaded.classes, repr(loaded.spec)

    def pretrained(file: Path) -> Any:
        return methods.build(**{**arguments, "pretrained": str(file)}).state_dict()

    def teacher(file: Path) -> Any:
        source = distill.find(file, cfg)
        if source.state is None:  # the verb then builds the student's network from the file
            return pretrained(file)
        return checkpoint.evaluated_weights(source.state), config.to_dict(source.cfg)

    return {
        "resume": checkpoint.load,
        "eval": evaluated,
        "predict": lambda file: predicted(file, None),
        "export": lambda file: predicted(exp, str(file)),
        "pretrained": pretrained,
        "pretrained EXP": lambda file: pretrained(in_folder(file)),
        "teacher": teacher,
        "teacher EXP": lambda file: teacher(in_folder(file)),
    }


def same(one: Any, other: Any) -> bool:
    """Return True for values that are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        keys = isinstance(other, Mapping) and list(one) == list(other)
        return keys and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def judged(read: Callable[[Path], Any], file: Path, reference: Any) -> str:
    """Return "detected", "harmless", "silent", or the trace's last line."""
    from utils.errors import UserError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            value = read(file)
    except UserError as error:
        return "detected" if str(file.name) in str(error) or "ckpt_best" in str(error) else f"unnamed: {error}"
    except Exception as error:  # noqa: BLE001  any other error is what this looks for
        return f"trace: {type(error).__name__}: {error}"
    return "harmless" if same(value, reference) else "silent"


def words_of(verb: str, exp: Path, file: Path, work: Path) -> list[str]:
    """Return the command line of a verb that reads this weights file."""
    run = [word for override in RUN for word in ("--set", override)]
    if verb == "eval":
        return ["eval", str(exp), "--checkpoint", str(file), "--name", "mutant", *run]
    if verb == "predict":
        return ["predict", str(file), str(next((exp.parent / "data").rglob("*.mp4")))]
    if verb == "export":
        return ["export", str(file), "--to", "torch", "--out", str(work / "out.pt2")]
    new = work / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    shutil.copyfile(exp / "config.yaml", new / "config.yaml")
    key = "common.model.pretrained" if verb == "pretrained" else "common.distill.teacher"
    return ["train", str(new), "--set", f"{key}={file}", *run, "--set", "common.lr_scheduler.max_iter=3"]


def commanded(verb: str, exp: Path, file: Path, work: Path) -> str:
    """Return "detected" for exit code 2 and one sentence that names the file, "accepted" for 0, else what came."""
    done = subprocess.run(
        [sys.executable, "main.py", *words_of(verb, exp, file, work)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return "accepted"
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    clean = len(sentences) == 1 and file.name in sentences[0] and "Traceback" not in done.stderr
    return "detected" if done.returncode == 2 and clean else f"code {done.returncode}: {done.stderr[-300:]}"


def row(flips: int = 1000, cuts: int = 200, commands: int = 20) -> dict[str, Any]:
    """Read each mutant through each entry function, and `commands` of them through the command line of each verb."""
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(1 << 31))
    rng = random.Random(seed)
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="zoetrope-mutants-"))
    try:
        exp, _ = trained(work)
        good = exp / "ckpt_best.pth.tar"
        counts, odd = _in_process(good, exp, work, mutants(good.read_bytes(), flips, cuts, rng))
        lines, wrong = _on_command_line(good, exp, work, commands, rng)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    measured = {"seed": seed, "mutants": flips + cuts, "entries": counts, "command line": lines}
    return {"measured": measured | {"odd": [*odd, *wrong][:20]}, "holds": not odd and not wrong}


def _in_process(
    good: Path, exp: Path, work: Path, every: Iterator[tuple[str, bytes]]
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return the verdicts by entry function, and those that are wrong."""
    functions = readers(exp, work)
    reference = {}
    for name, read in functions.items():
        with contextlib.redirect_stdout(io.StringIO()):
            reference[name] = read(good)
    verdicts: dict[str, Counter[str]] = {name: Counter() for name in functions}
    odd = []
    file = work / "mutant.pth.tar"
    for what, data in every:
        file.unlink(missing_ok=True)  # a new file: links to the one before keep its bytes
        file.write_bytes(data)
        for name, read in functions.items():
            verdict = judged(read, file, reference[name])
            verdicts[name][verdict.partition(":")[0]] += 1
            if verdict not in ("detected", "harmless"):
                odd.append(f"{name}: {what}: {verdict[:300]}")
    return {name: dict(counted) for name, counted in verdicts.items()}, odd


def _on_command_line(
    good: Path, exp: Path, work: Path, commands: int, rng: random.Random
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return the verdicts by verb, and those that are wrong: a mutant is accepted if and only if it reads the same."""
    from utils import checkpoint

    reference, file = checkpoint.load(good), work / "mutant.pth.tar"
    verdicts: dict[str, Counter[str]] = {verb: Counter() for verb in VERBS}
    odd = []
    for verb in VERBS:
        for what, data in mutants(good.read_bytes(), commands // 2, commands - commands // 2, rng):
            file.unlink(missing_ok=True)
            file.write_bytes(data)
            expected = {"harmless": "accepted"}.get(judged(checkpoint.load, file, reference), "detected")
            verdict = commanded(verb, exp, file, work)
            verdicts[verb][re.sub(":.*", "", verdict, flags=re.DOTALL)] += 1
            if verdict != expected:
                odd.append(f"{verb}: {what}: {verdict}, not {expected}")
    return {verb: dict(counted) for verb, counted in verdicts.items()}, odd


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]  # flips, cuts, commands: fewer while developing
    print(json.dumps(row(*numbers)))
