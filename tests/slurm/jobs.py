"""Submission of jobs, and waits for their progress."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.limits import LIMIT_S
from tests.toys import TIMED, complete_rows, without, write_config

ROOT = Path(__file__).parents[2]
# instead of the resources that the scripts request: the machine has no GPUs and all nodes share it
SMALL = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=2000", "--oversubscribe", "--time=30")


def wait_for(what: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {LIMIT_S} s"
        time.sleep(0.05)


@dataclass(frozen=True)
class Cluster:
    """A cluster, and commands to it."""

    config: Path

    def run(self, *command: str, cwd: Path = ROOT, **environment: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=cwd, check=False,
            env={**os.environ, "SLURM_CONF": str(self.config), **environment},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """State of a job; empty if the controller is busy and does not answer."""
        try:
            fields = self.run("scontrol", "show", "job", job, "--oneliner").split()
        except AssertionError:
            return ""
        return next(field.removeprefix("JobState=") for field in fields if field.startswith("JobState="))


@dataclass(frozen=True)
class Job:
    """A submitted job of ``train``."""

    cluster: Cluster
    number: str
    name: str
    folder: Path
    """Folder from which it was submitted."""
    output_dir: Path | None = None
    """Folder of the run; None: the default of the scripts."""

    @property
    def run(self) -> Path:
        return self.output_dir or self.folder / "runs" / f"{self.name}-{self.number}"

    @property
    def output(self) -> str:
        path = self.folder / "logs/slurm" / f"{self.name}-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def rows(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        return complete_rows(path) if path.exists() else []

    def untimed(self) -> list[dict[str, Any]]:
        """Return the metrics that two equal runs share bit for bit."""
        return without(TIMED, self.rows())

    def reach(self, step: int) -> None:
        wait_for(f"step {step}", lambda: any(row["step"] >= step for row in self.rows()))

    def finish(self, state: str = "COMPLETED") -> None:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        state_now = ""

        def is_over() -> bool:
            nonlocal state_now
            state_now = self.cluster.state(self.number)
            return state_now in ended

        wait_for(f"the end of job {self.number}", is_over)
        assert state_now == state, self.output[-3000:]

    def pids(self) -> list[int]:
        """Process ids of its ranks, which all run on this machine."""
        return self._processes(b"megatron_rl.train", b"--config", without=b"rank.sh")

    def shells(self) -> list[int]:
        """Process ids of the shells that start the ranks, the first process of each task."""
        pids = self._processes(b"slurm/rank.sh", b"bash")
        parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids}
        return [pid for pid, parent in parents.items() if parent not in pids]

    def _processes(self, *words: bytes, without: bytes = b"\n") -> list[int]:
        pids = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_bytes().split(b"\0")
                command = path.with_name("cmdline").read_bytes()
            except OSError:
                continue
            is_task = f"SLURM_JOB_ID={self.number}".encode() in variables and any(
                variable.startswith(b"SLURM_PROCID=") for variable in variables
            )
            if is_task and all(word in command for word in words) and without not in command:
                pids.append(int(path.parent.name))
        return sorted(pids)


@dataclass(frozen=True)
class Site:
    """A folder from which jobs are submitted, with the scripts and a toy recipe."""

    cluster: Cluster
    folder: Path
    model: Path

    def submit(
        self,
        script: str,
        *arguments: str,
        options: Sequence[str] = (),
        name: str = "toy",
        output_dir: Path | None = None,
        **environment: str,
    ) -> Job:
        """Submit a script with arguments; training jobs read the toy recipe, and the doctor is skipped."""
        if not (self.folder / "slurm").exists():
            for part in ("slurm", "tests", "tools"):
                (self.folder / part).symlink_to(ROOT / part)
            (self.folder / "logs/slurm").mkdir(parents=True)  # as in a clone
        recipe = write_config(self.folder, self.model)
        output = (f"run.output_dir={output_dir}",) if output_dir is not None else ()
        variables = {
            "MEGATRON_RL_CONFIG": str(recipe),
            "MEGATRON_RL_DOCTOR": "skip",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **environment,
        }
        command = ("sbatch", "--parsable", *SMALL, f"--job-name={name}", *options, f"slurm/{script}")
        job_id = self.cluster.run(*command, *arguments, *output, cwd=self.folder, **variables)
        return Job(self.cluster, job_id.strip(), name, self.folder, output_dir)
