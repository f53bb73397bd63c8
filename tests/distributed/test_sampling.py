"""Rollouts beyond one batch per step: partial, over-sampled, asynchronous, multi-turn, replayed; and curricula."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config.load import read_yaml
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.rollout.serialization import read_rollouts, rollout_from_json
from megatron_rl.trainer.inputs import load_inputs
from tests.distributed import cases
from tests.gang import Gang
from tests.toys import CHANGED_BY_RESUME, toy_config, without
from tools.analysis import inspect_rollouts
from tools.data import curate_by_pass_rate

PARTIAL = (
    "rollout.partial_rollout=true",
    "rollout.max_staleness=2",
    "rollout.over_sampling=2",
    "rollout.max_new_tokens=24",
)
LONG = ("data.max_prompt_tokens=8", "batching.num_mini_batches=1", "run.num_steps=6", "metrics.keep_rollouts_every=1")


@pytest.fixture
def run(gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that runs a training on a number of ranks with overrides and returns its folder."""

    def start(world_size: int, *overrides: str, name: str = "run") -> Path:
        folder = tmp_path / name
        config = toy_config(tmp_path, toy_model("qwen2"), f"run.output_dir={folder}", *overrides)
        gangs(world_size).call(cases.run_training, config=config)
        return folder

    return start


def rows(folder: Path) -> list[dict[str, Any]]:
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in metrics if row["step"] > 0]


def untimed(folder: Path) -> list[dict[str, Any]]:
    return without(CHANGED_BY_RESUME, rows(folder))


def all_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for path in sorted((folder / "rollouts").glob("*.jsonl")) for line in read_rollouts(path)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_unfinished_samples_are_carried_over_and_trained_on_once(world_size: int, run: Callable[..., Path]) -> None:
    folder = run(world_size, *LONG, *PARTIAL, "rollout.max_num_sequences=8", "rollout.schedule=dynamic")
    metrics = rows(folder)
    assert max(row["rollout/carried_over"] for row in metrics) > 0
    assert 0 < max(row["rollout/staleness/max"] for row in metrics) <= 2
    lines = all_lines(folder)
    assert len(lines) == 6 * 4 * 4
    assert len({(line["prompt_id"], line["seed"]) for line in lines}) == len(lines)
    mixed = [line for line in lines if len({v for v in line["policy_versions"] if v >= 0}) > 1]
    assert mixed, "some samples have tokens of several policy versions"
    for line in lines:
        versions = [v for v in line["policy_versions"] if v >= 0]
        assert versions == sorted(versions)
        assert line["step"] - 1 - versions[0] <= 2


def test_resume_with_carried_over_samples_continues_bit_for_bit(run: Callable[..., Path]) -> None:
    """Advantages with noise depend on torch's random state, which is restored as well."""
    noise = "algorithm.advantage=tests.own_advantages:with_noise"
    options = (*LONG, *PARTIAL, "rollout.max_num_sequences=8", noise)
    whole = run(1, *options, name="whole")
    run(1, *options, "run.num_steps=3", name="parts")
    assert (whole.parent / "parts/checkpoints/step_000003/in_flight.jsonl").exists()
    parts = run(1, *options, name="parts")
    assert untimed(parts) == untimed(whole)


def test_stale_samples_are_restarted(run: Callable[..., Path]) -> None:
    stale = (*LONG, *PARTIAL, "rollout.max_staleness=1", "rollout.max_num_sequences=64", "rollout.over_sampling=4")
    metrics = rows(run(1, *stale))
    assert sum(row["rollout/restarted_as_stale"] for row in metrics) > 0
    assert max(row["rollout/staleness/max"] for row in metrics) <= 1


def test_without_partial_rollouts_surplus_samples_are_aborted_and_counted(run: Callable[..., Path]) -> None:
    metrics = rows(run(1, *LONG, "rollout.over_sampling=2", "rollout.max_num_sequences=8"))
    assert sum(row["rollout/aborted"] for row in metrics) > 0
    assert {row["rollout/carried_over"] for row in metrics} == {0}
    assert {row["rollout/staleness/max"] for row in metrics} == {0}


