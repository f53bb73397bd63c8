"""Finished evaluations of several models, question by question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError
from megatron_rl.evaluation.answers import by_question, read_answers
from megatron_rl.evaluation.folder import EvalFolder, read_results
from megatron_rl.evaluation.metrics import mean, paired_difference
from megatron_rl.evaluation.report import percent

SIGNIFICANT = 1.96
"""Standard errors beyond which a difference is unlikely (one in twenty) to be chance."""


@dataclass(frozen=True)
class Finished:
    """One evaluation."""

    name: str
    results: Mapping[str, Any]
    rates: Mapping[str, Mapping[int, float]]
    """Task -> question -> share of right samples."""


def read_finished(path: Path) -> Finished:
    """A finished evaluation.

    Raises:
        DataError: it is not finished.
    """
    results = read_results(path)
    found = read_answers(EvalFolder(path).answers)
    rates = {
        task: {
            question: mean([float(one.right) for one in answers])
            for question, answers in by_question([one for one in found.values() if one.task == task]).items()
        }
        for task in results["tasks"]
    }
    return Finished(f"{path.name}: {results['model']}", results, rates)


def compared(runs: Sequence[Finished]) -> list[list[str]]:
    """Rows of cells, headings first: every task of the first run against each of the others.

    Raises:
        DataError: a task is another version, or was asked otherwise.
    """
    first, *others = runs
    head = ["task", "questions", first.name]
    for other in others:
        head += [other.name, "difference", "both / only before / only after / neither"]
    lines = [head]
    for task, result in first.results["tasks"].items():
        line = [task, str(result["num_questions"]), percent(mean(list(first.rates[task].values())))]
        for other in others:
            if task not in other.rates:
                line += ["-", "-", "-"]
                continue
            check_same(task, first, other)
            line += _against(first.rates[task], other.rates[task])
        lines.append(line)
    return lines


def check_same(task: str, one: Finished, other: Finished) -> None:
    """
    Raises:
        DataError: the two were not asked the same.
    """
    asked = [run.results["evaluation"]["tasks"][task] for run in (one, other)]
    asked = [{**one, "sampling": {**one["sampling"], "num_samples": 0}, "pass_at": []} for one in asked]
    differing = sorted(key for key, value in asked[0].items() if value != asked[1].get(key))
    if differing or set(one.rates[task]) != set(other.rates[task]):
        what = ", ".join(differing) or "the questions"
        raise DataError(f"task {task}: {one.name} and {other.name} were not asked the same, {what} differ. Ask again.")


def confusion(before: Mapping[int, float], after: Mapping[int, float]) -> tuple[int, int, int, int]:
    """Questions that both have right, only the first, only the second, and neither; right is half of the samples."""
    pairs = [(before[question] >= 0.5, after[question] >= 0.5) for question in before]
    both, only_before, only_after, neither = (
        pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))
    )
    return both, only_before, only_after, neither


def _against(before: Mapping[int, float], after: Mapping[int, float]) -> list[str]:
    change, error = paired_difference(list(before.values()), [after[question] for question in before])
    mark = " *" if abs(change) > SIGNIFICANT * error else ""
    return [
        percent(mean(list(after.values()))),
        f"{change:+.1%} ± {error:.1%}{mark}",
        " / ".join(map(str, confusion(before, after))),
    ]
