"""Labels for the steps of solutions from what becomes of them: no person has to judge a step.

Source: Math-Shepherd, arXiv 2312.08935 section 3.2: from the end of each step the rest is sampled several times; a step
is as good as the share of its continuations that end right. The last step is as good as the solution.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rl.algorithms.reasoning_steps import step_label, step_spans
from megatron_rl.curation.star import Line, reward_input
from megatron_rl.rewards.types import RewardInput

Prefix = tuple[str, str]
"""Prompt and beginning of a response."""


def different(lines: Sequence[Line]) -> list[Line]:
    """Graded responses, each once."""
    return list({(line["prompt"], line["response"]): line for line in lines if line["status"] == "ok"}.values())


def beginnings(line: Line, separator: str) -> list[Prefix]:
    """A solution up to the end of each of its steps but the last, separator included."""
    return [(line["prompt"], line["response"][:end]) for _, end in step_spans(line["response"], separator)[:-1]]


def asked_row(line: Line, prefix: Prefix) -> dict[str, Any]:
    """A row that asks for the rest of a solution."""
    prompt, begun = prefix
    return {**line["metadata"], "prompt": prompt + begun, "answer": line["answer"], "asked_as": prompt, "begun": begun}


def graded_rests(
    rests: Sequence[Line], asked: Mapping[str, Line], is_right: Callable[[RewardInput], bool], num_rests: int
) -> dict[Prefix, list[bool]]:
    """Whether solutions with sampled ends are right, by their beginnings, of each the first so many.

    Args:
        rests: recorded responses to rows of ``asked_row``.
        asked: a line of each prompt, by its text.
    """
    found: dict[Prefix, list[bool]] = {}
    for rest in rests:
        prompt, begun = rest["metadata"]["asked_as"], rest["metadata"]["begun"]
        graded = found.setdefault((prompt, begun), [])
        if len(graded) < num_rests:
            whole = {**rest, "prompt": prompt, "response": begun + rest["response"]}
            graded.append(is_right(reward_input({**whole, "metadata": asked[prompt]["metadata"]})))
    return found


def labelled(
    line: Line,
    graded: Mapping[Prefix, Sequence[bool]],
    is_right: Callable[[RewardInput], bool],
    separator: str,
    *,
    soft: bool,
) -> dict[str, Any]:
    """A row of the public schema: prompt, completions (steps), labels.

    Args:
        graded: as ``graded_rests`` gives it.
        soft: labels are shares; otherwise true or false.
    """
    labels = [step_label(graded[prefix], soft=soft) for prefix in beginnings(line, separator)]
    labels.append(float(is_right(reward_input(line))))
    response = line["response"]
    steps = [response[begin:end].removesuffix(separator) for begin, end in step_spans(response, separator)]
    return {
        "prompt": line["prompt"],
        "completions": steps,
        "labels": labels if soft else [label > 0 for label in labels],
        "answer": line["answer"],
    }
