"""Behaviour rates of responses: accuracy, length, self-reflection, answering, repetition. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rl.analysis.reflection import POOLS, REFLECTION, keywords_in
from megatron_rl.reporting.stats import mean, pass_at_k, repetition

REFLECTS = 2
"""Category "reflection" of the LLM judge."""
MAX_K = 8
"""Largest k of pass@k; lower if a question has fewer samples."""


@dataclass(frozen=True, kw_only=True)
class ResponseRecord:
    """One response of a run or an evaluation."""

    label: str
    """Name of the set to which it belongs: a training step, or a task with template and temperature."""
    key: str
    """Identifies the question; equal for all its samples."""
    source: str = ""
    """Run or evaluation from which it comes; empty if there is only one."""
    question: str
    response: str
    is_right: bool
    num_tokens: int
    is_truncated: bool
    has_answer: bool
    """Whether an answer could be extracted."""
    judge_categories: Mapping[str, int] = field(default_factory=dict)
    """Name of a rubric -> category, if an LLM judge assigned one."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Rates of the responses with one source and label."""

    label: str
    source: str
    num_responses: int
    num_questions: int
    rates: Mapping[str, float]
    """Name -> value; rates that are NaN are absent."""

    @property
    def title(self) -> str:
        """Source and label, as one heading."""
        return f"{self.source} {self.label}".strip()


def behaviour(records: Sequence[ResponseRecord]) -> Behaviour:
    """Compute rates over responses, and over questions where the name says so.

    Args:
        records: at least one response, all with the same source and label.
    """
    questions: dict[str, list[ResponseRecord]] = {}
    for one in records:
        questions.setdefault(one.key, []).append(one)
    k = min(MAX_K, *(len(samples) for samples in questions.values()))
    passed = [pass_at_k(len(samples), sum(one.is_right for one in samples), k) for samples in questions.values()]
    rates = {
        "accuracy": mean([one.is_right for one in records]),
        f"pass@{k}": mean(passed),
        "answered": mean([one.has_answer for one in records]),
        "truncated": mean([one.is_truncated for one in records]),
        "repetition": mean([repetition(one.response) for one in records]),
        "response_length": mean([one.num_tokens for one in records]),
        "response_length_right": mean([one.num_tokens for one in records if one.is_right]),
        "response_length_wrong": mean([one.num_tokens for one in records if not one.is_right]),
    }
    marks = {pool: [bool(keywords_in(one.response, pool)) for one in records] for pool in POOLS}
    categories = [one.judge_categories.get("reflection") for one in records]
    if any(category is not None for category in categories):
        by_judge = [category == REFLECTS for category in categories]
        marks["judge"] = by_judge
        # as understand-r1-zero counts, because keywords alone and a judge alone both misclassify
        marks["keywords_and_judge"] = [a and b for a, b in zip(marks["understand_r1_zero"], by_judge, strict=True)]
        for number, name in REFLECTION.categories.items():
            rates[f"judged/{name}"] = mean([category == number for category in categories])
        rates["judged/unreadable"] = mean([category is None for category in categories])
    for name, flags in marks.items():
        rates |= _reflection(name, records, flags, questions)
    answering = [one.judge_categories["answering"] for one in records if "answering" in one.judge_categories]
    rates["answered_by_judge"] = mean([float(one == 1) for one in answering])
    return Behaviour(
        label=records[0].label,
        source=records[0].source,
        num_responses=len(records),
        num_questions=len(questions),
        rates={name: value for name, value in rates.items() if not math.isnan(value)},
    )


def _reflection(
    name: str,
    records: Sequence[ResponseRecord],
    marks: Sequence[bool],
    questions: Mapping[str, Sequence[ResponseRecord]],
) -> dict[str, float]:
    """Return the share of marked responses, of questions with one, and the accuracy with and without a mark."""
    marked = {one.key for one, mark in zip(records, marks, strict=True) if mark}
    return {
        f"reflection/{name}": mean([float(mark) for mark in marks]),
        f"reflection/{name}/questions": len(marked) / len(questions),
        f"accuracy/{name}/with": mean([one.is_right for one, mark in zip(records, marks, strict=True) if mark]),
        f"accuracy/{name}/without": mean([one.is_right for one, mark in zip(records, marks, strict=True) if not mark]),
    }


def by_label(records: Sequence[ResponseRecord]) -> list[Behaviour]:
    """Compute the behaviour of each source and label, in order of first occurrence."""
    groups: dict[tuple[str, str], list[ResponseRecord]] = {}
    for one in records:
        groups.setdefault((one.source, one.label), []).append(one)
    return [behaviour(group) for group in groups.values()]
