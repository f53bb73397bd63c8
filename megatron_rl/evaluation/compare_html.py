"""Several evaluations on one page: one self-contained HTML file."""

from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from megatron_rl.errors import DataError
from megatron_rl.evaluation.compare import Finished, compared, confusion, is_right
from megatron_rl.evaluation.folder import EvalFolder, current_answers, read_questions_of
from megatron_rl.reporting.plots import grouped_bar_plot, table_plot
from megatron_rl.reporting.stats import mean

NUM_SHOWN = 100
"""Changed questions on the page."""


def render_comparison(runs: Sequence[Finished]) -> str:
    """The page; the first evaluation against each of the others.

    Raises:
        DataError: a task is another version, or was asked otherwise.
    """
    table = compared(runs)
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


def _plots(runs: Sequence[Finished]) -> Iterator[str]:
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


def _changed(first: Finished, other: Finished) -> Iterator[dict[str, Any]]:
    """Questions of which the verdict is another one, with the first sample of each evaluation."""
    folders = [EvalFolder(run.path) for run in (first, other)]
    questions, answers = read_questions_of(folders[0]), [current_answers(folder) for folder in folders]
    for task, rates in first.rates.items():
        for place, (old, new) in enumerate(zip(rates, other.rates.get(task, ()), strict=False)):
            if is_right(old) != is_right(new):
                before, after = (found.get((task, place)) for found in answers)
                if not before or not after:
                    raise DataError(
                        f"{first.path} or {other.path} has no answer to question {place} of {task}, though its results "
                        "do: it was started again since. Let it finish."
                    )
                yield {
                    "task": task,
                    "question": place,
                    "run": other.name,
                    "is_better": is_right(new),
                    "text": questions[task, place]["text"],
                    "before": before[0].response,
                    "after": after[0].response,
                }
