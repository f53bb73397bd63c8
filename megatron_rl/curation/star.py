"""Training data from a model's own right responses, some of them generated with a hint that is then removed.

Source: STaR, arXiv 2203.14465, algorithm 1; rejection sampling fine-tuning, arXiv 2308.01825.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rl.rewards.types import RewardInput

Line = dict[str, Any]
"""A recorded rollout, as rollout/serialization.py writes it."""


def select_correct(
    lines: Sequence[Line],
    grade: Callable[[RewardInput], float],
    *,
    min_reward: float,
    max_per_prompt: int,
    quality: Callable[[Line], float],
) -> list[Line]:
    """Select the best distinct right responses of each prompt, in the order of the prompts.

    Args:
        lines: recorded responses.
        grade: reward function, with which every response is graded again.
        min_reward: reward from which on a response is right.
        max_per_prompt: number of responses to keep of a prompt.
        quality: ranks the right responses of a prompt; higher is better.
    """
    selected: dict[str, list[Line]] = {}
    for line in sorted(lines, key=quality, reverse=True):
        kept = selected.setdefault(line["prompt_id"], [])
        is_duplicate = any(line["response"] == other["response"] for other in kept)
        is_eligible = line["status"] == "ok" and not is_duplicate and len(kept) < max_per_prompt
        if is_eligible and grade(reward_input(line)) >= min_reward:
            kept.append(line)
    order = dict.fromkeys(line["prompt_id"] for line in lines)
    return [line for prompt_id in order for line in selected.get(prompt_id, ())]


def unsolved(lines: Sequence[Line], solved: Sequence[Line]) -> list[Line]:
    """Return one line of each prompt that has no line in ``solved``."""
    solved_ids = {line["prompt_id"] for line in solved}
    first: dict[str, Line] = {}
    for line in lines:
        if line["prompt_id"] not in solved_ids:
            first.setdefault(line["prompt_id"], line)
    return list(first.values())


def hinted_row(line: Line, template: str) -> dict[str, Any]:
    """Return a data row with the prompt of a line and its answer as a hint.

    Args:
        line: a recorded response.
        template: text with {prompt} and {answer}.
    """
    hinted = template.replace("{prompt}", line["prompt"]).replace("{answer}", str(line["answer"]))
    return {**line["metadata"], "prompt": hinted, "answer": line["answer"], "asked_as": line["prompt_id"]}


def without_hint(line: Line, originals: Mapping[str, Line]) -> Line:
    """Replace the hinted prompt of a response by the original prompt.

    Args:
        line: recorded response to a row of ``hinted_row``.
        originals: prompt_id -> a line of the prompt without hint.
    """
    original = originals[line["metadata"]["asked_as"]]
    prompt, hinted = original["prompt_token_ids"], len(line["prompt_token_ids"])
    token_arrays = {
        name: [padding] * len(prompt) + line[name][hinted:]
        for name, padding in (("loss_mask", 0), ("logprobs", 0.0), ("policy_versions", -1))
    }
    prompt_fields = {name: original[name] for name in ("prompt_id", "prompt", "prompt_token_ids", "answer", "metadata")}
    return {
        **line,
        **prompt_fields,
        **token_arrays,
        "token_ids": prompt + line["token_ids"][hinted:],
        "step_rewards": [],
    }


def as_steps(lines: Sequence[Line], per_step: int) -> list[list[Line]]:
    """Renumber lines as complete steps for rollout.source=replay; the first lines repeat to fill the last step."""
    if not lines:
        return []
    filled = [*lines, *(lines[index % len(lines)] for index in range(-len(lines) % per_step))]
    return [
        [
            {**line, "step": start // per_step + 1, "group": index, "sample": 0}
            for index, line in enumerate(filled[start : start + per_step])
        ]
        for start in range(0, len(filled), per_step)
    ]


def reward_input(line: Line) -> RewardInput:
    """Return the input of reward functions for a recorded line."""
    return RewardInput(
        prompt=line["prompt"],
        response=line["response"],
        answer=line["answer"],
        finish_reason=line["finish_reason"],
        num_tokens=sum(line["loss_mask"]),
        seed=line["seed"],
        metadata=line["metadata"],
    )
