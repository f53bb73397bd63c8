"""HTML report of a behaviour analysis; one self-contained file."""

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader

from megatron_rl.analysis.behaviour import Behaviour, ResponseRecord
from megatron_rl.analysis.reflection import POOLS, keywords_in
from megatron_rl.reporting.plots import bar_plot, curve_plot
from megatron_rl.reporting.template_plots import rate_of, template_plots

NUM_SHOWN = 60
"""Largest number of responses on the page; those with a keyword of reflection come first."""
PANELS: Mapping[str, Mapping[str, str]] = {
    "Right": {"accuracy": "accuracy", "pass@": "pass@k"},
    "Reflection (share of responses)": {
        **{f"reflection/{pool}": pool for pool in POOLS},
        "reflection/judge": "judge",
        "reflection/keywords_and_judge": "keywords and judge",
    },
    "Right, with and without a reflection keyword": {
        "accuracy/understand_r1_zero/with": "with",
        "accuracy/understand_r1_zero/without": "without",
    },
    "Tokens": {"response_length_right": "right", "response_length_wrong": "wrong"},
    "Answered, truncated, repetition": {
        "answered": "answered",
        "answered_by_judge": "answered (judge)",
        "truncated": "truncated",
        "repetition": "repetition",
    },
}
RATES = {"answered": "Answered", "accuracy": "Right", "pass@": "pass@k"}


def render_behaviour(title: str, behaviours: Sequence[Behaviour], records: Sequence[ResponseRecord]) -> str:
    """Render the page.

    Args:
        title: heading of the page.
        behaviours: one column of the table each.
        records: responses, of which the page shows some.
    """
    environment = Environment(loader=PackageLoader("megatron_rl.reporting"), autoescape=True)
    names = list(dict.fromkeys(name for one in behaviours for name in one.rates))
    ordered = sorted(records, key=lambda one: not keywords_in(one.response, "understand_r1_zero"))
    return environment.get_template("behaviour.html").render(
        title=title,
        plots=_plots(behaviours),
        labels=[one.title for one in behaviours],
        counts=[f"{one.num_questions} / {one.num_responses}" for one in behaviours],
        rows=[(name, [_cell(name, one.rates.get(name)) for one in behaviours]) for name in names],
        responses=[
            (one, sorted({word for pool in POOLS for word in keywords_in(one.response, pool)}))
            for one in ordered[:NUM_SHOWN]
        ],
        num_left_out=max(0, len(records) - NUM_SHOWN),
    )


def _plots(behaviours: Sequence[Behaviour]) -> list[str]:
    """Plot labels that are steps or temperatures as curves, the others as bars."""
    by_step = [one for one in behaviours if one.label.isdigit()]
    plots = [plot for title, names in PANELS.items() if (plot := _panel(title, names, by_step)) is not None]
    for source in dict.fromkeys(one.source for one in behaviours):
        rates = {one.label: one.rates for one in behaviours if one.source == source}
        plots += template_plots(rates, {name: f"{source} {title}".strip() for name, title in RATES.items()})
    others = [one for one in behaviours if not one.label.isdigit() and one.label.count("@") != 2]
    return plots + [bar_plot(title, "share", _bars(others, name)) for name, title in RATES.items() if others]


def _panel(title: str, names: Mapping[str, str], behaviours: Sequence[Behaviour]) -> str | None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for one in behaviours:
        for name, label in names.items():
            value = rate_of(one.rates, name)
            if value is not None:
                curves.setdefault(f"{one.source} {label}".strip(), []).append((float(one.label), value))
    return curve_plot(title, "step", curves) if curves else None


def _bars(behaviours: Sequence[Behaviour], name: str) -> dict[str, float]:
    return {one.title: value for one in behaviours if (value := rate_of(one.rates, name)) is not None}


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if name.startswith("response_length") else f"{value:.1%}"
