"""Tasks by template and temperature, whose labels are TASK@TEMPLATE@TEMPERATURE, as plots."""

from collections.abc import Mapping

from megatron_rl.reporting.plots import curve_plot

Rates = Mapping[str, Mapping[str, float | None]]
"""Label -> rate -> value, where it is known."""


def template_plots(rates: Rates, names: Mapping[str, str]) -> list[str]:
    """For each task and rate a curve over the temperature for every template; labels of another form are left out.

    Args:
        names: rate -> its title; one that ends with @ stands for any that begins so.
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
    """A rate by its name, or the last one that begins so where the name ends with @."""
    if not name.endswith("@"):
        return rates.get(name)
    return next((rates[key] for key in reversed(list(rates)) if key.startswith(name)), None)
