"""A real Slurm cluster of two nodes on this machine, and the submission of jobs."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import Cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start two nodes that claim more CPUs and memory than the machine has, so that jobs do not wait."""
    folder = tmp_path_factory.mktemp("slurm")
    command = [sys.executable, str(ROOT / "tools/cluster/local_slurm.py")]
    started = subprocess.run(
        [*command, "start", str(folder), "--nodes", "2", "--cpus", "8", "--memory-mb", "16000"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    yield Cluster(folder / "slurm.conf")
    subprocess.run([*command, "stop", str(folder)], check=True)


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path, toy_model: Callable[..., Path]) -> Callable[..., "object"]:
    """Return a function that submits a script of slurm/ with a toy recipe, from a folder like the repository."""
    from tests.slurm.jobs import Site

    return Site(cluster, tmp_path, toy_model("qwen2")).submit


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
