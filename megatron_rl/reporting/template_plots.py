"""Plots over the temperature of tasks that were evaluated with several templates (TASK@TEMPLATE@TEMPERATURE)."""

from collections.abc import Mapping

from megatron_rl.reporting.plots import curve_plot

Rates = Mapping[str, Mapping[str, float | None]]
"""Label -> rate -> value; None if the rate is undefined."""


def template_plots(rates: Rates, names: Mapping[str, str]) -> list[str]:
    """Plot each task and rate over the temperature, one curve for each template; ignore labels of another form.

    Args:
        rates: of each label.
        names: rate -> its title; a name that ends with @ selects the last rate with this prefix.
    """
    labels = [tuple(label.split("@")) for label in rates if label.count("@") == 2]
    plots = []
    for task in dict.fromkeys(label[0] for label in labels):
        for name, title in names.items():
            curves: dict[str, list[tuple[float, float]]] = {}
            for label in labels:
                value = rate_of(rates["@".join(label)], name)
                if label[0] == task and value is not None:
                    curves.setdefault(label[1], []).append((float(label[2]), value))
            if curves:
                plots.append(curve_plot(f"{title} by temperature, {task}", "temperature", curves))
    return plots


def rate_of(rates: Mapping[str, float | None], name: str) -> float | None:
    """Return a rate by its name, or the last one with this prefix if the name ends with @."""
    if not name.endswith("@"):
        return rates.get(name)
    return next((rates[key] for key in reversed(list(rates)) if key.startswith(name)), None)
