"""What the answers to a task come to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_rl.config.evaluation import TaskConfig
from megatron_rl.evaluation.answers import Answer
from megatron_rl.evaluation.majority_vote import majority
from megatron_rl.reporting.stats import bootstrap_interval, mean, pass_at_k, repetition, standard_error


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Results of one task."""

    task: str
    version: int
    num_questions: int
    num_samples: int
    """Of each question."""
    scores: Mapping[str, float]
    """accuracy (avg@k), its error and interval, pass@k, maj@k, lengths, shares."""
    rates: Sequence[float] = ()
    """Share of right samples of each question, in their order."""
    groups: Mapping[str, float] = field(default_factory=dict)
    """Accuracy by the task's group_field."""
    notes: Sequence[str] = ()
    """What a reader has to know."""

    def as_json(self) -> dict[str, Any]:
        """JSON has no NaN: what nothing is known of is null."""
        scores = {name: None if math.isnan(value) else value for name, value in self.scores.items()}
        return {**asdict(self), "scores": scores}


def task_result(
    task: TaskConfig,
    answers: Mapping[int, Sequence[Answer]],
    clusters: Mapping[int, Sequence[int | None]],
    groups: Mapping[int, str | None],
    notes: Sequence[str],
) -> TaskResult:
    """
    Args:
        answers: by question, in the order of the samples.
        clusters: of each question, as ``Grading.clusters`` gives it; empty without a majority vote.
        groups: of each question.
    """
    k = task.sampling.num_samples
    rates = {question: mean([float(one.right) for one in found]) for question, found in answers.items()}
    every = [one for found in answers.values() for one in found]
    values = list(rates.values())
    low, high = bootstrap_interval(values)
    scores = {
        f"avg@{k}": mean(values),
        "standard_error": standard_error(values),
        "interval_low": low,
        "interval_high": high,
        **{
            f"pass@{n}": mean([pass_at_k(k, sum(one.right for one in found), n) for found in answers.values()])
            for n in task.pass_at
        },
    }
    if task.majority and k > 1:
        taken = {question: majority(found) for question, found in clusters.items()}
        scores[f"maj@{k}"] = mean([place is not None and answers[q][place].right for q, place in taken.items()])
    lengths = {is_right: [one.num_tokens for one in every if one.right == is_right] for is_right in (True, False)}
    scores |= {
        "response_length": mean([one.num_tokens for one in every]),
        "response_length_right": mean(lengths[True]),
        "response_length_wrong": mean(lengths[False]),
        "truncated": mean([one.finish_reason == "length" for one in every]),
        "answered": mean([one.shown is not None for one in every]),
        "grading_failed": mean([one.status != "ok" for one in every]),
        "repetition": mean([repetition(one.response) for one in every]),
    }
    named = sorted({group for group in groups.values() if group is not None})
    by_group = {name: mean([rates[q] for q, group in groups.items() if group == name]) for name in named}
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
