"""The acceptance table of issue 05, data. `make accept ISSUE=05 [ROWS=a,b]` prints one JSON line a row.

Rows beside MMAction2 take the videos of `peers data` from $ZOETROPE_BENCH, or make them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from rows import Row, run_rows, workspace  # noqa: E402


def measured_by(module: str, function: str) -> Row:
    """The row `function(work)` of a module of measurements, imported when it is asked for."""
    return lambda: getattr(importlib.import_module(module), function)(workspace())


ROWS = {
    "conformance": (
        "one plan through every reader on real files and lossless or VP9 copies",
        "same frames by ordinal (barcodes exact); bit-equal, dali within its stated tolerance",
        measured_by("checks05", "conformance"),
    ),
    "jpeg": (
        "TSN-8 / 32x2 from JPEG 340x256 / mmaction2 turbojpeg; CPU of memcached and shards / decoding alone",
        ">= 1.1x / >= 1.25x; <= 1.10x and <= 1.08x",
        measured_by("checks05", "jpeg"),
    ),
    "mp4": (
        "TSN-8 / 32x2 from long-GOP mp4 / mmaction2 decord",
        ">= 1.3x / >= 1.2x",
        measured_by("checks05", "mp4"),
    ),
    "clips": (
        "TSN-8 / 32x2 from clips / mmaction2 decord on the originals",
        ">= 5.5x / >= 2.7x, size <= 1.5x",
        measured_by("checks05", "clips"),
    ),
    "dump": ("dump speed / ffmpeg, same work, same cores", ">= 0.9x", measured_by("checks05_dump", "dump")),
    "dump_kill": (
        "kill -9 of a dump at 20 moments",
        "no partial result visible; a restart redoes 0 finished videos",
        measured_by("checks05_dump", "dump_kill"),
    ),
    "chaos": (
        "memcached: kill -9, SIGSTOP, restart, all dead, corrupted values, fork and spawn in the middle",
        ">= 100,000 frames, 0 wrong, 0 missing; p99.9 <= timeout + 50 ms, worst <= timeout + 250 ms; all dead <= 1.1x",
        measured_by("checks05_memcached", "chaos"),
    ),
    "epoch2": (
        "second epoch with cache/data-set ratio c under -M",
        "hit rate >= 0.97 c",
        measured_by("checks05_memcached", "epoch2"),
    ),
    "memory": (
        "resident memory over 10^4 small clips, every reader; a list of 1,000,000 records",
        "flat (slope test); <= 150 MB per node with its reader processes",
        measured_by("checks05_memory", "memory"),
    ),
    "odd": (
        "the 58 odd files through every reader and scan",
        "no hang, no crash, no silent wrong frame; each decoded, or named with a reason",
        measured_by("checks05_scan", "odd"),
    ),
    "gpu": (
        "dali mixed, H.264 340x256, on a GPU",
        "frames exact; goal >= 0.8 of the decode limit, data wait <= 3 % of a step",
        measured_by("checks05_dali", "gpu"),
    ),
}

if __name__ == "__main__":
    sys.exit(run_rows(ROWS, "05"))
