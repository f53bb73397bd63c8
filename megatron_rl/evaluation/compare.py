"""Comparison of finished evaluations of several models, question by question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError
from megatron_rl.evaluation.folder import IGNORED_TASK_KEYS, distinct_names, read_results, without_ignored
from megatron_rl.evaluation.report import percent
from megatron_rl.reporting.stats import mean, paired_difference

SIGNIFICANT = 1.96
"""Standard errors beyond which a difference is significant at the 5 % level."""


@dataclass(frozen=True)
class FinishedEvaluation:
    """One finished evaluation."""

    path: Path
    name: str
    """The last parts of the path, as many as distinguish it from the other evaluations."""
    results: Mapping[str, Any]
    """Content of results.json."""
    rates: Mapping[str, Sequence[float]]
    """Task -> share of right samples of each question."""


def is_right(rate: float) -> bool:
    """Whether at least half of a question's samples are right."""
    return rate >= 0.5


def read_all_finished(paths: Sequence[Path]) -> list[FinishedEvaluation]:
    """Read the results of finished evaluations.

    Args:
        paths: folder of each evaluation, or a file in it.

    Raises:
        DataError: an evaluation is not finished.
    """
    folders = [path if path.is_dir() else path.parent for path in paths]
    return [_read_finished(path, name) for path, name in zip(folders, distinct_names(folders), strict=True)]


def _read_finished(path: Path, name: str) -> FinishedEvaluation:
    results = read_results(path)
    rates = {task: result["rates"] for task, result in results["tasks"].items()}
    return FinishedEvaluation(path, name, results, rates)


def comparison_table(runs: Sequence[FinishedEvaluation]) -> list[list[str]]:
    """Compare every task of the first evaluation with each of the others; rows of cells, headings first.

    Raises:
        DataError: a task differs between two evaluations in its version, prompts, sampling or scorer.
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
            check_comparable(task, first, other)
            line += _difference_cells(first.rates[task], other.rates[task])
        lines.append(line)
    return lines


def check_comparable(task: str, one: FinishedEvaluation, other: FinishedEvaluation) -> None:
    """Check that two evaluations used the same task, apart from the number of samples.

    Raises:
        DataError: the task's configuration or its number of questions differs.
    """
    configs = [without_ignored(run.results["evaluation"]["tasks"][task]) for run in (one, other)]
    configs = [{**config, "sampling": {**config["sampling"], "num_samples": 0}} for config in configs]
    keys = {key for config in configs for key in config} - set(IGNORED_TASK_KEYS)
    differing = sorted(key for key in keys if configs[0].get(key) != configs[1].get(key))
    if differing or len(one.rates[task]) != len(other.rates[task]):
        what = ", ".join(differing) or "the questions"
        raise DataError(
            f"task {task}: {one.name} and {other.name} cannot be compared, because {what} differ. Evaluate one of them "
            "again with the configuration of the other."
        )


def confusion(before: Sequence[float], after: Sequence[float]) -> tuple[int, int, int, int]:
    """Count the questions right in both, only before, only after, and in neither; see ``is_right``."""
    pairs = [(is_right(old), is_right(new)) for old, new in zip(before, after, strict=True)]
    both, only_before, only_after, neither = (
        pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))
    )
    return both, only_before, only_after, neither


def _difference_cells(before: Sequence[float], after: Sequence[float]) -> list[str]:
    change, error = paired_difference(before, after)
    mark = " *" if abs(change) > SIGNIFICANT * error else ""
    return [
        percent(mean(after)),
        f"{change:+.1%} ± {error:.1%}{mark}",
        " / ".join(map(str, confusion(before, after))),
    ]
