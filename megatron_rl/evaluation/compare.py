"""Finished evaluations of several models, question by question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError
from megatron_rl.evaluation.folder import FREE_OF_TASK, distinct_names, essential, read_results
from megatron_rl.evaluation.report import percent
from megatron_rl.reporting.stats import mean, paired_difference

SIGNIFICANT = 1.96
"""Standard errors beyond which a difference is unlikely (one in twenty) to be chance."""


@dataclass(frozen=True)
class Finished:
    """One evaluation."""

    path: Path
    name: str
    """As much of the path as tells it from the others."""
    results: Mapping[str, Any]
    rates: Mapping[str, Sequence[float]]
    """Task -> share of right samples of each question."""


def is_right(rate: float) -> bool:
    """Half of a question's samples are right."""
    return rate >= 0.5


def read_all_finished(paths: Sequence[Path]) -> list[Finished]:
    """Finished evaluations.

    Raises:
        DataError: one is not finished.
    """
    folders = [path if path.is_dir() else path.parent for path in paths]
    return [_read_finished(path, name) for path, name in zip(folders, distinct_names(folders), strict=True)]


def _read_finished(path: Path, name: str) -> Finished:
    results = read_results(path)
    rates = {task: result["rates"] for task, result in results["tasks"].items()}
    return Finished(path, name, results, rates)


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
        line = [task, str(result["num_questions"]), percent(mean(first.rates[task]))]
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
    asked = [essential(run.results["evaluation"]["tasks"][task]) for run in (one, other)]
    asked = [{**one, "sampling": {**one["sampling"], "num_samples": 0}} for one in asked]
    keys = {key for one in asked for key in one} - set(FREE_OF_TASK)
    differing = sorted(key for key in keys if asked[0].get(key) != asked[1].get(key))
    if differing or len(one.rates[task]) != len(other.rates[task]):
        what = ", ".join(differing) or "the questions"
        raise DataError(f"task {task}: {one.name} and {other.name} were not asked the same, {what} differ. Ask again.")


def confusion(before: Sequence[float], after: Sequence[float]) -> tuple[int, int, int, int]:
    """Questions that both have right, only the first, only the second, and neither; right is half of the samples."""
    pairs = [(is_right(old), is_right(new)) for old, new in zip(before, after, strict=True)]
    both, only_before, only_after, neither = (
        pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))
    )
    return both, only_before, only_after, neither


def _against(before: Sequence[float], after: Sequence[float]) -> list[str]:
    change, error = paired_difference(before, after)
    mark = " *" if abs(change) > SIGNIFICANT * error else ""
    return [
        percent(mean(after)),
        f"{change:+.1%} ± {error:.1%}{mark}",
        " / ".join(map(str, confusion(before, after))),
    ]
