"""Medians with their noise, as a table and as JSON."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from contenders.compare import Comparison

PHASES = ("push", "generation", "update", "rest", "logprobs")
OURS, WALL, CPU = "ours", 0, 1


@dataclass(frozen=True)
class Spread:
    """A median and the middle half around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """First quartile, median and third quartile."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def text(self, digits: int) -> str:
        """Median and half of the interquartile range."""
        return f"{self.median:.{digits}f} ± {(self.high - self.low) / 2:.{digits}f}"


def costs(comparison: Comparison, name: str, phase: str, clock: int) -> list[float]:
    """A phase of every round in seconds; empty when the contender has no such phase."""
    return [step.costs[phase][clock] for step in comparison.steps[name] if phase in step.costs]


def ratio(comparison: Comparison, name: str, to: str, phase: str = "step", clock: int = WALL) -> Spread:
    """How many times as long ``name`` takes as ``to``, paired by round, so that a slow minute hits both."""
    pairs = zip(costs(comparison, name, phase, clock), costs(comparison, to, phase, clock), strict=True)
    return Spread.of([mine / other for mine, other in pairs])


def loop_table(comparison: Comparison) -> str:
    """One line for each contender: a step, against ours, and its phases."""
    work, rounds = comparison.workload, len(comparison.steps[OURS])
    lines = [
        f"{comparison.size}: {comparison.num_parameters:,} parameters, {work.threads} thread(s), "
        f"{work.num_prompts} x {work.group_size} sequences of {work.new_tokens} new tokens, {rounds} rounds",
        "| | s/step | CPU-s/step | times ours | times ours, CPU | " + " | ".join(PHASES) + " (apart) |",
        "|---" * (5 + len(PHASES)) + "|",
    ]
    for name in comparison.steps:
        cells = [
            name,
            Spread.of(costs(comparison, name, "step", WALL)).text(3),
            Spread.of(costs(comparison, name, "step", CPU)).text(3),
            ratio(comparison, name, OURS).text(2),
            ratio(comparison, name, OURS, clock=CPU).text(2),
        ]
        for phase in PHASES:
            values = costs(comparison, name, phase, WALL)
            cells.append(f"{statistics.median(values):.3f}" if values else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overhead_line(comparison: Comparison) -> str:
    """Megatron against transformers on the same batch."""
    (name,) = comparison.steps
    rounds = comparison.steps[name]
    parts = [
        f"{phase} {Spread.of([step.costs[phase][WALL] for step in rounds]).text(3)} s"
        for phase in ("megatron", "transformers")
    ]
    wall, cpu = (
        Spread.of([step.costs["megatron"][clock] / step.costs["transformers"][clock] for step in rounds]).text(2)
        for clock in (WALL, CPU)
    )
    return f"update alone, same batch: {', '.join(parts)}: Megatron takes {wall} times as long, {cpu} of the CPU time"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything measured, round by round, with the medians."""
    summary = {}
    for name, steps in comparison.steps.items():
        phases = sorted(steps[0].costs)
        summary[name] = {
            phase: {
                "wall_s": asdict(Spread.of(costs(comparison, name, phase, WALL))),
                "cpu_s": asdict(Spread.of(costs(comparison, name, phase, CPU))),
            }
            for phase in phases
        }
    return {
        "size": comparison.size,
        "parameters": comparison.num_parameters,
        "workload": {key: value for key, value in asdict(comparison.workload).items() if key != "folder"},
        "summary": summary,
        "rounds": {name: [asdict(step) for step in steps] for name, steps in comparison.steps.items()},
    }
