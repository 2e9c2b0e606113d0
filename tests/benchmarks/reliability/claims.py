"""What the rows of this folder claim; `python -m tests.benchmarks.reliability.NAME` measures one."""

from __future__ import annotations

# name of the file: (claim, figure); its function row() measures it
CLAIMS: dict[str, tuple[str, str]] = {
    "soak_ranks": (
        "stop, kill -9 of any process, preemption with 3, 4 and 6 ranks, drawn settings, >= 10 hits in each phase",
        ">= 60 hits; weights, momentum, BN buffers, EMA, best checkpoint and loss curve equal in every case",
    ),
    "slurm_events": ("the same on SLURM, 2 nodes x 2 tasks, >= 10 events, >= 3 of them a killed slurmd", "equal"),
    "partition": (
        "packets between two nodes dropped, in a network namespace of its own",
        "all ranks end within the collective timeout with a sentence",
    ),
    "reduction_price": (
        "TSM ResNet-50, 8 x 64 x 64, one clip and one thread a rank, 2 and 4 ranks, >= 20 pairs against plain DDP",
        "median CPU seconds <= 1.03x, bytes <= 1.00x",
    ),
    "checkpoint_mutants": (
        "1,000 bit flips and 200 truncations through eval, predict, export, pretrained, teacher; 20 each by command",
        "each detected, or harmless by comparison of tensors; 0 silent",
    ),
    "eval_mixing": ("stopped, then continued with other kwargs, root, reader, template, code", "0 mixed rows"),
    "result_damage": ("every member of part files and results damaged", "0 silent, 0 traces"),
    "ut_interaction": (
        "UT-Interaction set 2 through scan, dump (three forms), train, eval, predict",
        "60 of 60 read; frame counts equal to a full decode; no 'bad' line",
    ),
    "containers": (
        ">= 12 container x codec kinds, 10 files each, odd lengths, B-frames, packed and placeholder packets",
        "counts and frames equal to a full decode; at most 2 kinds refused, named in the docs",
    ),
    "nth_call": (
        "the n-th write, fsync, rename, link, open, mkdir fails in train, eval, dump, scan; >= 100 in train, >= 300",
        "100 % end in a right state with one sentence, or go on; resumed results equal",
    ),
    "fuzz": (
        ">= 20,000 mutants of valid inputs for each of six targets, >= 30 % past the first stage, >= 80 % of lines",
        "0 traces, 0 hangs > 10 s, 0 memory > 1 GiB, nothing executed",
    ),
    "fencing": (
        "writer frozen at 6 points of a save, lock aged, successor finished, writer thawed",
        "newest state found and kept, writer exits non-zero; 20 of 20",
    ),
    "orphans": ("SIGKILL of launcher, torchrun, srun step, each rank", "no process alive after 10 s, 20 of 20"),
    "loop_overhead": (
        "the loop beside a bare one, >= 20 alternating pairs",
        "median <= 1.01x, upper end of the 95 % interval <= 1.03x",
    ),
    "folder_rights": ("umask, set-gid, read-only, two users of one group", "works, or one sentence and exit code 2"),
    "config_extremes": ("extreme values of every number of the config", "each refused with a sentence that says why"),
    "memcached_forgery": ("frames forged on a server, answers without end", "0 accepted; bounded memory"),
}
