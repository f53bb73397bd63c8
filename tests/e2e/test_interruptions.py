"""Stop signals in the middle of a phase, the end of a job, and ranks that hang."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from megatron_rl.distributed.heartbeat import Beat, ObservedBeat, describe
from megatron_rl.distributed.signals import EXIT_REQUEUE, deadline
from megatron_rl.rollout.serialization import group_from_json, read_lines, read_rollouts
from megatron_rl.types import Rollout
from tests import forked
from tests.e2e.test_torchrun import command, rows, untimed
from tests.limits import LIMIT_S
from tests.toys import write_config

# responses so long that a run is nearly always in the middle of generation
LONG = (
    "rollout.max_new_tokens=400",
    "data.max_prompt_tokens=8",
    "run.num_steps=3",
    "checkpoint.every=1",
    "validation.every=1",
)
PLAIN = ("metrics.console=plain",)


def begin(config: Path, *overrides: str, world_size: int = 2, **environment: str) -> forked.Forked:
    return forked.start(command(world_size, config, *PLAIN, *overrides), merge=True, env={**os.environ, **environment})


def ranks_of(process: forked.Forked) -> list[int]:
    """Return the process ids of the ranks that torchrun has started, by rank."""
    started = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process.pid:
            started.append((int(fields[19]), int(entry.parent.name)))
    return [pid for _, pid in sorted(started)]


def wait_for(is_so: Callable[[], bool], process: forked.Forked) -> None:
    end = time.monotonic() + LIMIT_S
    while not is_so():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def lines_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def handle_usr1(process: forked.Forked, num_ranks: int = 2) -> bool:
    """Whether all ranks have installed their handler of USR1."""
    pids = ranks_of(process)
    return len(pids) == num_ranks and all(_catches(pid, signal.SIGUSR1) for pid in pids)


def _catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
    return bool(mask & 1 << number - 1)


@pytest.fixture
def config(toy_model: Callable[..., Path], tmp_path: Path) -> Path:
    return write_config(tmp_path, toy_model("qwen2", max_position_embeddings=512))


def test_signals_during_generation_or_evaluation_do_not_change_the_metrics(config: Path, tmp_path: Path) -> None:
    """One of two ranks gets a signal, several times and in any phase; metrics equal those of an uninterrupted run."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    overrides = (*LONG, "run.num_steps=4")
    done = begin(config, *overrides, f"run.output_dir={whole}")
    printed, _ = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, printed
    # logged rows to wait for, and seconds to wait after them
    for num_rows, wait in ((0, 0.0), (0, 1.5), (1, 0.3), (2, 0.3), (2, 0.0), (3, 0.3)):
        process = begin(config, *overrides, f"run.output_dir={cut}")
        wait_for(partial(handle_usr1, process), process)
        wait_for(lambda n=num_rows: lines_of(cut) >= n, process)
        time.sleep(wait)
        os.kill(ranks_of(process)[0], signal.SIGUSR1)
        printed, _ = process.communicate(timeout=LIMIT_S)
        assert f"exitcode  : {EXIT_REQUEUE}" in printed, printed
    done = begin(config, *overrides, f"run.output_dir={cut}")
    printed, _ = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, printed
    assert untimed(cut) == untimed(whole)


def test_finished_samples_of_an_interrupted_generation_are_trained_on(config: Path, tmp_path: Path) -> None:
    """With partial rollouts the prompts of an interrupted step count as used, so its samples must not be lost."""
    run, num_steps, mark = tmp_path / "run", 2, tmp_path / "graded"
    overrides = (
        *LONG, "validation.every=0", "rollout.partial_rollout=true", "rollout.max_staleness=3", "checkpoint.every=100",
        "metrics.keep_rollouts_every=1", "rollout.num_prompts_per_step=16", f"run.num_steps={num_steps}",
        "rollout.max_num_sequences=4",  # most of the 64 samples are left when the first ones are graded
        f"reward.functions=[{{name: 'tests.own_rewards:marked_digit_share', options: {{mark: {mark}}}}}]",
    )  # fmt: skip
    process = begin(config, *overrides, world_size=1)
    wait_for(lambda: bool(lines_of(run)), process)
    mark.unlink()  # of the validation before the first step
    wait_for(mark.exists, process)
    os.kill(ranks_of(process)[0], signal.SIGUSR1)
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert f"exitcode  : {EXIT_REQUEUE}" in printed, printed
    in_flight = run / "checkpoints" / (run / "checkpoints/latest").read_text() / "in_flight.jsonl"
    groups = [group_from_json(line) for line in read_lines(in_flight)]
    samples = [sample for group in groups for sample in group.samples if isinstance(sample, Rollout)]
    saved = {sample.seed: sample.token_ids.tolist() for sample in samples}
    assert 0 < len(saved) < 64
    done = begin(config, *overrides, world_size=1)
    printed, _ = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, printed
    lines = [line for path in sorted((run / "rollouts").glob("*.jsonl")) for line in read_rollouts(path)]
    tokens = {line["seed"]: line["token_ids"] for line in lines}
    assert len(tokens) == len(lines) == num_steps * 16 * 4
    assert saved.items() <= tokens.items()


