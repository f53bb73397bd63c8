"""The page of an analysis: one self-contained HTML file."""

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader

from megatron_rl.analysis.behaviour import Behaviour, ResponseRecord
from megatron_rl.analysis.reflection import POOLS, keywords_in
from megatron_rl.reporting.plots import bar_plot, curve_plot
from megatron_rl.reporting.template_plots import rate_of, template_plots

NUM_SHOWN = 60
"""Responses on the page, those that reflect first."""
PANELS: Mapping[str, Mapping[str, str]] = {
    "Right": {"accuracy": "accuracy", "pass@": "pass@k"},
    "Reflection (share of responses)": {
        **{f"reflection/{pool}": pool for pool in POOLS},
        "reflection/judge": "judge",
        "reflection/keywords_and_judge": "keywords and judge",
    },
    "Right, with and without a keyword of reflection": {
        "accuracy/understand_r1_zero/with": "with",
        "accuracy/understand_r1_zero/without": "without",
    },
    "Tokens": {"response_length_right": "right", "response_length_wrong": "wrong"},
    "Answers, cuts, repetition": {
        "answered": "answered",
        "answered_by_judge": "answered (judge)",
        "truncated": "truncated",
        "repetition": "repetition",
    },
}
RATES = {"answered": "Answered", "accuracy": "Right", "pass@": "pass@k"}


def render_behaviour(title: str, found: Sequence[Behaviour], said: Sequence[ResponseRecord]) -> str:
    """The page."""
    environment = Environment(loader=PackageLoader("megatron_rl.reporting"), autoescape=True)
    names = list(dict.fromkeys(name for one in found for name in one.rates))
    ordered = sorted(said, key=lambda one: not keywords_in(one.response, "understand_r1_zero"))
    return environment.get_template("behaviour.html").render(
        title=title,
        plots=_plots(found),
        labels=[one.title for one in found],
        counts=[f"{one.num_questions} / {one.num_responses}" for one in found],
        rows=[(name, [_cell(name, one.rates.get(name)) for one in found]) for name in names],
        responses=[
            (one, sorted({word for pool in POOLS for word in keywords_in(one.response, pool)}))
            for one in ordered[:NUM_SHOWN]
        ],
        num_left_out=max(0, len(said) - NUM_SHOWN),
    )


def _plots(found: Sequence[Behaviour]) -> list[str]:
    """Curves of what is by step or by temperature, bars of the rest."""
    by_step = [one for one in found if one.label.isdigit()]
    plots = [plot for title, names in PANELS.items() if (plot := _panel(title, names, by_step)) is not None]
    for source in dict.fromkeys(one.source for one in found):
        rates = {one.label: one.rates for one in found if one.source == source}
        plots += template_plots(rates, {name: f"{source} {title}".strip() for name, title in RATES.items()})
    others = [one for one in found if not one.label.isdigit() and one.label.count("@") != 2]
    return plots + [bar_plot(title, "share", _bars(others, name)) for name, title in RATES.items() if others]


def _panel(title: str, names: Mapping[str, str], found: Sequence[Behaviour]) -> str | None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        for name, label in names.items():
            value = rate_of(one.rates, name)
            if value is not None:
                curves.setdefault(f"{one.source} {label}".strip(), []).append((float(one.label), value))
    return curve_plot(title, "step", curves) if curves else None


def _bars(found: Sequence[Behaviour], name: str) -> dict[str, float]:
    return {one.title: value for one in found if (value := rate_of(one.rates, name)) is not None}


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if name.startswith("response_length") else f"{value:.1%}"
