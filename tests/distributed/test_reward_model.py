"""Reward models: training is equal under every layout, and the scores are useful."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megatron_rl.config.load import load_as
from megatron_rl.config.reward_training import RewardTrainingConfig
from megatron_rl.data.generated.hasty_chain import HastyChain, solve
from megatron_rl.data.reward_model_data import load_reward_dataset
from megatron_rl.data.templates import load_tokenizer
from megatron_rl.models.toy import make_model, make_tokenizer
from megatron_rl.rollout.serialization import read_rollouts, step_file, write_lines
from tests.distributed import cases
from tests.distributed.layouts import OVERLAP, PADDED, keys, layout_cases
from tests.distributed.test_invariance import rows
from tests.gang import Gang
from tests.toys import CHANGED_BY_RESUME, toy_config, without

YAML = """
run: {{name: reward_model, output_dir: {folder}/reward_model, num_steps: 3}}
model: {{path: {model}, dtype: fp32}}
data:
  schema: stepwise
  train: {{kind: task, path: hasty_chain, options: {{num_rows: 64}}}}
  validation: {{kind: task, path: hasty_chain, split: test, limit: 24}}
  max_tokens: 64
  num_examples_per_step: 10
batching: {{max_tokens_per_micro_batch: 200}}
optimizer: {{lr: 1.0e-3}}
metrics: {{console: silent, wandb: disabled, tensorboard: false}}
"""
COMPARED = ("reward_model/loss", "reward_model/accuracy", "reward_model/score", "reward_model/grad_norm")
OPTIONS = (
    *(("", "tp2 sp"), ("", "pp2 vpp2"), ("", "cp2"), ("", "dp2")),
    *(("", PADDED), ("", "batching.micro_batch_size=2"), ("", OVERLAP)),
    *(("data.schema=stepwise", "data.schema=pairwise"),),
)


def reward_config(folder: Path, model: Path, *overrides: str) -> RewardTrainingConfig:
    folder.mkdir(exist_ok=True)
    path = folder / "reward_model.yaml"
    path.write_text(YAML.format(folder=folder, model=model))
    return load_as(RewardTrainingConfig, path, overrides)


def train_metrics(
    gangs: Callable[[int], Gang], world_size: int, folder: Path, model: Path, *overrides: str
) -> list[dict[str, Any]]:
    gangs(world_size).call(cases.train_reward_model, config=reward_config(folder, model, *overrides))
    return rows(folder / "reward_model")


@pytest.fixture(scope="module")
def deep(toy_model: Callable[..., Path]) -> Path:
    return toy_model("qwen2", tied=True, num_hidden_layers=4)


@pytest.fixture(scope="module")
def one_rank(
    gangs: Callable[[int], Gang], deep: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("one_rank")
    return {
        schema: train_metrics(gangs, 1, folder / schema, deep, f"data.schema={schema}")
        for schema in ("stepwise", "pairwise", "pointwise")
    }


@layout_cases(*OPTIONS)
def test_metrics_are_equal_under_every_layout(
    world_size: int,
    layout: str,
    one_rank: dict[str, list[dict[str, Any]]],
    gangs: Callable[[int], Gang],
    deep: Path,
    tmp_path: Path,
) -> None:
    metrics = train_metrics(gangs, world_size, tmp_path, deep, *keys(layout))
    schema = next(name for name in one_rank if f"data.schema={name}" in layout)
    for actual, expected in zip(metrics, one_rank[schema], strict=True):
        for name in expected:
            if name.startswith(("val/", *COMPARED)):
                assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (actual["step"], name)


def test_initial_loss_is_log_2_for_every_schema(one_rank: dict[str, list[dict[str, Any]]]) -> None:
    # a value head that is not in the checkpoint starts at 0, so every score is 0
    for metrics in one_rank.values():
        assert metrics[1]["reward_model/loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
        assert metrics[0]["val/loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
        assert metrics[3]["reward_model/loss"] != metrics[1]["reward_model/loss"]


def test_resume_continues_bit_for_bit_and_under_another_layout(
    gangs: Callable[[int], Gang], deep: Path, tmp_path: Path
) -> None:
    whole = train_metrics(gangs, 2, tmp_path / "whole", deep, *keys("tp2"), "run.num_steps=6")
    train_metrics(gangs, 2, tmp_path / "parts", deep, *keys("tp2"))
    parts = train_metrics(gangs, 2, tmp_path / "parts", deep, *keys("tp2"), "run.num_steps=6")
    assert without(CHANGED_BY_RESUME, parts) == without(CHANGED_BY_RESUME, whole)
    checkpoint = tmp_path / "parts/reward_model/checkpoints/step_000003"
    config = reward_config(tmp_path / "other", deep, *keys("pp2"), "run.num_steps=6")
    gangs(2).call(cases.train_reward_model, config=config, resume=str(checkpoint))
    for actual, expected in zip(rows(tmp_path / "other/reward_model"), whole[4:], strict=True):
        for name in COMPARED:
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (actual["step"], name)


def test_a_saved_reward_model_loads_in_transformers(gangs: Callable[[int], Gang], deep: Path, tmp_path: Path) -> None:
    train_metrics(gangs, 2, tmp_path, deep, *keys("pp2"))
    folder = tmp_path / "reward_model/checkpoints/step_000003/hf"
    hf = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    config = reward_config(tmp_path, folder, *keys("tp2 sp"))
    assert config.data.validation is not None
    responses = [
        response
        for (response,) in load_reward_dataset(
            config.data.validation, config.data, load_tokenizer(str(folder))
        ).examples
    ]
    samples = [(list(response.token_ids), list(response.ends)) for response in responses]
    for actual in gangs(2).call(cases.reward_scores, config=config, samples=samples):
        for scores, (tokens, positions) in zip(actual, samples, strict=True):
            with torch.no_grad():
                last = hf(torch.tensor([tokens])).logits[0, 0]
                hidden = hf.model(torch.tensor([tokens])).last_hidden_state
                torch.testing.assert_close(scores, hf.score(hidden)[0, positions, 0], atol=1e-5, rtol=0)
            assert float(scores[-1]) == pytest.approx(float(last), abs=1e-5)


@pytest.fixture(scope="module")
def process_model(gangs: Callable[[int], Gang], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a process reward model on solutions with exact labels and return its folder."""
    folder = tmp_path_factory.mktemp("process")
    make_model("qwen2").save_pretrained(folder / "init")
    make_tokenizer().save_pretrained(folder / "init")
    metrics = train_metrics(
        gangs, 2, folder, folder / "init", "run.num_steps=120", "data.num_examples_per_step=64",
        "data.train.options={num_rows: 8000}", "data.validation.limit=null", "optimizer.lr=3e-3",
        "optimizer.lr_warmup_updates=20", "optimizer.adam_beta2=0.98", "batching.max_tokens_per_micro_batch=4096",
    )  # fmt: skip
    assert metrics[0]["val/accuracy"] < 0.7
    assert metrics[-1]["val/accuracy"] > 0.9
    assert metrics[-1]["val/accuracy_of_wrong"] > 0.9
    return folder / "reward_model/checkpoints/step_000120/hf"


