"""Stopping cleanly: a signal asks, the loop answers at the end of a step."""

import os
import signal
from types import FrameType

from megatron_rl.collective import any_rank
from megatron_rl.types import ParallelContext

START_AGAIN = 75
"""Exit status of a run that a scheduler has interrupted and should start again (EX_TEMPFAIL of sysexits.h)."""


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1; a second SIGINT ends the process at once."""

    def __init__(self, parallel: ParallelContext) -> None:
        self._parallel = parallel
        self._asked: set[int] = set()
        # USR1: the time is nearly over. Under Slurm nobody but Slurm sends TERM: at a preemption, or to cancel
        self._of_schedulers = {signal.SIGUSR1} | ({signal.SIGTERM} if "SLURM_JOB_ID" in os.environ else set())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def agreed(self) -> bool:
        """True on every rank once one was asked; collective."""
        return any_rank(bool(self._asked), self._parallel)

    def is_to_start_again(self) -> bool:
        """Whether it was a scheduler that asked; collective."""
        return any_rank(bool(self._asked & self._of_schedulers), self._parallel)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.add(number)
        if number == signal.SIGINT:  # schedulers repeat theirs, and end what does not hear by SIGKILL
            signal.signal(number, signal.SIG_DFL)
