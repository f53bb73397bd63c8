"""The job scripts by themselves: their shell, and what Slurm says to them on nodes as large as they ask for."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import Cluster

ROOT = Path(__file__).parents[2]
SHELL = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "tools").glob("*.sh"), ROOT / ".ci/run"])
JOBS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if "\n#SBATCH" in path.read_text())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Eight nodes that claim to have eight GPUs each."""
    folder = tmp_path_factory.mktemp("large")
    command = [sys.executable, str(ROOT / "tools/local_slurm.py")]
    size = ["--nodes", "8", "--cpus", "96", "--memory-mb", "1000000", "--gpus", "8"]
    started = subprocess.run([*command, "start", str(folder), *size], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    yield Cluster(folder / "slurm.conf")
    subprocess.run([*command, "stop", str(folder)], check=True)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_is_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_scripts_are_there() -> None:
    wanted = ("convert", "eval", "grpo_30b_a3b", "grpo_32b", "grpo_70b", "grpo_7b", "ppo_7b", "sft")
    assert [path.stem for path in JOBS] == list(wanted)
    for script in JOBS:
        assert os.access(script, os.X_OK), script


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_slurm_accepts_every_script(script: Path, large: Cluster) -> None:
    large.run("sbatch", "--test-only", f"slurm/{script.name}", "hf_to_megatron")


def test_slurm_refuses_more_nodes_than_there_are(large: Cluster) -> None:
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        large.run("sbatch", "--test-only", "--nodes=9", "slurm/grpo_70b.sh")


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_dry_runs_say_what_would_be_submitted(script: Path) -> None:
    environment = {**os.environ, "SBATCH_PARTITION": "gpu", "MEGATRON_RL_RUNTIME": "apptainer"}
    done = subprocess.run(
        [str(script), "--dry-run", "algorithm.kl_coef=0.001"],
        cwd="/", capture_output=True, text=True, check=False, env={**environment, "MEGATRON_RL_IMAGE": "image.sif"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"sbatch slurm/{script.name} 'algorithm.kl_coef=0.001'\n")
    assert "SBATCH_PARTITION=gpu" in done.stdout
    assert "--time=" in done.stdout
    assert "apptainer exec --nv" in done.stdout
