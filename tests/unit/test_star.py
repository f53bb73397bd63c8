"""STaR: which responses are kept, which prompts are sampled again with a hint, and how the hint is removed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.curation.star import as_steps, hinted_row, select_correct, unsolved, without_hint
from megatron_rl.rollout.serialization import read_rollouts, rollout_from_json
from tests import forked
from tests.toys import write_config

ROOT = Path(__file__).resolve().parents[2]


def line(prompt: str, response: str, *, logprob: float = 0.0, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a recorded rollout with three prompt tokens and two response tokens."""
    return {
        "format": 1, "step": 1, "group": 0, "sample": 0, "prompt_id": f"train/{prompt}", "prompt": prompt,
        "prompt_token_ids": [1, 2, 3], "answer": "7", "demonstration": None, "metadata": metadata or {},
        "response": response, "finish_reason": "stop", "reward": 1.0, "reward_parts": {}, "status": "ok", "failure": "",
        "seed": 0, "token_ids": [1, 2, 3, 8, 9], "loss_mask": [0, 0, 0, 1, 1], "logprobs": [0, 0, 0, logprob, logprob],
        "policy_versions": [-1, -1, -1, 0, 0], "step_rewards": [],
    }  # fmt: skip


def kept_responses(lines: list[dict[str, Any]], max_per_prompt: int = 4) -> list[str]:
    selected = select_correct(
        lines,
        lambda sample: float(sample.response.endswith(sample.answer or "")),
        min_reward=1.0,
        max_per_prompt=max_per_prompt,
        quality=lambda one: sum(one["logprobs"]),
    )
    return [one["response"] for one in selected]


def test_the_best_distinct_correct_responses_are_kept() -> None:
    lines = [
        line("a", "worse 7", logprob=-2), line("a", "wrong 8"), line("a", "good 7", logprob=-1),
        line("a", "good 7", logprob=-1), line("a", "worst 7", logprob=-3), line("b", "wrong"), line("c", "7"),
    ]  # fmt: skip
    assert kept_responses(lines) == ["good 7", "worse 7", "worst 7", "7"]
    assert kept_responses(lines, max_per_prompt=2) == ["good 7", "worse 7", "7"]
    assert kept_responses([{**lines[0], "status": "reward_error"}]) == []
    assert [one["prompt"] for one in unsolved(lines, [lines[0], lines[6]])] == ["b"]


def test_a_hint_is_in_the_prompt_and_removed_for_training() -> None:
    original = line("3+4=", "wrong", metadata={"level": 1})
    row = hinted_row(original, "{prompt} (it is {answer}) ")
    assert row == {"level": 1, "prompt": "3+4= (it is 7) ", "answer": "7", "asked_as": "train/3+4="}
    answered = {
        **line("3+4= (it is 7) ", "so 7", metadata={"level": 1, "asked_as": "train/3+4="}),
        "prompt_token_ids": [1, 2, 3, 4, 5], "token_ids": [1, 2, 3, 4, 5, 8, 9], "loss_mask": [0, 0, 0, 0, 0, 1, 1],
        "logprobs": [0, 0, 0, 0, 0, -1, -2], "policy_versions": [-1] * 5 + [0, 0],
    }  # fmt: skip
    unhinted = without_hint(answered, {original["prompt_id"]: original})
    assert (unhinted["prompt"], unhinted["response"], unhinted["metadata"]) == ("3+4=", "so 7", {"level": 1})
    assert unhinted["token_ids"] == [1, 2, 3, 8, 9]
    assert unhinted["logprobs"] == [0, 0, 0, -1, -2]
    assert rollout_from_json(unhinted).loss_mask.tolist() == [False, False, False, True, True]


def test_the_last_step_is_filled_with_repeated_lines() -> None:
    lines = [line(name, "7") for name in "abcde"]
    steps = as_steps(lines, 2)
    assert [[one["prompt"] for one in step] for step in steps] == [["a", "b"], ["c", "d"], ["e", "a"]]
    assert [one["step"] for step in steps for one in step] == [1, 1, 2, 2, 3, 3]
    assert as_steps([], 2) == []


def test_rounds_train_the_base_model_and_keep_only_correct_responses(
    toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Use a random model, and a reward that some of its responses satisfy by chance."""
    model = toy_model("qwen2")
    config = write_config(tmp_path, model)
    command = [
        sys.executable, "tools/data/star.py", "--sample", str(config), "--learn", str(config), "--output",
        str(tmp_path / "star"), "--rounds", "2", "--num-ranks", "1", "--hint", "{answer}?{prompt}", "--min-reward",
        "0.6", "data.train.limit=8", "algorithm.kl_coef=0", "batching.num_mini_batches=1",
        "rollout.num_prompts_per_step=2",
    ]  # fmt: skip
    done = forked.run(command)
    logs = "".join(log.read_text()[-3000:] for log in (tmp_path / "star").rglob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert len(done.stdout.splitlines()) == 4, done.stdout
    for number in (1, 2):
        folder = tmp_path / "star" / f"round_{number}"
        selected = [one for path in sorted((folder / "kept").glob("*.jsonl")) for one in read_rollouts(path)]
        assert selected
        for one in selected:
            digits = sum(character.isdigit() for character in one["response"])
            assert digits / max(1, len(one["response"])) >= 0.6
            assert "?" not in one["prompt"]
            assert "asked_as" not in one["metadata"]
        resolved = (folder / "learnt" / "config.yaml").read_text()
        assert f"path: {model}" in resolved, "each round trains the base model"
        hinted = [json.loads(row)["prompt"] for row in (folder / "hinted.jsonl").read_text().splitlines()]
        assert all("?" in prompt for prompt in hinted)
    second = (tmp_path / "star/round_2/samples/config.yaml").read_text()
    assert "round_1/learnt/checkpoints" in second, "round 2 samples from the model of round 1"
