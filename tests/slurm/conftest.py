"""A SLURM on this machine for the tests: several nodes with pretend GPUs. Without one they skip and say why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import LocalSlurm, NoSlurm


@pytest.fixture(scope="module")  # two workers may run two files: each gives the cluster back when its file is done
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """The running cluster; it is left running if it was there before."""
    try:
        cluster = LocalSlurm(tmp_path_factory.mktemp("slurm"), gpus_per_node=1)
    except NoSlurm as reason:
        pytest.skip(f"no SLURM here: {reason}")
    yield cluster
    cluster.close()
