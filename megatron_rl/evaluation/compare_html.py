"""HTML page that compares several evaluations; one self-contained file."""

from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from megatron_rl.errors import DataError
from megatron_rl.evaluation.compare import FinishedEvaluation, comparison_table, confusion, is_right
from megatron_rl.evaluation.folder import EvalFolder, current_answers, read_questions_of
from megatron_rl.reporting.plots import grouped_bar_plot, table_plot
from megatron_rl.reporting.stats import mean

NUM_SHOWN = 100
"""Largest number of changed questions on the page."""


def render_comparison(runs: Sequence[FinishedEvaluation]) -> str:
    """Render the page that compares the first evaluation with each of the others.

    Raises:
        DataError: a task differs between two evaluations in its version, prompts, sampling or scorer.
    """
    table = comparison_table(runs)
    changed = [one for other in runs[1:] for one in _changed(runs[0], other)]
    environment = Environment(loader=PackageLoader("megatron_rl.reporting"), autoescape=True)
    return environment.get_template("comparison.html").render(
        title="Comparison of " + ", ".join(run.name for run in runs),
        models=[(run.name, run.results["model"]) for run in runs],
        table=table,
        plots=list(_plots(runs)),
        changed=changed[:NUM_SHOWN],
        num_left_out=max(0, len(changed) - NUM_SHOWN),
    )


def _plots(runs: Sequence[FinishedEvaluation]) -> Iterator[str]:
    right = {run.name: {task: mean(rates) for task, rates in run.rates.items()} for run in runs}
    yield grouped_bar_plot("Right", "share of the samples", right)
    first = runs[0]
    for other in runs[1:]:
        for task, rates in first.rates.items():
            if task in other.rates:
                both, only_before, only_after, neither = confusion(rates, other.rates[task])
                yield table_plot(
                    f"{task}: {first.name} against {other.name}",
                    ["right before", "wrong before"],
                    ["right after", "wrong after"],
                    [[both, only_before], [only_after, neither]],
                )


def _changed(first: FinishedEvaluation, other: FinishedEvaluation) -> Iterator[dict[str, Any]]:
    """Questions that one evaluation has right and the other wrong, each with its first sample in both."""
    folders = [EvalFolder(run.path) for run in (first, other)]
    questions, answers = read_questions_of(folders[0]), [current_answers(folder) for folder in folders]
    for task, rates in first.rates.items():
        for index, (old, new) in enumerate(zip(rates, other.rates.get(task, ()), strict=False)):
            if is_right(old) != is_right(new):
                before, after = (by_question.get((task, index)) for by_question in answers)
                if not before or not after:
                    raise DataError(
                        f"{first.path} or {other.path} has no answer to question {index} of {task}, but its "
                        "results.json does: the evaluation was started again since. Let it finish."
                    )
                yield {
                    "task": task,
                    "question": index,
                    "run": other.name,
                    "is_better": is_right(new),
                    "text": questions[task, index]["text"],
                    "before": before[0].response,
                    "after": after[0].response,
                }