def test_the_push_of_a_resume_is_not_logged_with_the_next_step(config: Path, tmp_path: Path) -> None:
    """A resume repeats the weight push of the last evaluation; its metrics are not logged with the next step."""
    overrides = (*LONG, "validation.every=2", "validation.max_new_tokens=8")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = begin(config, *overrides, f"run.output_dir={whole}", world_size=1)
    printed, _ = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, printed
    process = begin(config, *overrides, f"run.output_dir={cut}", world_size=1)
    wait_for(lambda: lines_of(cut) == 3, process)
    os.kill(ranks_of(process)[0], signal.SIGUSR1)
    process.communicate(timeout=LIMIT_S)
    assert lines_of(cut) == 3
    again = begin(config, *overrides, f"run.output_dir={cut}", world_size=1)
    printed, _ = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 0, printed
    assert untimed(cut) == untimed(whole)
    pushed = ["weight_sync/probe_difference" in row for row in untimed(cut)]
    assert pushed == [True, False, True, True]


def test_repeated_signals_do_not_change_the_exit_status(config: Path) -> None:
    """A job script sends signals until the run ends, also while the processes exit."""
    process = begin(config, *LONG)
    wait_for(partial(handle_usr1, process), process)
    while pids := ranks_of(process):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.001)
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert f"exitcode  : {EXIT_REQUEUE}" in printed, printed
    assert "SIGUSR1" not in printed


def test_unlogged_metrics_of_a_step_are_saved_with_the_checkpoint(config: Path, tmp_path: Path) -> None:
    """The run is stopped in the evaluation after a step, before the row of the step is logged."""
    run = tmp_path / "run"
    overrides = (*LONG, "validation.max_new_tokens=480", "rollout.max_new_tokens=8", "checkpoint.save_hf=true")
    process = begin(config, *overrides, world_size=1)
    wait_for(lambda: lines_of(run) == 2, process)
    wait_for(lambda: "step_000002" not in os.listdir(run / "checkpoints"), process)
    os.kill(ranks_of(process)[0], signal.SIGUSR1)
    process.communicate(timeout=LIMIT_S)
    logged = [row["step"] for row in rows(run)]
    latest = (run / "checkpoints/latest").read_text()
    unlogged = run / "checkpoints" / latest / "unlogged.json"
    if unlogged.exists():
        assert logged[-1] == int(latest.removeprefix("step_")) - 1
        assert json.loads(unlogged.read_text())["actor/grad_norm"][0] == "Max"
        # an export takes minutes for a large model, and the job is about to end
        assert not unlogged.with_name("hf").exists()
    again = begin(config, *overrides, world_size=1)
    printed, _ = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 0, printed
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]
    assert all("val/score" in row for row in rows(run))
    assert all("actor/grad_norm" in row for row in rows(run)[1:])
    assert all((run / f"checkpoints/step_{step:06d}/hf/config.json").exists() for step in (2, 3))


def test_a_run_stops_before_the_end_of_its_job(config: Path, tmp_path: Path) -> None:
    """Without a signal: the end of the job is later than this test waits for."""
    stop_at, end = int(time.time()) + 20, int(time.time()) + 20 + LIMIT_S
    process = begin(
        config, "run.num_steps=100000", f"run.stop_margin_s={end - stop_at}",
        world_size=1, SLURM_JOB_END_TIME=str(end),
    )  # fmt: skip
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert time.time() >= stop_at
    assert f"exitcode  : {EXIT_REQUEUE}" in printed, printed
    assert "stopped on request after step" in printed
    assert (tmp_path / "run/checkpoints/latest").exists()


