"""The command under torchrun, with ranks that are killed or fail."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.limits import LIMIT_S
from tests.toys import TIMED, complete_rows, without, write_config


def command(world_size: int, config: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world_size),
        "-m",
        "megatron_rl.train",
        "--config",
        str(config),
        *overrides,
    ]


def rows(run: Path) -> list[dict[str, Any]]:
    return complete_rows(run / "metrics.jsonl")


def untimed(run: Path) -> list[dict[str, Any]]:
    return without(TIMED, rows(run))


def start(world_size: int, config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return forked.run(command(world_size, config, *overrides))


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(toy_model: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, toy_model("qwen2"))
    # the runs have their own folders; the killed run resumes from the checkpoint after step 7
    common = ["run.num_steps=40", "checkpoint.every=7", "checkpoint.save_hf=true"]
    uninterrupted, killed = tmp_path / "whole", tmp_path / "killed"
    done = start(2, config, *common, f"run.output_dir={uninterrupted}")
    assert done.returncode == 0, done.stderr[-3000:]

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(2, config, *common, f"run.output_dir={killed}"), stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + LIMIT_S
        while not (killed / "metrics.jsonl").exists() or len(rows(killed)) < 10:
            assert time.monotonic() < deadline
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in _ranks_of(killed):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert 9 <= rows(killed)[-1]["step"] < 40
    resume = command(2, config, *common, f"run.output_dir={killed}")
    again = subprocess.run(resume, capture_output=True, text=True, timeout=LIMIT_S)
    assert again.returncode == 0, again.stderr[-3000:]

    assert untimed(killed) == untimed(uninterrupted)
    weights = [load_file(run / "checkpoints/step_000040/hf/model.safetensors") for run in (uninterrupted, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def one_rank(toy_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one_rank")
    done = start(1, write_config(folder, toy_model("qwen2")))
    assert done.returncode == 0, done.stderr[-3000:]
    return rows(folder / "run")


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (2, 1), (1, 1)], ids=["tp2-pp2", "tp2-dp2", "dp4"])
def test_four_ranks_give_the_metrics_of_one(
    tp: int, pp: int, one_rank: list[dict[str, Any]], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    split = [f"parallel.tensor_parallel_size={tp}", f"parallel.pipeline_parallel_size={pp}"]
    done = start(4, write_config(tmp_path, toy_model("qwen2")), *split)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, four in zip(one_rank, rows(tmp_path / "run"), strict=True):
        for name in ("actor/loss", "actor/grad_norm", "critic/score/mean", "val/score"):
            assert (name in one) == (name in four)
            if name in one:
                assert four[name] == pytest.approx(one[name], rel=0, abs=1e-5)


def test_a_failed_run_prints_a_single_error_message(toy_model: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, toy_model("qwen2"))
    done = start(2, config, "reward.functions=[{name: 'tests.own_rewards:raises'}]")
    assert done.returncode != 0
    assert done.stderr.count("rewards failed, more than reward.max_failure_fraction") == 1
    assert "Traceback" not in done.stderr.split("error: ")[0]


def test_a_signal_to_the_process_group_stops_with_a_checkpoint(toy_model: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(tmp_path, toy_model("qwen2"))
    process = forked.start(
        [
            *(sys.executable, "-m", "megatron_rl.train", "--config", str(config)),
            *("run.num_steps=100000", "metrics.console=plain", "reward.max_failure_fraction=0"),
        ],
        merge=True,
        new_session=True,
    )
    deadline = time.monotonic() + LIMIT_S
    while not (tmp_path / "run/metrics.jsonl").exists() or len(rows(tmp_path / "run")) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # the reward workers get the signal too
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, printed
    step = rows(tmp_path / "run")[-1]["step"]
    assert f"stopped on request after step {step}" in printed
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step_{step:06d}"


def _ranks_of(run: Path) -> list[int]:
    """Return the processes whose command line names the run folder; torchrun gives each rank its own session."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(run).encode() in arguments:
                pids.append(int(entry.name))
    return pids
