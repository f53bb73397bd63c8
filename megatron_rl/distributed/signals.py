"""Clean stop on a signal or before the job's end: engines and training loop stop within seconds."""

import os
import signal
import time
from types import FrameType

from megatron_rl.distributed.collectives import any_rank
from megatron_rl.types import ParallelContext

EXIT_REQUEUE = 75
"""Exit status of a run that a scheduler has interrupted and should start again (EX_TEMPFAIL of sysexits.h)."""
KEY = "stop"
"""Key in the world's store; set once any rank has a stop request."""
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Stop requests of a scheduler or an operator; they may arrive repeatedly."""
POLL_S = 0.5
"""Seconds between checks for stop requests of other ranks."""


class StopRequest:
    """Records stop requests: SIGTERM, SIGINT, SIGUSR1 or the end of the job; a second SIGINT kills the process."""

    def __init__(self, parallel: ParallelContext, *, before_end_s: float | None = None) -> None:
        """
        Args:
            before_end_s: seconds before the end of the Slurm job at which the run stops by itself; None: never.
        """
        self._parallel = parallel
        self._received: set[int] = set()
        self._deadline = deadline(before_end_s)
        self._is_published = False
        self._last_check_s = -float("inf")
        # USR1: the time limit is near. Under Slurm only Slurm itself sends TERM: on preemption or to cancel the job
        self._scheduler_signals = {signal.SIGUSR1} | ({signal.SIGTERM} if "SLURM_JOB_ID" in os.environ else set())
        for number in (*STOP_SIGNALS, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def requested(self) -> bool:
        """Whether any rank has a stop request; the same on every rank; collective."""
        return any_rank(self._is_requested(), self._parallel)

    def should_requeue(self) -> bool:
        """Whether the stop request came from a scheduler; collective."""
        return any_rank(bool(self._received & self._scheduler_signals) or self._is_late(), self._parallel)

    def poll(self) -> bool:
        """Whether any rank has a stop request, as far as this rank knows; not collective, for use within a phase."""
        if self._is_requested():
            if not self._is_published:
                self._is_published = True
                self._parallel.store.set(KEY, "1")
            return True
        now = time.monotonic()
        if now - self._last_check_s < POLL_S:
            return False
        self._last_check_s = now
        return bool(self._parallel.store.check([KEY]))

    def _is_requested(self) -> bool:
        return bool(self._received) or self._is_late()

    def _is_late(self) -> bool:
        return time.time() > self._deadline

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received.add(number)
        if number == signal.SIGINT:  # not the others: schedulers repeat them, and use SIGKILL in the end
            signal.signal(number, signal.SIG_DFL)


def ignore_stop_signals() -> None:
    """Ignore stop signals: the run is over, and a signal must not replace its exit status."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # Python removes its own handlers before the process ends


def deadline(before_end_s: float | None) -> float:
    """Unix time in seconds at which a run should stop by itself; infinite outside of Slurm or without a margin."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return int(end) - before_end_s if end.isdigit() and before_end_s is not None else float("inf")
