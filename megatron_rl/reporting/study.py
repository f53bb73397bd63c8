"""Curves of several runs over several seeds, as a table and as one page."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from jinja2 import Environment, PackageLoader

from megatron_rl.errors import DataError
from megatron_rl.reporting.plots import Rows, band_plot

Curve = Mapping[int, float]
"""Step -> value of one run."""


def curve_of(rows: Rows, metric: str) -> Curve:
    """A metric of a run where it was measured.

    Raises:
        DataError: it never was.
    """
    found = {row["step"]: row[metric] for row in rows if row.get(metric) is not None}
    if not found:
        names = sorted({name for row in rows for name in row if name.startswith(metric.split("/")[0])})
        raise DataError(f"no row has {metric}. Metrics like it: {', '.join(names) or 'none'}.")
    return found


def curve_table(heading: str, curves: Mapping[str, Sequence[Curve]]) -> list[list[str]]:
    """Mean and standard deviation between seeds at every step that all runs have measured; shares as percent.

    Args:
        heading: of the first column.
        curves: by the name of a run, one curve for every seed.

    Returns:
        rows of cells, the first of them the headings.
    """
    together = set.intersection(*(set(one) for several in curves.values() for one in several))
    steps = sorted(together)
    are_shares = all(0 <= one[step] <= 1 for several in curves.values() for one in several for step in steps)
    form = "{:.1%}" if are_shares else "{:.4g}"
    rows = [[heading, *(f"step {step}" for step in steps)]]
    for name, several in curves.items():
        rows.append([name, *(_cell([one[step] for one in several], form) for step in steps)])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table; the first row has the headings."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def render_study(title: str, metric: str, curves: Mapping[str, Sequence[Curve]]) -> str:
    """The page: all curves in one plot, with the range between seeds, and the table."""
    environment = Environment(loader=PackageLoader("megatron_rl.reporting"), autoescape=True)
    return environment.get_template("study.html").render(
        title=title, plot=band_plot(metric, curves), table=curve_table("run", curves)
    )


def _cell(values: Sequence[float], form: str) -> str:
    spread = [form.format(stdev(values))] if len(values) > 1 else []
    return " ± ".join([form.format(fmean(values)), *spread])
