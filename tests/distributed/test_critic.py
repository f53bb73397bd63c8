"""The critic of PPO, in the layout of the policy and in others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.covering import chosen
from tests.distributed import cases
from tests.distributed.layouts import keys
from tests.distributed.test_invariance import rows
from tests.gang import Gang
from tests.toys import CHANGED_BY_RESUME, sequences, toy_config, without

PPO = (
    *("algorithm.advantage=gae", "algorithm.gae_lambda=0.95", "algorithm.whiten_advantages=true"),
    *("algorithm.kl_coef=0", "algorithm.kl_reward_coef=0.05", "algorithm.kl_reward_target=0.02"),
    *("algorithm.kl_reward_horizon=100", "critic.clip_value=0.2", "critic.optimizer.lr=1e-3", "critic.warmup_steps=1"),
)
COMPARED = (
    *("actor/loss", "actor/grad_norm", "critic/vf_loss", "critic/vf_clipfrac", "critic/grad_norm", "critic/kl"),
    *("critic/kl_coef", "critic/values/mean", "critic/returns/max", "critic/advantages/min", "critic/vf_explained_var"),
)
# world size, layout of the policy, layout of the critic
LAYOUTS = {
    "padded": (1, "batching.packed=false batching.micro_batch_size=4", ""),
    "micro-batch-1": (1, "batching.micro_batch_size=1", ""),
    "dp2": (2, "", ""),
    "tp2": (2, "tp2", "tp2"),
    "tp2-against-dp2": (2, "tp2", "tp1"),
    "dp2-against-tp2-sp": (2, "", "tp2 sp"),
    "pp2-against-cp2": (2, "pp2", "cp2"),
    "cp2-against-pp2-vpp2": (2, "cp2", "pp2 vpp2"),
    "tp2-pp2-against-tp2-dp2-sp": (4, "tp2 pp2", "tp2 sp"),
    "dp4-against-tp2-pp2": (4, "", "tp2 pp2"),
    "dp2-cp2-padded": (4, "cp2 batching.packed=false", "cp2"),
}


def overrides(policy: str, critic: str) -> list[str]:
    return [*keys(policy), *(f"critic.{key}" for key in keys(critic))]


def run(
    world_size: int, folder: Path, gangs: Callable[[int], Gang], model: Path, *changes: str
) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    gangs(world_size).call(cases.run_training, config=toy_config(folder, model, *PPO, *changes))
    return rows(folder / "run")


@pytest.fixture(scope="module")
def deep(toy_model: Callable[..., Path]) -> Path:
    return toy_model("qwen2", tied=True, num_hidden_layers=4)


@pytest.fixture(scope="module")
def one_rank(
    gangs: Callable[[int], Gang], deep: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return run(1, tmp_path_factory.mktemp("one_rank"), gangs, deep)


ALWAYS = (
    *("micro-batch-1", "dp2-against-tp2-sp", "pp2-against-cp2", "cp2-against-pp2-vpp2"),
    *("tp2-pp2-against-tp2-dp2-sp", "dp2-cp2-padded"),
)


@pytest.mark.parametrize("layout", chosen(LAYOUTS, ALWAYS))
def test_metrics_are_equal_under_every_layout(
    layout: str, one_rank: list[dict[str, Any]], gangs: Callable[[int], Gang], deep: Path, tmp_path: Path
) -> None:
    world_size, policy, critic = LAYOUTS[layout]
    metrics = run(world_size, tmp_path, gangs, deep, *overrides(policy, critic))
    for actual, expected in zip(metrics, one_rank, strict=True):
        for name in COMPARED:
            assert (name in actual) == (name in expected), (actual["step"], name)
            if name in expected:
                assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (actual["step"], name)


def test_critic_warmup_comes_first_and_the_kl_coefficient_adapts(one_rank: list[dict[str, Any]]) -> None:
    _, first, second, third = one_rank
    assert "critic/vf_loss" in first
    assert "actor/loss" not in first
    assert "actor/loss" in second
    assert first["critic/values/mean"] == 0  # a value head that is not in the checkpoint starts at 0
    assert second["critic/values/mean"] != 0
    assert third["critic/kl_coef"] != first["critic/kl_coef"] == 0.05


def test_policy_and_critic_resume_bit_for_bit_and_under_other_layouts(
    gangs: Callable[[int], Gang], deep: Path, tmp_path: Path
) -> None:
    layout = overrides("tp2", "pp2")
    whole = run(2, tmp_path / "whole", gangs, deep, *layout, "run.num_steps=6")
    run(2, tmp_path / "parts", gangs, deep, *layout, "checkpoint.in_background=true")
    checkpoint = tmp_path / "parts/run/checkpoints/step_000003"
    assert {"policy", "critic"} < {path.name for path in checkpoint.iterdir()}
    assert "critic/.metadata" in json.loads((checkpoint / "integrity.json").read_text())
    parts = run(2, tmp_path / "parts", gangs, deep, *layout, "checkpoint.in_background=true", "run.num_steps=6")
    assert without(CHANGED_BY_RESUME, parts) == without(CHANGED_BY_RESUME, whole)
    other = tmp_path / "other"
    other.mkdir()
    config = toy_config(other, deep, *PPO, *overrides("", "tp2"), "run.num_steps=6")
    gangs(2).call(cases.run_training, config=config, resume=str(checkpoint))
    for actual, expected in zip(rows(other / "run"), whole[4:], strict=True):
        for name in COMPARED:
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (actual["step"], name)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_a_saved_critic_loads_in_transformers_and_as_initial_critic(
    family: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model(family, tied=False)
    run(2, tmp_path, gangs, model, *overrides("", "pp2"), "checkpoint.save_hf=true", "run.num_steps=2")
    folder = tmp_path / "run/checkpoints/step_000002/hf_critic"
    hf = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    config = toy_config(tmp_path, model, *PPO, *overrides("", "tp2 sp"), f"critic.path={folder}")
    actual = {index: row for part in gangs(2).call(cases.initial_values, config=config) for index, row in part.items()}
    assert len(actual) == len(cases.LENGTHS)
    for index, sequence in enumerate(sequences(cases.LENGTHS)):
        with torch.no_grad():
            hidden = hf.model(sequence.token_ids[None]).last_hidden_state
            values = torch.cat([torch.zeros(1), hf.score(hidden)[0, :-1, 0]])  # values before each token
        expected = torch.where(sequence.loss_mask, values, 0)
        torch.testing.assert_close(actual[index], expected, atol=1e-5, rtol=0)
    assert max(float(row.abs().max()) for row in actual.values()) > 0.01
