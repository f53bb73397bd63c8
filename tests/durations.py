"""A table of where the time of the tests goes, by file: pytest --durations-table FILE."""

import functools
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.gang import Gang

HEADER = (
    "| file | tests | seconds | of set-up | of imports | of starting worlds | new interpreters | forked processes |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


@dataclass
class FileTimes:
    """What the tests of a file took, in seconds."""

    num_tests: int = 0
    total_s: float = 0.0
    setup_s: float = 0.0
    imports_s: float = 0.0
    """Imports of the test file, and those of the fork server that the file waited for."""
    worlds_s: float = 0.0
    """Starts of worlds of ranks."""
    num_interpreters: int = 0
    """Python processes that imported everything themselves."""
    num_forked: int = 0


class Durations:
    """Pytest plugin that measures in the processes that run tests, and writes the table in the one that reports."""

    def __init__(self, table: Path) -> None:
        self._table = table
        self._files: dict[str, FileTimes] = defaultdict(FileTimes)
        self._now = FileTimes()
        self._collected: dict[str, float] = {}
        Gang.__init__ = self._timed(Gang.__init__, "worlds_s")  # type: ignore[method-assign]
        forked.ForkServer.__init__ = self._timed(forked.ForkServer.__init__, "imports_s")  # type: ignore[method-assign]
        forked.ForkServer.fork = self._counted(forked.ForkServer.fork, "num_forked")  # type: ignore[method-assign]
        subprocess.Popen.__init__ = self._counted(subprocess.Popen.__init__, "num_interpreters")  # type: ignore[method-assign]

    def _timed(self, function: Callable[..., Any], field: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            setattr(self._now, field, getattr(self._now, field) + time.perf_counter() - start)
            return result

        return call

    def _counted(self, function: Callable[..., Any], field: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            words = arguments[1] if len(arguments) > 1 else options.get("args", [])
            if field == "num_forked" or "python" in str(words[0] if isinstance(words, list) else words):
                setattr(self._now, field, getattr(self._now, field) + 1)
            return function(*arguments, **options)

        return call

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        """Time the import of a test file."""
        start = time.perf_counter()
        yield
        if isinstance(collector, pytest.Module):
            self._collected[collector.nodeid] = time.perf_counter() - start

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        """Send what was measured along with the report of the test."""
        yield
        file = item.nodeid.partition("::")[0]
        self._now.imports_s += self._collected.pop(file, 0.0)
        item.user_properties.append(("times", vars(self._now)))
        self._now = FileTimes()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a report to the times of its file."""
        times = self._files[report.nodeid.partition("::")[0]]
        times.total_s += report.duration
        if report.when == "setup":
            times.setup_s += report.duration
        if report.when == "teardown":
            times.num_tests += 1
            for name, value in dict(report.user_properties).get("times", {}).items():
                if name not in ("num_tests", "total_s", "setup_s"):
                    setattr(times, name, getattr(times, name) + value)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the table, longest files first."""
        if hasattr(session.config, "workerinput"):
            return
        rows = sorted(self._files.items(), key=lambda pair: -pair[1].total_s)
        lines = (
            f"| {file} | {t.num_tests} | {t.total_s:.1f} | {t.setup_s:.1f} | {t.imports_s:.1f} | {t.worlds_s:.1f} "
            f"| {t.num_interpreters} | {t.num_forked} |\n"
            for file, t in rows
        )
        self._table.write_text(HEADER + "".join(lines))
