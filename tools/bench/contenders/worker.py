"""A contender's side of the conversation with tools/bench/step.py. The standard library alone: TRL's interpreter
has nothing of this project.

Contenders take turns: each waits, idle, until it is told to make a step, and answers with what it measured.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

Cost = tuple[float, float]
"""(wall seconds, CPU seconds of this process)."""


class Clock:
    """The cost of the phases of one step; what no phase covers is ``rest``."""

    def __init__(self) -> None:
        self._begin = now()
        self._apart: set[str] = set()
        self.phases: dict[str, Cost] = {}

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Measure something that is no part of the step."""
        self._apart.add(name)
        with self.phase(name):
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the body to a phase."""
        begin = now()
        try:
            yield
        finally:
            self.add(name, begin)

    def add(self, name: str, begin: Cost) -> None:
        """Add the time since ``begin`` to a phase."""
        wall, cpu = self.phases.get(name, (0.0, 0.0))
        end = now()
        self.phases[name] = (wall + end[0] - begin[0], cpu + end[1] - begin[1])

    def result(self) -> dict[str, Cost]:
        """All phases so far and their sum with everything between them as ``step``."""
        end = now()
        apart = [self.phases[name] for name in self._apart]
        inside = [cost for name, cost in self.phases.items() if name not in self._apart]
        step = [end[i] - self._begin[i] - sum(cost[i] for cost in apart) for i in (0, 1)]
        rest = [step[i] - sum(cost[i] for cost in inside) for i in (0, 1)]
        return {**self.phases, "rest": (rest[0], rest[1]), "step": (step[0], step[1])}


def now() -> Cost:
    """The two clocks."""
    return time.perf_counter(), time.process_time()


class Channel:
    """The pipe to the parent; whatever libraries print goes to standard error instead."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **facts: Any) -> None:
        """One line of JSON."""
        print(json.dumps(facts), file=self._out, flush=True)

    def wait(self) -> None:
        """Until the parent asks for a step; when it hung up, end the process."""
        if not sys.stdin.readline():
            sys.stderr.flush()
            os._exit(0)  # trainers and their workers have nothing to save


def serve(facts: dict[str, Any], step: Callable[[Clock], dict[str, Any]], weights: Callable[[], float]) -> None:
    """Make a step whenever asked; for contenders that own their loop.

    Args:
        facts: of the contender, checked against the others'.
        step: makes one and returns what it did.
        weights: the sum of all weights, which tells whether steps change them.
    """
    channel = Channel()
    channel.send(**facts, weights=weights())
    while True:
        channel.wait()
        clock = Clock()
        work = step(clock)
        costs = clock.result()
        channel.send(work=work, costs=costs, weights=weights())
