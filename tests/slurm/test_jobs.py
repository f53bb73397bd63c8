"""The job scripts on a real Slurm cluster of two nodes: interruptions, failures, and the files that remain."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.slurm.jobs import Job, wait_for

Submit = Callable[..., Job]
LAYOUT = ("parallel.tensor_parallel_size=2",)
STEPS = (
    "metrics.console=plain",
    "run.num_steps=8",
    "checkpoint.every=2",
    "reward.functions=[{name: 'tests.own_rewards:slow_digit_share'}]",
)
# responses so long that generation takes most of a step
LONG = (
    "rollout.max_new_tokens=3000",
    "rollout.temperature=0.2",
    "validation.max_new_tokens=8",
    "run.num_steps=3",
    "checkpoint.every=1",
)
FOUR_RANKS = ("--ntasks-per-node=2",)
AT_A_TIME = 3


@pytest.fixture
def undisturbed(submit: Submit) -> Job:
    """Run an undisturbed job and return it."""
    job = submit("grpo_7b.sh", *LAYOUT, *STEPS, options=FOUR_RANKS, name="whole", MEGATRON_RL_DOCTOR="")
    job.finish()
    return job


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that holds a few checkpoints."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_disturbed_runs_over_two_nodes_log_the_metrics_of_an_undisturbed_run(
    submit: Submit, undisturbed: Job, small_disk: Path
) -> None:
    """Tensor parallel inside a node, data parallel across nodes; no kind of disturbance changes the metrics."""
    assert [row["step"] for row in undisturbed.rows()] == list(range(9))
    assert "TP2 x PP1 x DP2" in undisturbed.output
    assert "all-reduce over 4 ranks" in undisturbed.output  # the doctor ran first
    assert (undisturbed.run / "checkpoints/step_000008").exists()
    names_of_all = list(DISTURBANCES)
    for start in range(0, len(names_of_all), AT_A_TIME):
        names = names_of_all[start : start + AT_A_TIME]
        jobs = {name: begin(submit, name, small_disk) for name in names}
        with ThreadPoolExecutor() as pool:  # in parallel, or a job could end while another one is disturbed
            list(pool.map(disturb, jobs.items()))
        for name, job in jobs.items():
            job.finish()
            assert job.untimed() == undisturbed.untimed(), name
            assert "resumed from step_00000" in job.output, name
            assert ("interrupted; job" in job.output) == (name in ("usr1", "shells")), job.output
            failed = name in ("killed", "step", "truncated", "full")
            assert ("starting again from 'step_" in job.output) == failed, job.output
            assert ("IS DAMAGED" in job.output) == (name == "truncated"), job.output


def disturb(name_and_job: tuple[str, Job]) -> None:
    """Disturb a job while its rewards are held back, so that it cannot end before."""
    name, job = name_and_job
    job.reach(4 if name == "truncated" else 3)  # truncation needs two checkpoints
    hold_of(job).touch()
    DISTURBANCES[name](job)
    hold_of(job).unlink(missing_ok=True)


def hold_of(job: Job) -> Path:
    """File that holds back the rewards of a job while it exists."""
    return job.folder / f"hold-{job.name}"


def begin(submit: Submit, name: str, small_disk: Path) -> Job:
    output: Mapping[str, Path] = {"output_dir": small_disk / "run"} if name == "full" else {}
    function = f"{{name: 'tests.own_rewards:slow_digit_share', options: {{hold: 'hold-{name}'}}}}"
    held = ("reward.timeout_s=600", f"reward.functions=[{function}]")
    return submit(
        "grpo_7b.sh", *LAYOUT, *STEPS, *held, options=FOUR_RANKS, name=name, **output,
        MEGATRON_RL_MAX_RESTARTS="30",  # enough for all failures until the disk is freed
    )  # fmt: skip


def test_signals_in_the_middle_of_generation_requeue_the_job(submit: Submit, toy_model: Callable[..., Path]) -> None:
    arguments = (*LAYOUT, *STEPS, *LONG, f"model.path={toy_model('qwen2', max_position_embeddings=4096)}")
    submit = partial(submit, "grpo_7b.sh", *arguments, options=FOUR_RANKS)
    undisturbed = submit(name="long")
    undisturbed.finish()
    job = submit(name="cut")
    cut = 0
    for step in (1, 2):
        job.reach(step)
        wait_for("its ranks", lambda: len(job.pids()) == 4)
        time.sleep(0.3)  # generation takes far longer
        finished = len(job.rows())
        usr1(job)
        wait_for("a requeue", lambda step=step: job.output.count("goes back") >= 1 + (step > 1))  # type: ignore[misc]
        cut += len(job.rows()) == finished  # the run stopped before the end of the step
    assert cut > 0  # one of the two signals may arrive between two generations
    job.finish()
    assert job.untimed() == undisturbed.untimed()
    # preemption by a job with higher priority: Slurm sends TERM, and KILL after a grace period
    job = submit(name="preempted")
    job.reach(1)
    run = job.cluster.run
    urgent = run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1", cwd=job.folder
    )
    Job(job.cluster, urgent.strip(), "urgent", job.folder).finish()
    assert "interrupted; job" in job.output
    job.finish()
    assert job.output.count("resumed from step_") == 1
    assert job.untimed() == undisturbed.untimed()


def test_a_job_at_its_time_limit_is_requeued_and_resumes(submit: Submit) -> None:
    """Because of Slurm's signal, or of the clock alone."""
    # Slurm may send the signal up to a minute earlier
    ways = {"signal": ("--signal=B:USR1@60", ()), "clock": ("--signal=B:USR1@0", ("run.stop_margin_s=90",))}
    jobs = [
        submit(
            "grpo_7b.sh", *STEPS, *arguments, "run.num_steps=100000", name=name,
            options=("--ntasks-per-node=1", "--time=3", signal_option),
        )
        for name, (signal_option, arguments) in ways.items()
    ]  # fmt: skip
    for job in jobs:
        wait_for("a resume", lambda job=job: "resumed from step_" in job.output)  # type: ignore[misc]
        assert "interrupted; job" in job.output
        logged = [row["step"] for row in job.rows()]
        assert logged == list(range(len(logged)))
        job.cluster.run("scancel", job.number)
    for job in jobs:
        job.finish("CANCELLED")


