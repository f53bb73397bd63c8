"""The page of an evaluation: one self-contained HTML file."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from megatron_rl.evaluation.answers import Answer
from megatron_rl.evaluation.generation import RenderedQuestion
from megatron_rl.evaluation.report import COLUMNS, cells, percent
from megatron_rl.reporting.plots import bar_plot, curve_plot
from megatron_rl.reporting.stats import mean, pass_at_k
from megatron_rl.reporting.template_plots import template_plots

NUM_BINS = 8
BY_TEMPLATE = {"answered": "Answered", "accuracy": "Right", "pass@": "pass@k", "response_length": "Tokens"}
NUM_SHOWN = 200
"""Answers on the page; all of them are in answers/."""


def render(
    found: Mapping[str, Any],
    asked: Mapping[str, Sequence[RenderedQuestion]],
    answers: Mapping[str, Mapping[int, Sequence[Answer]]],
) -> str:
    """The page.

    Args:
        found: as it stands in results.json.
        asked: by task, the questions as the model saw them.
        answers: by task and question.
    """
    environment = Environment(loader=PackageLoader("megatron_rl.reporting"), autoescape=True)
    return environment.get_template("evaluation.html").render(
        title=found["name"],
        model=found["model"],
        fingerprint=found["fingerprint"],
        engine=found["engine"],
        versions=", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        columns=COLUMNS,
        plots=template_plots({name: _rates(result) for name, result in found["tasks"].items()}, BY_TEMPLATE),
        tasks=[
            _task(result, found["evaluation"]["tasks"][name], asked[name], answers[name])
            for name, result in found["tasks"].items()
        ],
        config=yaml.safe_dump(found["evaluation"], sort_keys=False, allow_unicode=True),
    )


def _rates(result: Mapping[str, Any]) -> dict[str, float | None]:
    """With accuracy under the same name for every number of samples."""
    return {**result["scores"], "accuracy": result["scores"][f"avg@{result['num_samples']}"]}


def _task(
    result: Mapping[str, Any],
    config: Mapping[str, Any],
    asked: Sequence[RenderedQuestion],
    answers: Mapping[int, Sequence[Answer]],
) -> dict[str, Any]:
    scores, k = result["scores"], result["num_samples"]
    by_index = {one.question.index: one for one in asked}
    every = [one for question in sorted(answers) for one in answers[question]]
    return {
        "name": result["task"],
        "version": result["version"],
        "source": config["source"],
        "notes": result["notes"],
        "right": percent(scores[f"avg@{k}"]),
        "interval": f"{percent(scores['interval_low'])} to {percent(scores['interval_high'])}",
        "cells": cells(result),
        "plots": _plots(result, answers),
        "prompt": asked[0].prompt,
        "answers": [_shown(one, by_index[one.question]) for one in every[:NUM_SHOWN]],
        "num_left_out": max(0, len(every) - NUM_SHOWN),
    }


def _shown(answer: Answer, asked: RenderedQuestion) -> dict[str, Any]:
    wanted = " or ".join(asked.question.answers)
    return {**vars(answer), "asked": asked.prompt, "wanted": wanted if len(wanted) < 100 else wanted[:100] + " …"}


def _plots(result: Mapping[str, Any], answers: Mapping[int, Sequence[Answer]]) -> list[str]:
    every, k = [one for found in answers.values() for one in found], result["num_samples"]
    eighths = by_length(every)
    plots = [curve_plot("Right by length", "tokens of the answer (mean of an eighth of them)", {"right": eighths})]
    if k > 1:
        counts = [sum(one.right for one in found) for found in answers.values()]
        points = [(n, mean([pass_at_k(k, count, n) for count in counts])) for n in range(1, k + 1)]
        plots.append(curve_plot("pass@k", "k", {"pass@k": points}))
    if len(result["groups"]) > 1:
        plots.append(bar_plot("Right by group", "share", result["groups"]))
    return plots


def by_length(answers: Sequence[Answer]) -> list[tuple[float, float]]:
    """Mean length and share of right ones of as many answers each, from the shortest to the longest."""
    ordered = sorted(answers, key=lambda one: one.num_tokens)
    size = max(1, -(-len(ordered) // NUM_BINS))
    bins = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [(mean([one.num_tokens for one in found]), mean([one.right for one in found])) for found in bins]