def test_the_deadline_is_the_end_of_the_job_minus_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    assert deadline(300.0) == 700
    assert deadline(None) == float("inf")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    assert deadline(300.0) == float("inf")


def test_a_stopped_rank_is_reported_and_the_run_ends(config: Path, tmp_path: Path) -> None:
    process = begin(config, "run.num_steps=100000", "run.hang_timeout_s=30")
    wait_for(lambda: lines_of(tmp_path / "run") > 3, process)
    by_rank = dict(enumerate(ranks_of(process)))
    os.kill(by_rank[1], signal.SIGSTOP)
    try:
        wait_for_end(process)
    finally:
        for pid in by_rank.values():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    report = printed.split("The ranks that the others wait for come first:")[1].splitlines()
    assert f"rank 1 (host {os.uname().nodename}, pid {by_rank[1]})" in report[1]
    assert "dead or unreachable" in report[1]
    assert "rank 0" in report[2]
    assert "Thread" in printed or "thread" in printed  # stack of the waiting rank


def test_a_rank_without_progress_is_reported_with_its_stack(config: Path) -> None:
    """Its process still sends heartbeats, so only the lack of progress shows that it hangs."""
    process = begin(
        config, "run.hang_timeout_s=30", "algorithm.advantage=tests.own_advantages:hangs_on_the_second_rank"
    )
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    report = printed.split("The ranks that the others wait for come first:")[1].splitlines()
    assert report[1].startswith("  rank 1 (host")
    assert "dead or unreachable" not in report[1]
    assert report[2].startswith("  rank 0 (host")
    assert "hangs_on_the_second_rank" in printed


def wait_for_end(process: forked.Forked) -> None:
    end = time.monotonic() + LIMIT_S
    pids = ranks_of(process)
    while len(ranks_of(process)) == len(pids):
        assert time.monotonic() < end
        time.sleep(0.2)


def observed_beat(
    rank: int, host: str, phase: str, idle_s: float, at_s: float, *, is_over: bool = False
) -> ObservedBeat:
    num_phases = {"gen": 4, "update_actor": 5}[phase]
    beat = Beat(
        rank=rank,
        host=host,
        pid=7,
        number=3,
        phase=phase,
        num_phases=num_phases,
        step=3,
        idle_s=idle_s,
        is_over=is_over,
    )
    return ObservedBeat(beat, at_s)


def test_ranks_that_the_others_wait_for_are_reported_first() -> None:
    beats = [
        observed_beat(0, "a", "update_actor", 9.0, 999.0),
        observed_beat(2, "b", "gen", 598.0, 998.0),
        observed_beat(3, "b", "gen", 0.0, 500.0),
        observed_beat(4, "c", "gen", 0.0, 100.0, is_over=True),
    ]
    text = describe(beats, 5, now=1000.0, stuck_s=600.0).splitlines()
    assert text[1] == "  no heartbeat ever: ranks 1"
    assert (
        text[2] == "  rank 3 (host b, pid 7): step 3, gen, no progress for 500 s, silent for 500 s: dead or unreachable"
    )
    assert text[3] == "  rank 2 (host b, pid 7): step 3, gen, no progress for 600 s"
    assert text[4] == "  rank 4 (host c, pid 7): step 3, gen, no progress for 0 s"
    assert text[5] == "  rank 0 (host a, pid 7): step 3, update_actor, no progress for 10 s"


def test_a_frozen_rank_is_reported_before_the_ranks_that_wait_for_it() -> None:
    """Also if its last beat came when the other ranks already waited."""
    beats = [observed_beat(0, "a", "gen", 30.5, 1000.0), observed_beat(1, "a", "update_actor", 0.0, 971.0)]
    text = describe(beats, 2, now=1000.0, stuck_s=30.0).splitlines()
    assert text[1].startswith("  rank 1 (host a, pid 7): step 3, update_actor, no progress for 29 s, silent for 29 s")
