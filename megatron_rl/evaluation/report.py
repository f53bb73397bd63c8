"""Results of an evaluation as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.evaluation.results import TaskResult
from megatron_rl.reporting.study import markdown as as_table

COLUMNS = (
    "task",
    "questions",
    "right",
    "95% interval",
    "pass@k",
    "maj@k",
    "tokens",
    "truncated",
    "no answer",
    "ungraded",
)


def results_table(results: Sequence[TaskResult]) -> str:
    """Return a Markdown table with one row for each task."""
    return table([result.as_json() for result in results])


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the same table from the tasks of results.json."""
    return as_table([COLUMNS, *(cells(result) for result in results)])


def cells(result: Mapping[str, Any]) -> list[str]:
    """Return the cells of a task's row, one for each of COLUMNS."""
    scores, k = result["scores"], result["num_samples"]
    error = scores["standard_error"]
    passes = {name: value for name, value in scores.items() if name.startswith("pass@")}
    return [
        result["task"],
        f"{result['num_questions']} x {k}",
        percent(scores[f"avg@{k}"]) + ("" if error is None else f" ± {percent(error)}"),
        f"{percent(scores['interval_low'])} to {percent(scores['interval_high'])}",
        ", ".join(f"@{name.removeprefix('pass@')} {percent(value)}" for name, value in passes.items()),
        percent(scores.get(f"maj@{k}")),
        f"{scores['response_length']:.0f}",
        percent(scores["truncated"]),
        percent(1 - scores["answered"]),
        percent(scores["grading_failed"]),
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """Return report.md of an evaluation.

    Args:
        results: content of results.json.
    """
    tasks = list(results["tasks"].values())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        f"# {results['name']}",
        f"Model `{results['model']}` (fingerprint {results['fingerprint']}), engine {results['engine']}; {versions}.",
        table(tasks),
    ]
    for task in tasks:
        notes = [f"- {note}" for note in task["notes"]]
        groups = [[name, percent(value)] for name, value in task["groups"].items()]
        if groups:
            macro = percent(task["scores"]["macro_average"])
            groups = [["group", "right"], *groups, ["mean of the groups", macro]]
        if notes or groups:
            group_table = as_table(groups) if groups else ""
            parts += [f"## {task['task']}, version {task['version']}", "\n".join(notes), group_table]
    return "\n\n".join(part for part in parts if part) + "\n"


def percent(value: float | None) -> str:
    """Format a share with one decimal; a dash for None."""
    return "-" if value is None else f"{value:.1%}"
