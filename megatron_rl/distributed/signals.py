"""Stopping cleanly: a signal or the clock asks, engines and the loop answer within seconds."""

import os
import signal
import time
from types import FrameType

from megatron_rl.distributed.collectives import any_rank
from megatron_rl.types import ParallelContext

EXIT_REQUEUE = 75
"""Exit status of a run that a scheduler has interrupted and should start again (EX_TEMPFAIL of sysexits.h)."""
KEY = "stop"
"""In the world's store, once a rank was asked."""
REQUESTS = (signal.SIGUSR1, signal.SIGTERM)
"""To stop, by a scheduler or an operator; they may come again and again."""
POLL_S = 0.5
"""Between looks at what other ranks were asked."""


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1, and when the job ends; a second SIGINT ends the process at once."""

    def __init__(self, parallel: ParallelContext, *, before_end_s: float | None = None) -> None:
        """
        Args:
            before_end_s: seconds before the end of the Slurm job at which the run stops by itself; None: never.
        """
        self._parallel = parallel
        self._asked: set[int] = set()
        self._deadline = deadline(before_end_s)
        self._told_others = False
        self._looked = -float("inf")
        # USR1: the time is nearly over. Under Slurm nobody but Slurm sends TERM: at a preemption, or to cancel
        self._of_schedulers = {signal.SIGUSR1} | ({signal.SIGTERM} if "SLURM_JOB_ID" in os.environ else set())
        for number in (*REQUESTS, signal.SIGINT):
            signal.signal(number, self._ask)

    def requested(self) -> bool:
        """True on every rank once one was asked; collective."""
        return any_rank(self._is_asked(), self._parallel)

    def should_requeue(self) -> bool:
        """Whether it was a scheduler that asked; collective."""
        return any_rank(bool(self._asked & self._of_schedulers) or self._is_late(), self._parallel)

    def poll(self) -> bool:
        """Whether any rank was asked, as far as this one knows; for the middle of a phase, where others do not meet."""
        if self._is_asked():
            if not self._told_others:
                self._told_others = True
                self._parallel.store.set(KEY, "1")
            return True
        now = time.monotonic()
        if now - self._looked < POLL_S:
            return False
        self._looked = now
        return bool(self._parallel.store.check([KEY]))

    def _is_asked(self) -> bool:
        return bool(self._asked) or self._is_late()

    def _is_late(self) -> bool:
        return time.time() > self._deadline

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.add(number)
        if number == signal.SIGINT:  # schedulers repeat theirs, and end what does not hear by SIGKILL
            signal.signal(number, signal.SIG_DFL)


def ignore_stop_signals() -> None:
    """Requests to stop: the run is over, and its status is to be what it says, not the signal's."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)  # Python takes other handlers away before a process ends


def deadline(before_end_s: float | None) -> float:
    """Seconds since 1970 at which a run should stop by itself; infinite outside of Slurm, or without a limit."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - before_end_s if end.isdigit() and before_end_s is not None else float("inf")