def recorded_chains(folder: Path, tokenizer: Any, num_problems: int) -> None:
    """Write eight solutions of each problem as a run records them; each step is hasty with probability 0.3."""
    draw = random.Random(5)
    lines = []
    for group, row in enumerate(HastyChain(num_rows=num_problems, seed=1).rows("train")):
        problem = tuple(int(number) for number in re.findall(r"[+-]?\d+", row["prompt"]))
        for sample in range(8):
            steps, labels = solve(problem, 0.3, draw)
            prompt, response = tokenizer.encode(row["prompt"]), [*tokenizer.encode("\n".join(steps)), 1]
            length = len(prompt) + len(response)
            lines.append(
                {
                    "format": 1, "step": 1, "group": group, "sample": sample, "prompt_id": str(group),
                    "prompt": row["prompt"], "prompt_token_ids": prompt, "answer": row["answer"], "demonstration": None,
                    "metadata": {}, "response": "\n".join(steps), "finish_reason": "stop", "status": "ok",
                    "failure": "", "reward": float(labels[-1]), "reward_parts": {}, "seed": 0,
                    "token_ids": prompt + response,
                    "loss_mask": [0] * len(prompt) + [1] * len(response), "logprobs": [0.0] * length,
                    "policy_versions": [-1] * len(prompt) + [0] * len(response),
                }
            )  # fmt: skip
    write_lines(step_file(folder, 1), lines)


