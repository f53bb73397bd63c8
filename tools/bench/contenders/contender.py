"""The parent's handle of a contender: a process that makes a step on request."""

import json
import os
import select
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from contenders.worker import Cost
from contenders.workload import Workload

BENCH = Path(__file__).resolve().parents[1]
STEP_LIMIT_S = 120.0
ERROR_LINES = 15


class ContenderFailed(Exception):
    """A contender exited, hung or did other work than expected."""


@dataclass(frozen=True)
class Step:
    """Work and cost of one step."""

    work: dict[str, Any]
    costs: dict[str, Cost]


class Contender:
    """A contender's process. As a context manager it ends with the comparison."""

    def __init__(self, name: str, module: str, python: str, workload: Workload) -> None:
        self.name = name
        self._weights: list[float] = []
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        paths = [str(BENCH), str(BENCH.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(workload.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        self._process = subprocess.Popen(
            [python, "-m", module, workload.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        facts = self._receive()
        self.num_parameters: int = facts["parameters"]
        self._weights.append(facts["weights"])

    def step(self) -> Step:
        """Make one step; the other contenders wait meanwhile.

        Raises:
            ContenderFailed: the process exited or hung.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail("exited")
        answer = self._receive()
        self._weights.append(answer["weights"])
        return Step(answer["work"], {name: (cost[0], cost[1]) for name, cost in answer["costs"].items()})

    @property
    def first_weights(self) -> float:
        """Sum of the initial weights."""
        return self._weights[0]

    @property
    def num_changes(self) -> int:
        """Number of steps that changed the weights."""
        return sum(before != after for before, after in zip(self._weights, self._weights[1:], strict=False))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], STEP_LIMIT_S)
        if not ready:
            self._fail(f"did not answer within {STEP_LIMIT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._fail("exited")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self, how: str) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        last = "".join(self._errors.readlines()[-ERROR_LINES:])
        raise ContenderFailed(f"{self.name} {how}. Its last output:\n{last}")
