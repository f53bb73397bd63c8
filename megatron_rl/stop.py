"""Stopping cleanly: a signal asks, the loop answers at the end of a step."""

import signal
from types import FrameType

from megatron_rl.collective import any_rank
from megatron_rl.types import ParallelContext


class StopRequest:
    """Remembers SIGTERM and SIGINT; a second one ends the process at once."""

    def __init__(self, parallel: ParallelContext) -> None:
        self._parallel = parallel
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def agreed(self) -> bool:
        """True on every rank once one was asked; collective."""
        return any_rank(self._asked, self._parallel)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)