def test_best_of_eight_by_step_scores_beats_majority_vote(
    process_model: Path, gangs: Callable[[int], Gang], tmp_path: Path
) -> None:
    recorded_chains(tmp_path / "rollouts", load_tokenizer(str(process_model)), 100)
    config = reward_config(tmp_path, process_model, *keys("tp2"))
    arguments = [
        "--config",
        "-",
        "--rollouts",
        str(tmp_path / "rollouts"),
        "--n",
        "8",
        "--answer-pattern",
        r"=(-?\d+)$",
    ]
    printed, _ = gangs(2).call(cases.choose_best, config=config, arguments=arguments)
    right = {name: float(share) for name, share in re.findall(r"\| ([\w, ]+) \| ([\d.]+)% ", printed)}
    for how in ("min", "prod", "last", "mean"):
        assert right["majority vote"] + 10 < right[f"reward model, {how}"] <= right["any is right"]
    assert right["reward model, min"] > 0.9 * right["any is right"]


def test_model_rewards_are_equal_under_every_layout_and_given_at_step_ends(
    process_model: Path, gangs: Callable[[int], Gang], tmp_path: Path
) -> None:
    overrides = (
        "data.train={kind: task, path: hasty_chain, limit: 64}", "data.validation=null", "data.max_prompt_tokens=16",
        "rollout.max_new_tokens=24", "reward.functions=[{name: format}]", f"reward.model.path={process_model}",
        "reward.model.weight=0.5", "reward.model.step_separator='1'", "reward.model.aggregation=each",
        "reward.model.activation=sigmoid", "algorithm.advantage=process", "metrics.keep_rollouts_every=1",
        "rollout.drift_limit=null",
    )  # fmt: skip
    metrics = {}
    for world_size, layout in ((1, ""), (2, "tp2"), (2, "cp2"), (4, "tp2 pp2")):
        folder = tmp_path / f"{world_size}{layout.replace(' ', '')}"
        folder.mkdir()
        config = toy_config(folder, process_model.parents[3] / "init", *overrides, *keys(layout))
        gangs(world_size).call(cases.run_training, config=config)
        metrics[world_size, layout] = rows(folder / "run")
        lines = list(read_rollouts(step_file(folder / "run/rollouts", 1)))
        assert all(line["reward_parts"].keys() == {"format", "reward_model"} for line in lines)
        for line in lines:
            step_rewards = dict(line["step_rewards"])
            assert line["reward"] == pytest.approx(0.5 * line["reward_parts"]["reward_model"], abs=1e-6)
            assert line["reward"] == pytest.approx(sum(step_rewards.values()), abs=1e-6)
            assert max(step_rewards) == len(line["token_ids"]) - 1
        assert max(len(line["step_rewards"]) for line in lines) > 1
    one_rank = metrics[1, ""]
    for layout, actual_rows in metrics.items():
        for actual, expected in zip(actual_rows[1:], one_rank[1:], strict=True):
            for name in ("critic/score/mean", "reward_model/score/min", "actor/loss", "actor/grad_norm"):
                assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (layout, name)