def test_groups_with_zero_std_are_replaced(run: Callable[..., Path]) -> None:
    flips = ("reward.functions=[{name: coin_flip, options: {probability: 0.1}}]", "rollout.dynamic_sampling=true")
    metrics = rows(run(2, *LONG, *flips))
    assert sum(row["rollout/zero_std/replaced"] for row in metrics) > 0
    assert {row["rollout/zero_std/count"] for row in metrics} == {0}
    assert max(row["rollout/rounds"] for row in metrics) > 1


def test_a_step_is_filled_with_zero_std_groups_after_max_rounds(run: Callable[..., Path]) -> None:
    never = ("reward.functions=[{name: coin_flip, options: {probability: 0.0}}]", "rollout.dynamic_sampling=true")
    metrics = rows(run(1, *LONG, *never, "rollout.max_rounds=2", "run.num_steps=2"))
    assert {(row["rollout/rounds"], row["rollout/zero_std/count"]) for row in metrics} == {(2, 4)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_async_rollout_samples_the_next_step_during_the_update(world_size: int, run: Callable[..., Path]) -> None:
    options = ("rollout.async_rollout=true", "rollout.max_staleness=1", "validation.every=2")
    metrics = rows(run(world_size, *LONG, *options))
    assert [row["rollout/staleness/mean"] for row in metrics] == [0, 1, 1, 1, 1, 1]
    assert [row["rollout/staleness/max"] for row in metrics] == [0, 1, 1, 1, 1, 1]


def test_the_loss_mask_of_multi_turn_rollouts_covers_responses_only(run: Callable[..., Path]) -> None:
    options = ("rollout.environment=guess_number", "rollout.max_turns=3", "rollout.max_new_tokens=48")
    folder = run(2, *LONG, *options, "reward.functions=[]")
    lines = all_lines(folder)
    turns = []
    for line in lines:
        rollout = rollout_from_json(line)
        mask = rollout.loss_mask.tolist()
        turns.append(sum(b and not a for a, b in pairwise(mask)))
        assert rollout.reward_parts.keys() == {"environment"}
        assert sum(rollout.step_rewards.values()) == pytest.approx(rollout.reward)
        ends = [index for index, (b, after) in enumerate(zip(mask, [*mask[1:], False], strict=True)) if b and not after]
        assert set(rollout.step_rewards) <= set(ends)
    assert max(turns) > 1, "some samples have several turns"


@pytest.mark.parametrize("advantage", ["process", "turn_gae", "bi_level_gae"])
def test_turns_have_advantages_of_their_own(advantage: str, run: Callable[..., Path]) -> None:
    options = ("rollout.environment=guess_number", "rollout.max_turns=3", "rollout.max_new_tokens=48")
    critic = ("critic.parallel.pipeline_parallel_size=2", "algorithm.turn_gamma=0.9") if "gae" in advantage else ()
    chosen = (f"algorithm.advantage={advantage}", "algorithm.top_std_fraction=0.5")
    folder = run(2, *LONG, *options, *critic, *chosen, "reward.functions=[]")
    metrics = rows(folder)
    assert len(metrics) == 6
    assert {row["batch/num_trained_rollouts"] for row in metrics} == {8}, "half of the groups"
    assert all(row["critic/advantages/max"] > row["critic/advantages/min"] for row in metrics)
    assert ("critic/vf_loss" in metrics[-1]) == (advantage != "process")


def test_the_greedy_baseline_is_subtracted_from_rewards(run: Callable[..., Path]) -> None:
    always = ("reward.functions=[{name: coin_flip, options: {probability: 1.0}}]", "algorithm.advantage=reinforce")
    for greedy, advantage in (("true", 0), ("false", 1)):
        metrics = rows(run(2, *LONG, *always, f"rollout.greedy_baseline={greedy}", "rollout.group_size=1", name=greedy))
        assert {row["critic/score/mean"] for row in metrics} == {1}
        assert {(row["critic/advantages/min"], row["critic/advantages/max"]) for row in metrics} == {(advantage,) * 2}


def test_distillation_reduces_the_kl_to_the_teacher_without_rewards(
    run: Callable[..., Path], toy_model: Callable[..., Path]
) -> None:
    teacher = toy_model("qwen2", tied=False)
    options = ("algorithm.advantage=distillation", f"algorithm.reference_path={teacher}", "reward.functions=[]")
    plain = (
        "algorithm.loss=policy_gradient",
        "algorithm.kl_coef=0",
        "algorithm.entropy_coef=0",
        "data.validation=null",
    )
    metrics = rows(run(2, *LONG, *options, *plain, "run.num_steps=12", "optimizer.lr=3e-3"))
    divergence = [row["critic/kl"] for row in metrics]
    assert [row["critic/advantages/mean"] for row in metrics] == pytest.approx([-kl for kl in divergence])
    assert sum(divergence[-3:]) < 0.7 * sum(divergence[:3])


def test_a_step_without_accepted_rollouts_leaves_the_weights_unchanged(run: Callable[..., Path]) -> None:
    options = ("algorithm.loss=nll", "algorithm.accept_min_reward=1", "checkpoint.save_hf=true", "algorithm.kl_coef=0")
    never = "reward.functions=[{name: coin_flip, options: {probability: 0.0}}]"
    folder = run(2, *LONG, *options, never, "run.num_steps=2")
    metrics = rows(folder)
    assert [row["batch/num_trained_rollouts"] for row in metrics] == [0, 0]
    assert not any("actor/loss" in row for row in metrics)
    base = load_file(Path(read_yaml(folder / "config.yaml")["model"]["path"]) / "model.safetensors")
    saved = load_file(folder / "checkpoints/step_000002/hf/model.safetensors")
    assert all(torch.equal(saved[name], base[name]) for name in saved)


CURRICULUM = (
    "data.train.options={min_numbers: 2, max_numbers: 4, prompt: '{target}=', num_train: 64}",
    "data.train.path=countdown",
    "reward.functions=[{name: coin_flip}]",
    "data.curriculum=[{from_step: 1, where: {nums: [2, 2]}, max_new_tokens: 6},"
    " {from_step: 3, where: {nums: [3, 4]}, max_new_tokens: 12}, {from_step: 5}]",
)


def test_resume_within_a_curriculum_continues_bit_for_bit(run: Callable[..., Path]) -> None:
    options = (*LONG, *CURRICULUM, "rollout.max_new_tokens=24", "validation.functions=[{name: coin_flip}]")
    whole = run(1, *options, name="whole")
    for num_steps in ("3", "6"):  # the stage of steps 3 and 4 is interrupted
        parts = run(1, *options, f"run.num_steps={num_steps}", name="parts")
    assert untimed(parts) == untimed(whole)
    assert [row["data/stage"] for row in rows(whole)] == [1, 1, 2, 2, 3, 3]
    sizes: dict[int, set[int]] = defaultdict(set)
    lengths: dict[int, int] = defaultdict(int)
    for line in all_lines(whole):
        sizes[line["step"]].add(len(line["metadata"]["nums"]))
        lengths[line["step"]] = max(lengths[line["step"]], sum(line["loss_mask"]))
    assert sizes[1] == sizes[2] == {2}
    assert sizes[3] | sizes[4] == {3, 4}
    curated = whole / "curated.jsonl"
    assert curate_by_pass_rate.main([str(whole / "rollouts"), str(curated)]) == 0
    curated_rows = [json.loads(line) for line in curated.read_text().splitlines()]
    graded = [line["reward"] for line in all_lines(whole)]
    assert sum(row["pass_rate"] * row["num_samples"] for row in curated_rows) == pytest.approx(sum(graded))
    assert {len(row["nums"]) for row in curated_rows} == {2, 3, 4}
    assert lengths[1] <= 6 < lengths[3] <= 12 < max(lengths[5], lengths[6])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{from_step: 2}]", "from_step=\\[2\\].*1 in the first"),
        ("[{from_step: 1}, {from_step: 1}]", "from_step=\\[1, 1\\]"),
        ("[{from_step: 1, where: {a: [2, 1]}}]", "where.a=.*smallest, largest"),
        ("[{from_step: 1, where: {nums: [9, 9]}}]", "none of 64 prompts is in stage 1"),
        ("[{from_step: 1, where: {level: [1, 2]}}]", "no column 'level'. Columns: demonstration, nums, target"),
        ("[{from_step: 1, max_new_tokens: 99}]", "max_new_tokens=99.*for which the engine is built"),
    ],
)
def test_invalid_curricula_are_rejected(
    stages: str, message: str, toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        load_inputs(toy_config(tmp_path, toy_model("qwen2"), *CURRICULUM[:3], f"data.curriculum={stages}"), 1)


def test_replayed_rollouts_give_the_same_weights(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = (*LONG, "checkpoint.save_hf=true", "algorithm.rollout_is=token_truncate")
    recorded = run(2, *options, name="recorded")
    replay = ("rollout.source=replay", f"rollout.replay_path={recorded / 'rollouts'}", "metrics.keep_rollouts_every=0")
    replayed = run(2, *options, *replay, name="replayed")
    saved = [load_file(run_ / "checkpoints/step_000006/hf/model.safetensors") for run_ in (recorded, replayed)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert inspect_rollouts.main([str(recorded / "rollouts")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert inspect_rollouts.main([str(recorded / "rollouts"), "--step", "2", "--sort", "best", "--tokens"]) == 0
    shown = capsys.readouterr().out
    assert "16 of 16 rollouts of step 2, 8 shown" in shown
    rewards = [float(text) for text in re.findall(r"reward (\S+) \(", shown)]
    assert len(rewards) == 8
    assert rewards == sorted(rewards, reverse=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.partial_rollout=true", "rollout.max_staleness=0.*at least 1 with rollout.partial_rollout=true"),
        ("rollout.async_rollout=true", "rollout.max_staleness=0.*at least 1 with rollout.async_rollout=true"),
        ("rollout.over_sampling=0.5", "rollout.over_sampling=0.5.*1 or more"),
        ("rollout.turn_template=abc", r"rollout.turn_template='abc'.*\{observation\}"),
        ("rollout.source=replay", "rollout.replay_path=None.*no other source uses it"),
        ("rollout.environment=sokoban", "rollout.environment='sokoban'.*guess_number"),
    ],
)
def test_contradictory_options_are_rejected(
    override: str, message: str, toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_inputs(toy_config(tmp_path, toy_model("qwen2"), override), 1)


def test_memory_does_not_grow_over_fifty_steps(run: Callable[..., Path]) -> None:
    options = (
        "run.num_steps=50",
        "rollout.sleep_engine=true",
        "memory.offload=[params,grads,optimizer]",
        "validation.every=10",
    )
    metrics = rows(run(1, *LONG, *options, "metrics.keep_rollouts_every=0"))
    for phase, asleep, awake in (
        ("generation", "policy_params", "engine_weights"),
        ("update", "engine_weights", "policy_params"),
    ):
        assert {row[f"memory/{phase}/{asleep}_mb"] for row in metrics} == {0}
        assert len({row[f"memory/{phase}/{awake}_mb"] for row in metrics} - {0}) == 1
    held = [row["memory/update/rank_mb"] for row in metrics]
    assert max(held[40:]) - max(held[10:20]) < 2, "the process grows by less than 2 MB in 30 steps"
