"""Comparison of runs over several seeds: curves of one metric as a table and as an HTML page."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from jinja2 import Environment, PackageLoader

from megatron_rl.errors import DataError
from megatron_rl.reporting.plots import Rows, band_plot

Curve = Mapping[int, float]
"""Step -> value of a metric in one run."""


def curve_of(rows: Rows, metric: str) -> Curve:
    """Return a metric of a run at the steps that have it.

    Raises:
        DataError: no step has the metric.
    """
    curve = {row["step"]: row[metric] for row in rows if row.get(metric) is not None}
    if not curve:
        names = sorted({name for row in rows for name in row if name.startswith(metric.split("/")[0])})
        raise DataError(f"no row has {metric}. Similar metrics: {', '.join(names) or 'none'}.")
    return curve


def curve_table(heading: str, curves: Mapping[str, Sequence[Curve]]) -> list[list[str]]:
    """Tabulate mean and standard deviation over the seeds at the steps that all curves have.

    Values are formatted as percent if all of them are between 0 and 1.

    Args:
        heading: of the first column.
        curves: name of a run -> one curve for each seed.

    Returns:
        rows of cells; the first row has the headings.
    """
    all_curves = [curve for seeds in curves.values() for curve in seeds]
    steps = sorted(set.intersection(*map(set, all_curves)))
    are_shares = all(0 <= curve[step] <= 1 for curve in all_curves for step in steps)
    form = "{:.1%}" if are_shares else "{:.4g}"
    rows = [[heading, *(f"step {step}" for step in steps)]]
    for name, seeds in curves.items():
        rows.append([name, *(_cell([curve[step] for curve in seeds], form) for step in steps)])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format cells as a Markdown table; the first row has the headings."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def render_study(title: str, metric: str, curves: Mapping[str, Sequence[Curve]]) -> str:
    """Render a page with one plot of all curves, with bands over the seeds, and the table."""
    environment = Environment(loader=PackageLoader("megatron_rl.reporting"), autoescape=True)
    return environment.get_template("study.html").render(
        title=title, plot=band_plot(metric, curves), table=curve_table("run", curves)
    )


def _cell(values: Sequence[float], form: str) -> str:
    spread = [form.format(stdev(values))] if len(values) > 1 else []
    return " ± ".join([form.format(fmean(values)), *spread])
