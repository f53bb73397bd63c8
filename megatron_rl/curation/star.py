"""What a model learns from its own right answers: chosen, rationalised by hints, and never with the hint.

Source: STaR, arXiv 2203.14465, algorithm 1; rejection sampling fine-tuning, arXiv 2308.01825.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rl.rewards.types import RewardInput

Line = dict[str, Any]
"""A recorded rollout, as rollout/record.py writes it."""


def right_ones(
    lines: Sequence[Line],
    grade: Callable[[RewardInput], float],
    *,
    min_reward: float,
    max_per_prompt: int,
    quality: Callable[[Line], float],
) -> list[Line]:
    """Of each prompt the best different responses that are right, in the order of the prompts.

    Args:
        grade: reward of a response to the prompt of its line; every response is graded again by it.
        quality: the higher, the better among right ones.
    """
    chosen: dict[str, list[Line]] = {}
    for line in sorted(lines, key=quality, reverse=True):
        kept = chosen.setdefault(line["prompt_id"], [])
        is_known = any(line["response"] == other["response"] for other in kept)
        is_wanted = line["status"] == "ok" and not is_known and len(kept) < max_per_prompt
        if is_wanted and grade(reward_input(line)) >= min_reward:
            kept.append(line)
    order = dict.fromkeys(line["prompt_id"] for line in lines)
    return [line for prompt_id in order for line in chosen.get(prompt_id, ())]


def unsolved(lines: Sequence[Line], solved: Sequence[Line]) -> list[Line]:
    """One line for each prompt of which none is among the solved ones."""
    known = {line["prompt_id"] for line in solved}
    first: dict[str, Line] = {}
    for line in lines:
        if line["prompt_id"] not in known:
            first.setdefault(line["prompt_id"], line)
    return list(first.values())


def hinted_row(line: Line, template: str) -> dict[str, Any]:
    """A row that asks the prompt of a line again, with its answer in the prompt.

    Args:
        template: with {prompt} and {answer}.
    """
    hinted = template.replace("{prompt}", line["prompt"]).replace("{answer}", str(line["answer"]))
    return {**line["metadata"], "prompt": hinted, "answer": line["answer"], "asked_as": line["prompt_id"]}


def without_hint(line: Line, asked: Mapping[str, Line]) -> Line:
    """The response to a hinted prompt, as if it had been given to the prompt without the hint.

    Args:
        asked: lines of the prompts without hints, by their prompt_id.
    """
    original = asked[line["metadata"]["asked_as"]]
    prompt, hinted = original["prompt_token_ids"], len(line["prompt_token_ids"])
    said = {
        name: [nothing] * len(prompt) + line[name][hinted:]
        for name, nothing in (("loss_mask", 0), ("logprobs", 0.0), ("policy_versions", -1))
    }
    same = {name: original[name] for name in ("prompt_id", "prompt", "prompt_token_ids", "answer", "metadata")}
    return {**line, **same, **said, "token_ids": prompt + line["token_ids"][hinted:], "step_rewards": []}


def as_steps(lines: Sequence[Line], per_step: int) -> list[list[Line]]:
    """Lines renumbered as whole steps that rollout.source=replay reads; those of the last one come again to fill it."""
    if not lines:
        return []
    filled = [*lines, *(lines[place % len(lines)] for place in range(-len(lines) % per_step))]
    return [
        [
            {**line, "step": start // per_step + 1, "group": place, "sample": 0}
            for place, line in enumerate(filled[start : start + per_step])
        ]
        for start in range(0, len(filled), per_step)
    ]


def reward_input(line: Line) -> RewardInput:
    """What a reward function reads of a line."""
    return RewardInput(
        prompt=line["prompt"],
        response=line["response"],
        answer=line["answer"],
        finish_reason=line["finish_reason"],
        num_tokens=sum(line["loss_mask"]),
        seed=line["seed"],
        metadata=line["metadata"],
    )
