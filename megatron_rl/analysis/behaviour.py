"""How responses behave: right or not, how long, reflecting, answering at all. Pure functions of what was said."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.analysis.reflection import POOLS, REFLECTION, keywords_in
from megatron_rl.reporting.stats import mean, pass_at_k, repetition

REFLECTS = 2
"""The judge's category of reflection."""
MOST_SAMPLES = 8
"""k of pass@k, where there are as many samples."""


@dataclass(frozen=True, kw_only=True)
class ResponseRecord:
    """A response."""

    label: str
    """With which others of its source it belongs together: a training step, or a task with template and temperature."""
    key: str
    """The same for all samples of a question."""
    source: str = ""
    """Which of several runs or evaluations it comes from; empty where there is one."""
    question: str
    response: str
    is_right: bool
    num_tokens: int
    is_truncated: bool
    has_answer: bool
    """An answer could be extracted."""
    judged: Mapping[str, int] = field(default_factory=dict)
    """Verdict -> category, where a judge was asked and said one."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What the responses of a source with a label come to."""

    label: str
    source: str
    num_responses: int
    num_questions: int
    rates: Mapping[str, float]
    """Of which something is known."""

    @property
    def title(self) -> str:
        """Source and label."""
        return f"{self.source} {self.label}".strip()


def behaviour(said: Sequence[ResponseRecord]) -> Behaviour:
    """Rates over responses, and over questions where the name says so.

    Args:
        said: at least one response; all have the first one's source and label.
    """
    questions: dict[str, list[ResponseRecord]] = {}
    for one in said:
        questions.setdefault(one.key, []).append(one)
    k = min(MOST_SAMPLES, *(len(samples) for samples in questions.values()))
    passed = [pass_at_k(len(found), sum(one.is_right for one in found), k) for found in questions.values()]
    rates = {
        "accuracy": mean([one.is_right for one in said]),
        f"pass@{k}": mean(passed),
        "answered": mean([one.has_answer for one in said]),
        "truncated": mean([one.is_truncated for one in said]),
        "repetition": mean([repetition(one.response) for one in said]),
        "response_length": mean([one.num_tokens for one in said]),
        "response_length_right": mean([one.num_tokens for one in said if one.is_right]),
        "response_length_wrong": mean([one.num_tokens for one in said if not one.is_right]),
    }
    marks = {pool: [bool(keywords_in(one.response, pool)) for one in said] for pool in POOLS}
    judged = [one.judged.get("reflection") for one in said]
    if any(category is not None for category in judged):
        by_judge = [category == REFLECTS for category in judged]
        marks["judge"] = by_judge
        # as understand-r1-zero counts: keywords alone mistake, and so does a judge alone
        marks["keywords_and_judge"] = [a and b for a, b in zip(marks["understand_r1_zero"], by_judge, strict=True)]
        for number, name in REFLECTION.categories.items():
            rates[f"judged/{name}"] = mean([category == number for category in judged])
        rates["judged/unreadable"] = mean([category is None for category in judged])
    for name, found in marks.items():
        rates |= _reflection(name, said, found, questions)
    answering = [one.judged["answering"] for one in said if "answering" in one.judged]
    rates["answered_by_judge"] = mean([float(one == 1) for one in answering])
    return Behaviour(
        label=said[0].label,
        source=said[0].source,
        num_responses=len(said),
        num_questions=len(questions),
        rates={name: value for name, value in rates.items() if not math.isnan(value)},
    )


def _reflection(
    name: str, said: Sequence[ResponseRecord], marks: Sequence[bool], questions: Mapping[str, Sequence[ResponseRecord]]
) -> dict[str, float]:
    """Shares of responses, and of questions with any such response; and how many of the responses are right."""
    marked = {one.key for one, mark in zip(said, marks, strict=True) if mark}
    return {
        f"reflection/{name}": mean([float(mark) for mark in marks]),
        f"reflection/{name}/questions": len(marked) / len(questions),
        f"accuracy/{name}/with": mean([one.is_right for one, mark in zip(said, marks, strict=True) if mark]),
        f"accuracy/{name}/without": mean([one.is_right for one, mark in zip(said, marks, strict=True) if not mark]),
    }


def by_label(said: Sequence[ResponseRecord]) -> list[Behaviour]:
    """Of each source and label, in the order in which they come."""
    found: dict[tuple[str, str], list[ResponseRecord]] = {}
    for one in said:
        found.setdefault((one.source, one.label), []).append(one)
    return [behaviour(several) for several in found.values()]