def test_a_cancelled_job_stays_cancelled(submit: Submit) -> None:
    job = submit("grpo_7b.sh", *STEPS, options=("--ntasks-per-node=1",), name="cancelled")
    job.reach(2)
    job.cluster.run("scancel", job.number)
    job.finish("CANCELLED")
    time.sleep(5)
    assert job.cluster.state(job.number) == "CANCELLED"
    assert "goes back to the queue" not in job.output


def usr1_to_the_shells_only(job: Job) -> None:
    """Signal the first process of each task only, as Slurm does at some sites."""
    for pid in job.shells():
        os.kill(pid, signal.SIGUSR1)


def requeue(job: Job) -> None:
    job.cluster.run("scontrol", "requeue", job.number)


def usr1(job: Job) -> None:
    """Signal the batch script, as --signal=B:USR1@… does."""
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)


def kill_a_rank(job: Job) -> None:
    kill(job, count=4)


def kill(job: Job, count: int) -> None:
    """Kill one of ``count`` ranks."""
    pids = job.pids()
    assert len(pids) == count
    os.kill(pids[-1], signal.SIGKILL)


def cancel_the_step(job: Job) -> None:
    job.cluster.run("scancel", f"{job.number}.0")


def truncate_the_latest(job: Job) -> None:
    """Truncate the latest checkpoint and kill the ranks, so that the restart would resume from it."""
    checkpoints = job.run / "checkpoints"
    assert len(list(checkpoints.glob("step_*[0-9]"))) > 1
    for pid in job.pids():
        os.kill(pid, signal.SIGSTOP)  # no rank may write a newer checkpoint meanwhile
    latest = checkpoints / (checkpoints / "latest").read_text()
    largest = max((latest / "policy").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    for pid in job.pids():
        os.kill(pid, signal.SIGKILL)


def fill_the_disk(job: Job) -> None:
    """Keep the disk full until a save has failed."""
    filler = job.run.parent / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**16))
                file.flush()
        except OSError:
            pass
    hold_of(job).unlink()
    wait_for("a failure", lambda: "starting again from" in job.output)
    latest = (job.run / "checkpoints/latest").read_text()
    assert (job.run / "checkpoints" / latest / "trainer.json").exists()
    filler.unlink()


DISTURBANCES: dict[str, Callable[[Job], None]] = {
    "usr1": usr1,
    "killed": kill_a_rank,
    "requeued": requeue,
    "shells": usr1_to_the_shells_only,
    "step": cancel_the_step,
    "truncated": truncate_the_latest,
    "full": fill_the_disk,
}


def test_one_rank_on_each_node_writes_an_hf_export(submit: Submit) -> None:
    job = submit("grpo_7b.sh", "checkpoint.save_hf=true", "metrics.console=plain", options=("--ntasks-per-node=1",))
    job.finish()
    assert "TP1 x PP1 x DP2" in job.output
    last = max((job.run / "checkpoints").glob("step_*"))
    assert AutoModelForCausalLM.from_pretrained(last / "hf").num_parameters() > 0
    logs = job.folder / f"logs/slurm/toy-{job.number}"
    assert sorted(path.name for path in logs.glob("rank_*.log")) == ["rank_0.log", "rank_1.log"]


