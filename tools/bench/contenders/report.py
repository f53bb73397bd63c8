"""Medians with their spread, as a table and as JSON."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from contenders.compare import Comparison

PHASES = ("push", "generation", "update", "rest", "logprobs")
OURS, WALL, CPU = "ours", 0, 1


@dataclass(frozen=True)
class Spread:
    """A median with the first and third quartile."""

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
    """Seconds of a phase in every round; empty if the contender has no such phase.

    Args:
        clock: WALL or CPU.
    """
    return [step.costs[phase][clock] for step in comparison.steps[name] if phase in step.costs]


def ratio(comparison: Comparison, name: str, to: str, phase: str = "step", clock: int = WALL) -> Spread:
    """Ratio of the time of ``name`` to that of ``to``, paired by round, so that load on the machine affects both."""
    pairs = zip(costs(comparison, name, phase, clock), costs(comparison, to, phase, clock), strict=True)
    return Spread.of([time / base for time, base in pairs])


def loop_table(comparison: Comparison) -> str:
    """One line per contender: seconds of a step, ratio to ours, and seconds of its phases."""
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
    """Sentence that compares Megatron's and transformers' update of the same batch."""
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
    """All measurements by round, and their medians."""
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
