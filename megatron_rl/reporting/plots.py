"""Plots as SVG text."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
"""Rows of metrics.jsonl."""

INK, GRID = "#1f2937", "#e5e7eb"
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4b5563")


def line_plot(title: str, rows: Rows, metrics: Mapping[str, str], *, smooth: bool = True) -> str | None:
    """Plot metrics over the steps; None if no row has one of them.

    Args:
        title: of the plot.
        rows: of metrics.jsonl.
        metrics: metric name -> label.
        smooth: whether to draw the running mean opaque over the faint values.
    """
    series = {label: _points(rows, name) for name, label in metrics.items()}
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    figure, axes = _figure(title)
    for (label, points), colour in zip(series.items(), itertools.cycle(COLOURS), strict=False):
        steps, values = [p[0] for p in points], [p[1] for p in points]
        if smooth and len(points) > 20:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values, max(3, len(values) // 20)), color=colour, linewidth=1.8, label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    return _finish(figure, axes, legend=len(series) > 1)


def band_plot(title: str, curves: Mapping[str, Sequence[Mapping[int, float]]]) -> str:
    """Plot the mean of each group of curves, with a band from its minimum to its maximum.

    Args:
        title: of the plot.
        curves: label of a group -> its curves, each step -> value.
    """
    figure, axes = _figure(title)
    for (label, group), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        steps = sorted(set.intersection(*map(set, group)))
        columns = [[curve[step] for curve in group] for step in steps]
        axes.plot(steps, [sum(c) / len(c) for c in columns], color=colour, linewidth=1.8, label=label)
        if len(group) > 1:
            axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.12)
    return _finish(figure, axes, legend=True)


def curve_plot(title: str, x_label: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Plot curves as points joined by lines.

    Args:
        title: of the plot.
        x_label: of the x axis.
        curves: label -> (x, y) points.
    """
    figure, axes = _figure(title)
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    for (label, points), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    return _finish(figure, axes, legend=len(curves) > 1)


def bar_plot(title: str, x_label: str, bars: Mapping[str, float]) -> str:
    """Plot a horizontal bar for each name, the first one on top."""
    figure, axes = _figure(title, height=max(3.0, 0.9 + 0.22 * len(bars)))
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    names = list(bars)[::-1]
    axes.barh(names, [bars[name] for name in names], color=COLOURS[0])
    return _finish(figure, axes, legend=False)


def grouped_bar_plot(title: str, x_label: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Plot horizontal bars of several groups side by side for each name, the first name and group on top.

    Args:
        title: of the plot.
        x_label: of the x axis.
        groups: label of a group -> (name -> value).
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    figure, axes = _figure(title, height=max(3.0, 0.9 + 0.22 * len(names) * len(groups)))
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    thickness = 0.8 / len(groups)
    for number, ((label, bars), colour) in enumerate(zip(groups.items(), itertools.cycle(COLOURS), strict=False)):
        present = [(index, bars[name]) for index, name in enumerate(names) if name in bars]
        heights = [index + (number - (len(groups) - 1) / 2) * thickness for index, _ in present]
        axes.barh(heights, [value for _, value in present], height=thickness, color=colour, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.4)  # space for the legend
    return _finish(figure, axes, legend=len(groups) > 1)


def table_plot(title: str, rows: Sequence[str], columns: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Plot a grid of counts; a higher count is darker.

    Args:
        title: of the plot.
        rows: labels of the rows.
        columns: labels of the columns.
        counts: [rows][columns].
    """
    figure, axes = _figure(title)
    axes.imshow(counts, cmap="Blues", aspect="auto", vmin=0)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("")
    axes.grid(visible=False)
    largest = max(max(row) for row in counts)
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            axes.text(x, y, str(count), ha="center", va="center", color="white" if count > 0.6 * largest else INK)
    return _finish(figure, axes, legend=False)


def time_split_plot(title: str, rows: Rows, spans: Sequence[str]) -> str | None:
    """Plot the mean seconds of each timer of a step as one stacked bar; None if no row has one of the timers."""
    means = {}
    for span in spans:
        points = _points(rows, f"timing_s/{span}")
        if points:
            means[span] = sum(value for _, value in points) / max(1, len(_points(rows, "timing_s/step")))
    if not means:
        return None
    figure, axes = _figure(title)
    left = 0.0
    for (span, seconds), colour in zip(means.items(), itertools.cycle(COLOURS), strict=False):
        axes.barh([0], [seconds], left=left, color=colour, label=f"{span} {seconds:.3f} s")
        left += seconds
    axes.set_yticks([])
    axes.set_xlabel("seconds per step (mean)")
    axes.set_ylim(-0.5, 0.5 + 0.22 * len(means))  # space for the legend
    return _finish(figure, axes, legend=True)


def _points(rows: Rows, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means


def _figure(title: str, *, height: float = 3.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _finish(figure: Any, axes: Any, *, legend: bool) -> str:
    if legend:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    # an XML header is not allowed inside an HTML page
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
