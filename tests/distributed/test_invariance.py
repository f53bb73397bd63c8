"""A run gives the same metrics under every layout and batching, and a resume continues it exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.covering import chosen
from tests.distributed import cases
from tests.gang import Gang
from tests.toys import CHANGED_BY_RESUME, toy_config, without

COMPARED = (
    "actor/loss",
    "actor/pg_loss",
    "actor/kl_loss",
    "actor/entropy",
    "actor/grad_norm",
    "critic/score/mean",
    "val/score",
)
SPLITS = {
    "1-rank": (1, []),
    "micro-batch-1": (1, ["batching.micro_batch_size=1"]),
    "micro-batch-2": (1, ["batching.micro_batch_size=2"]),
    "micro-batch-4": (1, ["batching.micro_batch_size=4"]),
    "unpacked": (1, ["batching.packed=false", "batching.micro_batch_size=4"]),
    "plain-optimizer": (2, ["parallel.distributed_optimizer=false"]),
    "tp2-pp2": (4, ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]),
    "tp2-pp2-sp-micro-batch-2": (
        4,
        [
            "parallel.tensor_parallel_size=2",
            "parallel.pipeline_parallel_size=2",
            "parallel.sequence_parallel=true",
            "batching.micro_batch_size=2",
        ],
    ),
    "tp2-pp2-unpacked": (
        4,
        [
            "parallel.tensor_parallel_size=2",
            "parallel.pipeline_parallel_size=2",
            "batching.packed=false",
            "batching.micro_batch_size=1",
        ],
    ),
    "tp2-dp2": (4, ["parallel.tensor_parallel_size=2"]),
    "tp2-dp2-dynamic": (4, ["parallel.tensor_parallel_size=2", "rollout.schedule=dynamic"]),
    "dp4": (4, []),
    "dp4-micro-batch-1": (4, ["batching.micro_batch_size=1"]),
}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one_rank")
    gangs(1).call(cases.run_training, config=toy_config(folder, toy_model("qwen2", tied=True)))
    return rows(folder / "run")


ALWAYS = (
    *("micro-batch-2", "unpacked", "plain-optimizer", "tp2-pp2-sp-micro-batch-2", "tp2-pp2-unpacked"),
    *("tp2-dp2-dynamic", "dp4-micro-batch-1"),
)


@pytest.mark.parametrize("split", chosen(SPLITS, ALWAYS))
def test_metrics_are_equal_for_every_split(
    split: str,
    one_rank: list[dict[str, Any]],
    gangs: Callable[[int], Gang],
    toy_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    world_size, overrides = SPLITS[split]
    gangs(world_size).call(cases.run_training, config=toy_config(tmp_path, toy_model("qwen2", tied=True), *overrides))
    metrics = rows(tmp_path / "run")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    for actual, expected in zip(metrics, one_rank, strict=True):
        for name in COMPARED:
            assert (name in actual) == (name in expected)
            if name in expected:
                assert actual[name] == pytest.approx(expected[name], rel=0, abs=1e-5), (actual["step"], name)


CORRECTIONS = (
    "algorithm.rollout_is=sequence_truncate",
    "algorithm.rollout_rejection=geometric",
    "algorithm.rollout_rejection_low=0.999",
    "algorithm.rollout_rejection_high=1.001",
    "algorithm.rollout_veto=0.5",
)


def test_rollout_correction_changes_nothing_if_log_probs_match(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """With a single update per step, old log-probabilities are computed only because the correction needs them."""
    metrics = {}
    for name, corrections in (("plain", ()), ("corrected", CORRECTIONS)):
        folder = tmp_path / name
        folder.mkdir()
        config = toy_config(folder, toy_model("qwen2", tied=True), "batching.num_mini_batches=1", *corrections)
        gangs(2).call(cases.run_training, config=config)
        metrics[name] = rows(folder / "run")
    assert len(metrics["corrected"]) == 4
    for actual, expected in zip(metrics["corrected"], metrics["plain"], strict=True):
        for name in COMPARED:
            if name in expected:
                assert actual[name] == pytest.approx(expected[name], rel=0, abs=1e-4), (actual["step"], name)
        if actual["step"]:
            assert "timing_s/old_log_prob" in actual
            assert "timing_s/old_log_prob" not in expected
            assert actual["rollout_corr/is_weight"] == pytest.approx(1, abs=1e-4)
            assert actual["rollout_corr/rejected"] == actual["rollout_corr/vetoed"] == 0


def test_a_run_replays_the_routing_of_the_engine(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A whole run with experts: the trainer replays the routing that the engine reports."""
    config = toy_config(
        tmp_path, toy_model("qwen3_moe", tied=False), "parallel.expert_parallel_size=2", "moe.routing_replay=true"
    )
    gangs(2).call(cases.run_training, config=config)
    metrics = rows(tmp_path / "run")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    for row in metrics[1:]:
        assert row["train_rollout_logprob_abs_diff/max"] < 1e-4


def test_resume_continues_bit_for_bit(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("qwen2", tied=True)
    split = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "checkpoint.keep_last=1"]
    split += ["algorithm.reference_reset_every=3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    gangs(4).call(cases.run_training, config=toy_config(whole, model, *split, "run.num_steps=20"))
    gangs(4).call(cases.run_training, config=toy_config(parts, model, *split, "run.num_steps=7"))
    assert (parts / "run/checkpoints/latest").read_text() == "step_000007"
    assert [p.name for p in (parts / "run/references").iterdir()] == ["step_000006"]
    gangs(4).call(cases.run_training, config=toy_config(parts, model, *split, "run.num_steps=20"))
    assert [p.name for p in (parts / "run/checkpoints").glob("step_*")] == ["step_000020"]
    assert without(CHANGED_BY_RESUME, rows(parts / "run")) == without(CHANGED_BY_RESUME, rows(whole / "run"))
    assert [p.name for p in (parts / "run/references").iterdir()] == ["step_000018"]
    fork = tmp_path / "fork"  # resumes a checkpoint of another run, whose reference is in the folder of that run
    fork.mkdir()
    onward = toy_config(fork, model, *split, "run.num_steps=21")
    gangs(4).call(cases.run_training, config=onward, resume=str(parts / "run/checkpoints/step_000020"))
    assert [row["step"] for row in rows(fork / "run")] == [21]
    divergence = {row["step"]: row["actor/kl_loss"] for row in rows(whole / "run") if row["step"]}
    assert divergence[4] < divergence[3]  # the policy after step 3 is the reference
    assert rows(parts / "run")[-1]["val/score"] == rows(whole / "run")[-1]["val/score"]


def test_a_rank_without_loss_tokens_takes_part(
    gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = toy_config(tmp_path, toy_model("qwen2", tied=True))
    (alone,) = gangs(1).call(cases.update_with_tokens_on_first_rank_only, config=config)
    assert gangs(2).call(cases.update_with_tokens_on_first_rank_only, config=config) == pytest.approx(
        [alone, alone], rel=1e-5
    )
