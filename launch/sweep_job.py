"""A sweep on SLURM: its cells as one job array, and what a task of the array does around the cell's own run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import attempts, jobs, slurm, snapshot
from launch import job as slurm_job
from launch.grid import Cell, Sweep
from utils import faults, run_dir
from utils.log import utc_stamp

FLAGS = ("time", "exclude", "constraint", "qos", "account", "nodelist", "dependency")


class CellRun:
    """One task of one cell. It holds paths and words only, because it is pickled.

    Args:
        folder: of the sweep.
        cell: name of the cell.
        run: what a job of its own would do.
    """

    def __init__(self, folder: str, cell: str, run: slurm_job.Run) -> None:
        self.folder, self.cell, self.run = folder, cell, run

    def __call__(self) -> None:
        """Run the cell and note its start and its end; a cell that has ended well is not run again."""
        if self._has_ended_well():
            return
        notes = faults.rank_from_environment() == 0
        job = slurm_job.job_id(os.environ)
        if notes:
            attempts.note(
                Path(self.folder), self.cell, "start", job=job, restart=os.environ.get("SLURM_RESTART_COUNT", "0")
            )
        code = 1
        try:
            self.run()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
            raise
        finally:
            if notes:
                attempts.note(Path(self.folder), self.cell, "end", job=job, code=code)

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """What submitit's own handler asks for in the moment before ours: the same task again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _has_ended_well(self) -> bool:
        """True if this very job has done the cell (SLURM was told to start it again by hand)."""
        rows = attempts.read(Path(self.folder))
        job = slurm_job.job_id(os.environ)
        return any((row.get("cell"), row.get("job"), row.get("code")) == (self.cell, job, 0) for row in rows)


def submit(
    wanted: Sweep, cells: Sequence[Cell], partition: str, ranks: int, parallel: int, flags: Mapping[str, Any]
) -> int:
    """Submit the cells as one array with at most `parallel` at a time; notes each cell's job."""
    given = {name: flags.get(name) for name in FLAGS}
    request = slurm.request(wanted.verb, wanted.folder, partition, ranks, [], given)
    code = snapshot.take(wanted.folder / "jobs" / "code")
    restarts, stalled = request.settings.max_restarts, request.settings.max_stalled
    runs = []
    for cell in cells:
        exp = str(wanted.exp_of(cell))
        run = slurm_job.Run(exp, wanted.words(cell), max_restarts=restarts, max_stalled=stalled)
        runs.append(CellRun(str(wanted.folder), cell.name, run))
    ids = slurm.submit_array(request, str(code), runs, parallel)
    for cell, job in zip(cells, ids, strict=True):
        attempts.note(wanted.folder, cell.name, "submit", job=job)
        row = {"job": job, "verb": wanted.verb, "partition": partition, "ranks": ranks, "nodes": request.nodes}
        row |= {"time": utc_stamp(), "revision": run_dir.revision(code), "code": str(code), "sweep": wanted.name}
        jobs.record(wanted.exp_of(cell), row | {"words": wanted.words(cell)})
    first = ids[0].partition("_")[0]
    print(
        f"submitted {len(ids)} cells to {partition} as job {first}, {min(parallel, len(ids))} at a time; their output:"
    )
    print(f"  {wanted.folder / 'jobs' / slurm.OUTPUT}; `launch collect {wanted.name}` makes the table")
    return 0
