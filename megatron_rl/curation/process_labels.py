"""Labels for the steps of solutions from sampled continuations, without human annotation.

Source: Math-Shepherd, arXiv 2312.08935 section 3.2: the rest of the solution is sampled several times from the end of
each step; the step's label is the share of its continuations that are right. The last step's label is that of the
solution.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rl.algorithms.reasoning_steps import step_label, step_spans
from megatron_rl.curation.star import Line, reward_input
from megatron_rl.rewards.types import RewardInput

Prefix = tuple[str, str]
"""Prompt and prefix of a response."""


def unique_solutions(lines: Sequence[Line]) -> list[Line]:
    """Drop responses that were not graded, and duplicates."""
    return list({(line["prompt"], line["response"]): line for line in lines if line["status"] == "ok"}.values())


def step_prefixes(line: Line, separator: str) -> list[Prefix]:
    """Return the prefix of a solution up to the end of each step but the last, separator included."""
    return [(line["prompt"], line["response"][:end]) for _, end in step_spans(line["response"], separator)[:-1]]


def continuation_row(line: Line, prefix: Prefix) -> dict[str, Any]:
    """Return a data row whose prompt is a solution's prefix, so that a model samples the rest."""
    prompt, start = prefix
    return {**line["metadata"], "prompt": prompt + start, "answer": line["answer"], "asked_as": prompt, "begun": start}


def grade_continuations(
    continuations: Sequence[Line],
    originals: Mapping[str, Line],
    is_right: Callable[[RewardInput], bool],
    num_continuations: int,
) -> dict[Prefix, list[bool]]:
    """Grade solutions with sampled ends.

    Args:
        continuations: recorded responses to rows of ``continuation_row``.
        originals: prompt -> a recorded line of it, for the metadata.
        is_right: grades a whole solution.
        num_continuations: continuations that count for each prefix, the first ones.

    Returns:
        prefix -> whether each of its continuations is right.
    """
    graded: dict[Prefix, list[bool]] = {}
    for line in continuations:
        prompt, start = line["metadata"]["asked_as"], line["metadata"]["begun"]
        grades = graded.setdefault((prompt, start), [])
        if len(grades) < num_continuations:
            whole = {**line, "prompt": prompt, "response": start + line["response"]}
            grades.append(is_right(reward_input({**whole, "metadata": originals[prompt]["metadata"]})))
    return graded


def labelled_row(
    line: Line,
    graded: Mapping[Prefix, Sequence[bool]],
    is_right: Callable[[RewardInput], bool],
    separator: str,
    *,
    soft: bool,
) -> dict[str, Any]:
    """Return a row of data.schema=stepwise: prompt, completions (steps) and labels.

    Args:
        line: a recorded solution.
        graded: result of ``grade_continuations``.
        is_right: grades the whole solution, for the last step.
        separator: text between steps.
        soft: labels are shares of right continuations; otherwise whether there is one.
    """
    labels = [step_label(graded[prefix], soft=soft) for prefix in step_prefixes(line, separator)]
    labels.append(float(is_right(reward_input(line))))
    response = line["response"]
    steps = [response[begin:end].removesuffix(separator) for begin, end in step_spans(response, separator)]
    return {
        "prompt": line["prompt"],
        "completions": steps,
        "labels": labels if soft else [label > 0 for label in labels],
        "answer": line["answer"],
    }
