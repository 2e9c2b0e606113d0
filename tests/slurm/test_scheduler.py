"""The conformance test of schedulers on a real SLURM of several nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.conformance import (  # noqa: F401
    Case,
    test_a_cancelled_job_can_save_and_is_dead,
    test_a_requeued_job_keeps_its_id_and_counts_its_starts,
    test_ranks_meet_and_know_their_job,
    test_several_jobs_of_one_submission_are_jobs_of_their_own,
    test_the_lock_asks_who_lives,
)
from tests.slurm.cluster import PARTITION, ROOT, LocalSlurm
from utils import schedulers

pytestmark = [pytest.mark.slurm, pytest.mark.nightly]


@pytest.fixture
def case(slurm: LocalSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    for name in ("SLURM_CONF", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, slurm.env[name])
    new_case = Case(schedulers.named("slurm"), PARTITION, ROOT, tmp_path / "work", nodes=2, seconds=120)
    yield new_case
    new_case.close()
