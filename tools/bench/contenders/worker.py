"""A contender's side of the protocol with tools/bench/step.py.

Imports only the standard library, because TRL's interpreter does not have this project. Contenders take turns: each
waits idle until a step is requested, and replies with its measurements.
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
    """Cost of the phases of one step; time outside of all phases is ``rest``."""

    def __init__(self) -> None:
        self._begin = now()
        self._outside: set[str] = set()
        self.phases: dict[str, Cost] = {}

    @contextmanager
    def outside(self, name: str) -> Iterator[None]:
        """Measure the body as a phase that does not count towards the step."""
        self._outside.add(name)
        with self.phase(name):
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the cost of the body to a phase."""
        begin = now()
        try:
            yield
        finally:
            self.add(name, begin)

    def add(self, name: str, begin: Cost) -> None:
        """Add the cost since ``begin`` to a phase."""
        wall, cpu = self.phases.get(name, (0.0, 0.0))
        end = now()
        self.phases[name] = (wall + end[0] - begin[0], cpu + end[1] - begin[1])

    def result(self) -> dict[str, Cost]:
        """Cost of all phases, of ``rest``, and of the whole ``step``."""
        end = now()
        outside = [self.phases[name] for name in self._outside]
        inside = [cost for name, cost in self.phases.items() if name not in self._outside]
        step = [end[i] - self._begin[i] - sum(cost[i] for cost in outside) for i in (0, 1)]
        rest = [step[i] - sum(cost[i] for cost in inside) for i in (0, 1)]
        return {**self.phases, "rest": (rest[0], rest[1]), "step": (step[0], step[1])}


def now() -> Cost:
    """Current time of both clocks."""
    return time.perf_counter(), time.process_time()


class Channel:
    """Pipe to the parent; output that libraries print goes to standard error instead."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **facts: Any) -> None:
        """Send one line of JSON."""
        print(json.dumps(facts), file=self._out, flush=True)

    def wait(self) -> None:
        """Wait until the parent requests a step; end the process if the parent has closed the pipe."""
        if not sys.stdin.readline():
            sys.stderr.flush()
            os._exit(0)  # trainers and their workers have nothing to save


def serve(facts: dict[str, Any], step: Callable[[Clock], dict[str, Any]], weights: Callable[[], float]) -> None:
    """Make a step on each request; for contenders that own their loop.

    Args:
        facts: facts of the contender, such as its number of parameters, that must agree with those of the others.
        step: makes one step and returns the work that it did.
        weights: returns the sum of all weights, which shows whether steps change them.
    """
    channel = Channel()
    channel.send(**facts, weights=weights())
    while True:
        channel.wait()
        clock = Clock()
        work = step(clock)
        costs = clock.result()
        channel.send(work=work, costs=costs, weights=weights())
