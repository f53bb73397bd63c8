"""Wall-clock time of the parts of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import record_function

from megatron_rl.metrics.metric import Max, Reduction


class Stopwatch:
    """Adds up the seconds of named spans of one step; its metrics reduce to the maximum over ranks."""

    def __init__(self, on_span: Callable[[str], None] = lambda name: None) -> None:
        """
        Args:
            on_span: called with the name of every span as it begins.
        """
        self._on_span = on_span
        self._start = time.perf_counter()
        self._spans: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the body under ``timing_s/<name>``."""
        self._on_span(name)
        start = time.perf_counter()
        try:
            with record_function(name):  # shows the span in a profile
                yield
        finally:
            self._spans[name] = self._spans.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, Reduction]:
        """Seconds of all spans so far, and of the whole step."""
        whole = time.perf_counter() - self._start
        spans = {f"timing_s/{name}": Max(seconds) for name, seconds in self._spans.items()}
        return {**spans, "timing_s/step": Max(whole), "perf/time_per_step": Max(whole)}
