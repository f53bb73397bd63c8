"""The job scripts without running jobs: their shell functions, and Slurm's check of the resources they request."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import Cluster

ROOT = Path(__file__).parents[2]
SHELL = sorted([*(ROOT / "slurm").glob("*.sh"), *(ROOT / "tools").rglob("*.sh"), ROOT / ".ci/run"])
JOBS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if "\n#SBATCH" in path.read_text())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start eight nodes that claim to have eight GPUs each."""
    folder = tmp_path_factory.mktemp("large")
    command = [sys.executable, str(ROOT / "tools/cluster/local_slurm.py")]
    size = ["--nodes", "8", "--cpus", "96", "--memory-mb", "1000000", "--gpus", "8"]
    started = subprocess.run([*command, "start", str(folder), *size], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    yield Cluster(folder / "slurm.conf")
    subprocess.run([*command, "stop", str(folder)], check=True)


def shell(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the functions of the job scripts; programs in ``folder`` replace those of Slurm."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    begins = f"source {ROOT}/slurm/common.sh; CONTROLLER_RETRY_S=0; requeued={folder}/requeued_at; "
    return subprocess.run(
        ["bash", "-c", begins + text], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


def fake_program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


BUSY = "n=$(cat {count} 2>/dev/null || echo 0); echo $((n + 1)) >{count}; ((n < 3)) && exit 1; echo {output}"


def test_queries_to_a_busy_controller_are_repeated(tmp_path: Path) -> None:
    for state, status in (("RUNNING", 0), ("CANCELLED", 1)):
        fake_program(tmp_path, "squeue", BUSY.format(count=tmp_path / state, output=state))
        assert shell(tmp_path, "is_running").returncode == status
        assert (tmp_path / state).read_text() == "4\n"
    fake_program(tmp_path, "squeue", "exit 1")
    assert shell(tmp_path, "is_running").returncode == 0  # without an answer the job counts as running
    fake_program(tmp_path, "squeue", "echo RUNNING")
    fake_program(tmp_path, "scontrol", BUSY.format(count=tmp_path / "requeue", output="$@"))
    done = shell(tmp_path, "requeue step_000004")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "requeue 7")


def test_a_job_without_progress_is_not_requeued_forever(tmp_path: Path) -> None:
    fake_program(tmp_path, "squeue", "echo RUNNING")
    fake_program(tmp_path, "scontrol", "exit 0")
    for _ in range(3):
        assert shell(tmp_path, "requeue step_000004").returncode == 0
    assert shell(tmp_path, "requeue step_000005").returncode == 0
    for _ in range(3):
        assert shell(tmp_path, "requeue step_000004").returncode == 0
    last = shell(tmp_path, "requeue step_000004")
    assert last.returncode == 1
    assert "interrupted 4 times at 'step_000004': giving up" in last.stderr
    (tmp_path / "requeued_at").unlink()
    (tmp_path / "requeued_at").mkdir()  # the file cannot be written
    assert shell(tmp_path, "requeue step_000004").returncode == 0


def test_an_unknown_end_of_the_job_is_empty(tmp_path: Path) -> None:
    for program, end in (("exit 1", ""), ("echo N/A", ""), ("echo 2026-11-22T00:00:10", "10")):
        fake_program(tmp_path, "squeue", program)
        done = shell(tmp_path, "set_environment; echo $SLURM_JOB_END_TIME")
        assert done.returncode == 0
        assert done.stdout.strip()[-2:] == end


@pytest.mark.parametrize(
    ("arguments", "restarts", "latest", "expected"),
    [
        ("--resume auto", 1, "new", "--resume auto"),
        ("--resume elsewhere", 0, "old", ""),
        ("--resume elsewhere", 1, "old", ""),  # the checkpoint is older than the job
        ("--resume elsewhere", 1, "new", "--resume auto"),
        ("--resume never", 0, "", ""),
        ("--resume never", 1, "", "--resume auto"),
        ("--resume=never", 1, "", "--resume auto"),
    ],
)
def test_a_restarted_job_resumes_from_its_own_checkpoint(
    arguments: str, restarts: int, latest: str, expected: str, tmp_path: Path
) -> None:
    fake_program(tmp_path, "squeue", "exit 1")
    age = {"": "true", "old": "touch -d 2000-01-01", "new": "touch -d 2100-01-01"}
    done = shell(
        tmp_path,
        f"mkdir -p out/checkpoints; {age[latest]} out/checkpoints/latest; "
        f"export SLURM_JOB_NAME=name SLURM_RESTART_COUNT={restarts}; "
        "run_doctor() { :; }; run_until_done() { extra_arguments; }; "
        f"train config.yaml run.output_dir=out {arguments}",
    )
    assert (done.returncode, done.stdout.split()) == (0, expected.split()), done.stderr


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_job_scripts_exist() -> None:
    expected = ("convert", "eval", "grpo_30b_a3b", "grpo_32b", "grpo_70b", "grpo_7b", "ppo_7b", "sft")
    assert [path.stem for path in JOBS] == list(expected)
    for script in JOBS:
        assert os.access(script, os.X_OK), script


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_slurm_accepts_every_script(script: Path, large: Cluster) -> None:
    large.run("sbatch", "--test-only", f"slurm/{script.name}", "hf_to_megatron")


def test_slurm_rejects_more_nodes_than_exist(large: Cluster) -> None:
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        large.run("sbatch", "--test-only", "--nodes=9", "slurm/grpo_70b.sh")


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_dry_runs_print_the_submission(script: Path) -> None:
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
