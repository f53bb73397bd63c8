"""Scores of a task from its graded answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_rl.config.evaluation import TaskConfig
from megatron_rl.evaluation.answers import GradedAnswer
from megatron_rl.evaluation.majority_vote import majority
from megatron_rl.reporting.stats import bootstrap_interval, mean, pass_at_k, repetition, standard_error


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Results of one task."""

    task: str
    version: int
    num_questions: int
    num_samples: int
    """Samples of each question."""
    scores: Mapping[str, float]
    """Accuracy (avg@k) with standard error and 95 % interval, pass@k, maj@k, lengths in tokens, shares."""
    rates: Sequence[float] = ()
    """Share of right samples of each question, in the order of the questions."""
    groups: Mapping[str, float] = field(default_factory=dict)
    """Accuracy by the task's group_field."""
    notes: Sequence[str] = ()
    """Warnings for the reader, such as a missing part of the data set."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields for results.json, with null for NaN, which JSON lacks."""
        scores = {name: None if math.isnan(value) else value for name, value in self.scores.items()}
        return {**asdict(self), "scores": scores}


def task_result(
    task: TaskConfig,
    answers: Mapping[int, Sequence[GradedAnswer]],
    clusters: Mapping[int, Sequence[int | None]],
    groups: Mapping[int, str | None],
    notes: Sequence[str],
) -> TaskResult:
    """Compute the scores of a task.

    Args:
        task: the benchmark's configuration.
        answers: question index -> graded answers, in the order of the samples.
        clusters: question index -> ``Grader.cluster_answers``; empty without a majority vote.
        groups: question index -> value of the task's group_field.
        notes: warnings for the reader.
    """
    k = task.sampling.num_samples
    rates = {question: mean([float(one.right) for one in samples]) for question, samples in answers.items()}
    all_answers = [one for samples in answers.values() for one in samples]
    values = list(rates.values())
    low, high = bootstrap_interval(values)
    scores = {
        f"avg@{k}": mean(values),
        "standard_error": standard_error(values),
        "interval_low": low,
        "interval_high": high,
        **{
            f"pass@{n}": mean([pass_at_k(k, sum(one.right for one in samples), n) for samples in answers.values()])
            for n in task.pass_at
        },
    }
    if task.majority and k > 1:
        voted = {question: majority(clusters_of) for question, clusters_of in clusters.items()}
        scores[f"maj@{k}"] = mean([index is not None and answers[q][index].right for q, index in voted.items()])
    lengths = {is_right: [one.num_tokens for one in all_answers if one.right == is_right] for is_right in (True, False)}
    scores |= {
        "response_length": mean([one.num_tokens for one in all_answers]),
        "response_length_right": mean(lengths[True]),
        "response_length_wrong": mean(lengths[False]),
        "truncated": mean([one.finish_reason == "length" for one in all_answers]),
        "answered": mean([one.shown is not None for one in all_answers]),
        "grading_failed": mean([one.status != "ok" for one in all_answers]),
        "repetition": mean([repetition(one.response) for one in all_answers]),
    }
    names = sorted({group for group in groups.values() if group is not None})
    by_group = {name: mean([rates[q] for q, group in groups.items() if group == name]) for name in names}
    if by_group:
        scores["macro_average"] = mean(list(by_group.values()))
    return TaskResult(
        task=task.name,
        version=task.version,
        num_questions=len(answers),
        num_samples=k,
        scores=scores,
        rates=values,
        groups=by_group,
        notes=notes,
    )
