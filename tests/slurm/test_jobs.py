"""The job scripts on a real Slurm: two nodes, interruption, failure, and what is left afterwards."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.slurm.jobs import Job

Submit = Callable[..., Job]
LAYOUT = ("parallel.tensor_parallel_size=2",)
STEPS = ("run.num_steps=12", "checkpoint.every=2", "reward.functions=[{name: 'tests.own_rewards:slow_digit_share'}]")
FOUR_RANKS = ("--ntasks-per-node=2",)


@pytest.fixture
def whole(submit: Submit) -> Job:
    """The run that nobody disturbs."""
    job = submit("grpo_7b.sh", *LAYOUT, *STEPS, options=FOUR_RANKS, name="whole")
    job.finish()
    return job


def test_a_run_over_two_nodes_and_its_interruptions(submit: Submit, whole: Job) -> None:
    """Tensor parallel inside a node, data parallel across; requeued, told that time is up, and hit by a dead rank."""
    assert [row["step"] for row in whole.rows()] == list(range(13))
    assert "TP2 x PP1 x DP2" in whole.output
    assert (whole.run / "checkpoints/step_000012").exists()
    for name, disturb in DISTURBANCES.items():
        job = submit("grpo_7b.sh", *LAYOUT, *STEPS, options=FOUR_RANKS, name=name)
        job.reach(5)
        disturb(job)
        job.finish()
        assert job.untimed() == whole.untimed(), name
        assert "resumed from step_00000" in job.output
        assert ("interrupted; job" in job.output) == (name in ("usr1", "shells")), job.output
        assert ("starting again from checkpoint 'step_" in job.output) == (name in ("killed", "step")), job.output


def test_a_cancelled_job_stays_cancelled(submit: Submit) -> None:
    job = submit("grpo_7b.sh", *STEPS, options=("--ntasks-per-node=1",), name="cancelled")
    job.reach(2)
    job.cluster.run("scancel", job.number)
    job.finish("CANCELLED")
    time.sleep(5)
    assert job.cluster.state(job.number) == "CANCELLED"
    assert "goes back to the queue" not in job.output


def usr1_to_the_shells_alone(job: Job) -> None:
    """As sites do whose Slurm signals nothing but a task's first process."""
    for pid in job.shells():
        os.kill(pid, signal.SIGUSR1)


def requeue(job: Job) -> None:
    job.cluster.run("scontrol", "requeue", job.number)


def usr1(job: Job) -> None:
    """As --signal=B:USR1@… does it."""
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)


def kill_a_rank(job: Job) -> None:
    pids = job.pids()
    assert len(pids) == 4
    os.kill(pids[-1], signal.SIGKILL)


def cancel_the_step(job: Job) -> None:
    job.cluster.run("scancel", f"{job.number}.0")


DISTURBANCES: dict[str, Callable[[Job], None]] = {
    "usr1": usr1,
    "shells": usr1_to_the_shells_alone,
    "killed": kill_a_rank,
    "step": cancel_the_step,
    "requeued": requeue,
}


def test_one_rank_on_each_node_and_weights_for_others(submit: Submit) -> None:
    job = submit("grpo_7b.sh", "checkpoint.save_hf=true", options=("--ntasks-per-node=1",))
    job.finish()
    assert "TP1 x PP1 x DP2" in job.output
    last = max((job.run / "checkpoints").glob("step_*"))
    assert AutoModelForCausalLM.from_pretrained(last / "hf").num_parameters() > 0


def test_a_run_that_cannot_start_gives_up(submit: Submit) -> None:
    job = submit(
        "grpo_7b.sh", "model.path=nowhere", options=("--ntasks-per-node=1", "--export=ALL,MEGATRON_RL_MAX_RESTARTS=1")
    )
    job.finish("FAILED")
    assert job.output.count("starting again from checkpoint 'none'") == 1
    assert "giving up" in job.output
    assert "nowhere" in job.output


def test_logs_of_all_ranks_are_kept(submit: Submit, tmp_path: Path) -> None:
    job = submit("grpo_7b.sh", "run.num_steps=1", options=FOUR_RANKS, name="logs")
    job.finish()
    found = sorted(path.name for path in (tmp_path / f"logs/slurm/logs-{job.number}").iterdir())
    assert found == [f"rank_{rank}.log" for rank in range(4)]
