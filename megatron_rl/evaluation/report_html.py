"""HTML report of an evaluation; one self-contained file."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from megatron_rl.evaluation.answers import GradedAnswer
from megatron_rl.evaluation.generation import RenderedQuestion
from megatron_rl.evaluation.report import COLUMNS, cells, percent
from megatron_rl.reporting.plots import bar_plot, curve_plot
from megatron_rl.reporting.stats import mean, pass_at_k
from megatron_rl.reporting.template_plots import template_plots

NUM_BINS = 8
"""Bins of the plot of accuracy by length."""
BY_TEMPLATE = {"answered": "Answered", "accuracy": "Right", "pass@": "pass@k", "response_length": "Tokens"}
NUM_SHOWN = 200
"""Largest number of answers on the page; all of them are in answers/."""


def render(
    results: Mapping[str, Any],
    rendered: Mapping[str, Sequence[RenderedQuestion]],
    answers: Mapping[str, Mapping[int, Sequence[GradedAnswer]]],
) -> str:
    """Render report.html.

    Args:
        results: content of results.json.
        rendered: task -> its rendered questions.
        answers: task -> question index -> graded answers.
    """
    environment = Environment(loader=PackageLoader("megatron_rl.reporting"), autoescape=True)
    return environment.get_template("evaluation.html").render(
        title=results["name"],
        model=results["model"],
        fingerprint=results["fingerprint"],
        engine=results["engine"],
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        columns=COLUMNS,
        plots=template_plots({name: _rates(result) for name, result in results["tasks"].items()}, BY_TEMPLATE),
        tasks=[
            _task(result, results["evaluation"]["tasks"][name], rendered[name], answers[name])
            for name, result in results["tasks"].items()
        ],
        config=yaml.safe_dump(results["evaluation"], sort_keys=False, allow_unicode=True),
    )


def _rates(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the scores, with avg@k of any k also under the name accuracy."""
    return {**result["scores"], "accuracy": result["scores"][f"avg@{result['num_samples']}"]}


def _task(
    result: Mapping[str, Any],
    config: Mapping[str, Any],
    rendered: Sequence[RenderedQuestion],
    answers: Mapping[int, Sequence[GradedAnswer]],
) -> dict[str, Any]:
    scores, k = result["scores"], result["num_samples"]
    by_index = {one.question.index: one for one in rendered}
    all_answers = [answer for question in sorted(answers) for answer in answers[question]]
    return {
        "name": result["task"],
        "version": result["version"],
        "source": config["source"],
        "notes": result["notes"],
        "right": percent(scores[f"avg@{k}"]),
        "interval": f"{percent(scores['interval_low'])} to {percent(scores['interval_high'])}",
        "cells": cells(result),
        "plots": _plots(result, answers),
        "prompt": rendered[0].prompt,
        "answers": [_answer_fields(one, by_index[one.question]) for one in all_answers[:NUM_SHOWN]],
        "num_left_out": max(0, len(all_answers) - NUM_SHOWN),
    }


def _answer_fields(answer: GradedAnswer, rendered: RenderedQuestion) -> dict[str, Any]:
    references = " or ".join(rendered.question.answers)
    if len(references) >= 100:
        references = references[:100] + " …"
    return {**vars(answer), "prompt": rendered.prompt, "references": references}


def _plots(result: Mapping[str, Any], answers: Mapping[int, Sequence[GradedAnswer]]) -> list[str]:
    all_answers, k = [answer for samples in answers.values() for answer in samples], result["num_samples"]
    bins = by_length(all_answers)
    plots = [curve_plot("Right by length", "response tokens (mean of one eighth of the responses)", {"right": bins})]
    if k > 1:
        counts = [sum(answer.right for answer in samples) for samples in answers.values()]
        points = [(n, mean([pass_at_k(k, count, n) for count in counts])) for n in range(1, k + 1)]
        plots.append(curve_plot("pass@k", "k", {"pass@k": points}))
    if len(result["groups"]) > 1:
        plots.append(bar_plot("Right by group", "share", result["groups"]))
    return plots


def by_length(answers: Sequence[GradedAnswer]) -> list[tuple[float, float]]:
    """Return (mean tokens, share of right answers) of NUM_BINS bins of equal size, from the shortest answers on."""
    ordered = sorted(answers, key=lambda one: one.num_tokens)
    size = max(1, -(-len(ordered) // NUM_BINS))
    bins = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [(mean([one.num_tokens for one in bin_]), mean([one.right for one in bin_])) for bin_ in bins]
