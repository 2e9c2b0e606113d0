"""Row: damage in every member of part files and in every file of finished results; nothing silent, no trace.

Part files: drawn bits of each member, of its header and of the zip's own tables, cuts and copies; each must be
refused or read with the same arrays. Part files of a stopped evaluation, damaged one member at a time: the resumed
evaluation must end with the result of an undisturbed one. Results: drawn bits of every file, and broken summaries and
lengths, through all verbs that read them.

    python -m tests.benchmarks.reliability.result_damage
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.evaluated import BROKEN, broken, guessed, sealed, write_results
from tests.faults import warm

VERBS = ("score", "compare", "analyze", "report", "dense-sweep", "get_reference_results")
FLIPS = 60  # of each member and each file


def flipped(rng: random.Random, data: bytes, first: int, last: int) -> bytes:
    """One drawn bit of the bytes first..last-1 turned over."""
    changed = bytearray(data)
    changed[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Byte ranges of a zip file: each member's data, each member's header, the tables at the end."""
    ranges, data = {}, path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            start = info.header_offset
            name, extra = (int.from_bytes(data[start + at : start + at + 2], "little") for at in (26, 28))
            body = start + 30 + name + extra
            ranges[f"header of {info.filename}"] = (start, body)
            ranges[info.filename] = (body, body + info.file_size)
        ranges["central directory"] = (archive.start_dir, len(data))
    return ranges


def part_files(rng: random.Random, folder: Path) -> Counter[str]:
    """Damage a part file in all places, and read it."""
    from anal_tools.evaluate import part_file, result_parts

    owner = result_parts.owner_of({"weights": "w"})
    noise = np.random.default_rng(rng.randrange(10**6))
    expected = {
        "samples": np.arange(9),
        "failed": np.array([""] * 8 + ["torn"]),
        "repaired": np.array(["short"] + [""] * 8),
        "logits": noise.normal(size=(8, 3, 20)).astype(np.float32),
        "frames": noise.integers(0, 300, (8, 3, 8)).astype(np.int32),
        "boxes": noise.integers(0, 300, (3, 4)),
    }
    path = folder / "part-0000-0000-000000.npz"
    part_file.write(path, expected, owner)
    whole, counts = path.read_bytes(), Counter()
    mutants = [flipped(rng, whole, *span) for span in places(path).values() for _ in range(FLIPS)]
    mutants += [whole[: rng.randrange(len(whole))] for _ in range(FLIPS)] + [b"", whole + b"x", whole[1:]]
    for data in mutants:
        path.write_bytes(data)
        try:
            read = part_file.read(path, owner)
        except part_file.DamagedPart:
            counts["detected"] += 1
        except Exception:  # noqa: BLE001  what this row counts
            counts["traces"] += 1
        else:
            same = all(np.array_equal(read[name], array) for name, array in expected.items())
            counts["harmless" if same else "silent"] += 1
    return counts


def resumed(rng: random.Random, folder: Path) -> Counter[str]:
    """Stop evaluations, damage one member of a part file, and resume."""
    from tests.benchmarks.reliability import eval_mixing

    world = eval_mixing.World(folder)
    clean, counts = world.experiment("videos"), Counter()
    assert world.score(clean, ()).code == 0
    expected = eval_mixing.rows_of(clean)
    members = ("samples", "failed", "repaired", "logits", "frames", "boxes", "owner", "sha256")
    for damage in (*members, "cut", "empty", "all"):
        exp = world.experiment("videos")
        assert world.score(exp, (), rng.randrange(3, 10)).code == 75
        path = rng.choice(sorted((exp / "results/n").glob("part-*.npz")))
        data = path.read_bytes()
        if damage == "all":
            for other in (exp / "results/n").glob("part-*.npz"):
                other.write_bytes(flipped(rng, other.read_bytes(), *places(other)["logits.npy"]))
        elif damage == "cut":
            path.write_bytes(data[: rng.randrange(1, len(data))])
        else:
            path.write_bytes(b"" if damage == "empty" else flipped(rng, data, *places(path)[f"{damage}.npy"]))
        done = world.score(exp, ())
        equal = done.code == 0 and eval_mixing.rows_of(exp) == expected
        counts["traces"] += done.has_trace
        counts["resumed equal" if equal else "silent"] += 1
        shutil.rmtree(exp)
    return counts


def results(rng: random.Random, folder: Path) -> Counter[str]:
    """Damage finished results, and read them with every verb."""
    from anal_tools.evaluate.results import Results
    from utils.errors import UserError

    counts: Counter[str] = Counter()
    logits = guessed([0, 1, 2, 0, None, 2], 3)
    about = {"labels": [0, 1, 2, 1, 0, 2], "logits": logits, "names": ["a", "b", "c"]}
    good = sealed(write_results(folder / "good", **about))
    expected = json.loads((good / "results/best.json").read_text())
    for path in sorted((good / "results").rglob("*.*")):
        whole = path.read_bytes()
        for _ in range(FLIPS if whole else 0):
            path.write_bytes(flipped(rng, whole, 0, len(whole)))
            try:
                results_read = Results.load(good)
                _ = results_read.frames, results_read.views, results_read.ledger
            except UserError:
                counts["detected"] += 1
            except Exception:  # noqa: BLE001  what this row counts
                counts["traces"] += 1
            else:
                same = path.name == "best.json" and results_read.summary == expected
                counts["harmless" if same else "silent"] += 1
        for verb in VERBS if whole else ():
            path.write_bytes(flipped(rng, whole, len(whole) // 2, len(whole)))
            counts[_verb(verb, good, read_all=path.name in ("frames.npy", "views.json"))] += 1
        path.write_bytes(whole)
    for kind in BROKEN:
        exp = write_results(folder / "broken", **about)
        broken(exp, kind)
        for verb in VERBS:
            counts[_verb(verb, exp)] += 1
        shutil.rmtree(exp)
    return counts


def _verb(verb: str, exp: Path, *, read_all: bool = False) -> str:
    """Run a verb on a damaged result: one sentence and exit code 2, or (`read_all`) it does not read that file."""
    import main

    output = io.StringIO()
    words = [str(exp), str(exp)] if verb == "compare" else [str(exp)]
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
            code = main.main([verb, *words])
    except Exception:  # noqa: BLE001  what this row counts
        return "traces"
    if code == 2 and len(output.getvalue().splitlines()) == 1:
        return "detected"
    return "not read by this verb" if read_all and code == 0 else "silent"


def row() -> dict[str, Any]:
    """Run all; measured has the counts and the seed."""
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(10**6))
    rng, measured = random.Random(seed), dict[str, Any](seed=seed)
    with tempfile.TemporaryDirectory(prefix="zoetrope-damage-") as name:
        warm.warm()
        for what in (resumed, part_files, results):  # forks first: torch computes nothing before
            folder = Path(name) / what.__name__
            folder.mkdir()
            measured[what.__name__] = dict(what(rng, folder))
    wrong = sum(counts.get(key, 0) for counts in measured.values() if isinstance(counts, dict) for key in _WRONG)
    return {"measured": measured, "holds": wrong == 0}


_WRONG = ("silent", "traces")


if __name__ == "__main__":
    print(json.dumps(row()))