def test_the_resume_option_applies_to_the_first_attempt_only(submit: Submit) -> None:
    """The doctor gets the option too. One job starts over after a kill; another resumes the first."""
    rare = (*STEPS, "checkpoint.every=100")
    one = ("--ntasks-per-node=1",)
    job = submit("grpo_7b.sh", *rare, "--resume", "never", options=one, name="never", MEGATRON_RL_DOCTOR="")
    job.reach(1)
    kill(job, count=2)
    job.finish()
    assert "checkpoint   none: starts at step 0" in job.output
    assert "starting again from 'the beginning'" in job.output
    source = job.run / "checkpoints/step_000008"
    further = submit(
        "grpo_7b.sh", *rare, "run.num_steps=10", "--resume", str(source), options=one, name="path",
        MEGATRON_RL_DOCTOR="",
    )  # fmt: skip
    further.finish()
    assert f"checkpoint   resumes from {source}" in further.output
    assert [row["step"] for row in further.rows()] == [9, 10]


def test_a_hanging_rank_is_reported_with_the_stacks_of_all_ranks(submit: Submit) -> None:
    """Although Slurm kills the remaining ranks of a step once one has exited."""
    job = submit(
        "grpo_7b.sh", "metrics.console=plain", "run.hang_timeout_s=60",
        "algorithm.advantage=tests.own_advantages:hangs_on_the_second_rank",
        options=("--ntasks-per-node=1",), name="hangs", MEGATRON_RL_MAX_RESTARTS="0",
    )  # fmt: skip
    job.finish("FAILED")
    logs = job.folder / f"logs/slurm/hangs-{job.number}"
    first, second = ((logs / f"rank_{rank}.log").read_text() for rank in (0, 1))
    assert "The ranks that the others wait for come first:\n  rank 1 (host" in first
    assert "rank 0: " in first
    assert "rank 1: " in second
    assert "hangs_on_the_second_rank" in second
    assert "giving up" in job.output


def test_a_run_that_cannot_start_fails_after_the_restarts(submit: Submit) -> None:
    job = submit(
        "grpo_7b.sh", "model.path=nowhere", options=("--ntasks-per-node=1", "--export=ALL,MEGATRON_RL_MAX_RESTARTS=1")
    )
    job.finish("FAILED")
    assert job.output.count("starting again from 'the beginning'") == 1
    assert "giving up" in job.output
    assert "nowhere" in job.output


def test_the_doctor_rejects_a_run_that_cannot_start(submit: Submit) -> None:
    job = submit("grpo_7b.sh", "model.path=nowhere", options=("--ntasks-per-node=1",), MEGATRON_RL_DOCTOR="")
    job.finish("FAILED")
    assert "error   model" in job.output
    assert "the doctor found faults" in job.output
    assert "starting again" not in job.output


def test_conversion_and_evaluation_jobs(submit: Submit, tmp_path: Path, toy_model: Callable[..., Path]) -> None:
    """A conversion to Megatron and back, and an evaluation."""
    model, converted, back = toy_model("qwen2"), tmp_path / "converted", tmp_path / "back"
    to_megatron = submit(
        "convert.sh", "hf_to_megatron", "--input", str(model), "--output", str(converted),
        options=("--nodes=1",), name="there",
    )  # fmt: skip
    to_megatron.finish()
    to_hf = submit(
        "convert.sh", "megatron_to_hf", "--input", str(converted), "--output", str(back),
        options=("--nodes=1", f"--dependency=afterok:{to_megatron.number}"), name="back",
    )  # fmt: skip
    to_hf.finish()
    assert (back / "config.json").exists()
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n' * 4)
    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "suite.yaml").write_text(
        "run: {name: suite, output_dir: unused}\nmodel:\n  path: ???\n  dtype: fp32\ntasks: [task.yaml]\n"
    )
    evaluation = submit(
        "eval.sh", f"model.path={model}", options=("--ntasks-per-node=1",), name="evaluation",
        MEGATRON_RL_CONFIG=str(tmp_path / "suite.yaml"), MEGATRON_RL_ENGINE="embedded",
    )  # fmt: skip
    evaluation.finish()
    assert (tmp_path / f"runs/eval/evaluation-{evaluation.number}/report.html").exists()


TASK = """
name: sums
version: 1
source: here
data: {{kind: jsonl, path: {folder}/rows.jsonl}}
prompt: "{{question}}"
chat: false
sampling: {{max_new_tokens: 4}}
scorer: {{name: exact_match}}
gold_response: "{{answer}}"
"""
