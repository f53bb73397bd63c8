"""Supervision of an engine's child processes, so that a wait ends when a process has exited."""

import asyncio
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from megatron_rl.errors import EngineDied

POLL_S = 0.5
JOIN_S = 10.0
# signals that the trainer handles; an engine must not replace their handlers
TRAINER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class ChildWatch:
    """Ends a wait on an event loop when a process has exited, or when no answer comes for ``timeout_s`` seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, processes: Collection[BaseProcess], timeout_s: float) -> None:
        """
        Args:
            loop: event loop that waits for the engine's answers.
            processes: child processes of this process.
            timeout_s: longest time without an answer, in seconds.
        """
        self._loop = loop
        self._processes = processes
        self._timeout_s = timeout_s
        self._lost = ""
        self._last_answer = time.monotonic()
        self._task = loop.create_task(self._monitor())
        # at exit Python joins the child processes, but an engine's never end by themselves
        self._at_exit = Finalize(None, self._kill, exitpriority=10)

    @property
    def lost(self) -> str:
        """Why the engine cannot answer any more; empty while it can."""
        self._lost = self._lost or self._exited()
        return self._lost

    @contextmanager
    def waiting(self, *, keep_timer: bool = False) -> Iterator[None]:
        """Watch the processes during a wait for an answer in the body.

        Args:
            keep_timer: do not restart the timeout, because this wait continues one in which no answer came.

        Raises:
            EngineDied: a process has exited, or no answer came in time.
        """
        if not keep_timer:
            self._last_answer = time.monotonic()
        if self.lost:
            raise EngineDied(self._lost)
        try:
            yield
        except RuntimeError as error:  # asyncio raises it in a wait whose loop is stopped
            if self._lost:
                raise EngineDied(self._lost) from error
            raise

    def abandon(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        """Cancel tasks that wait for a lost engine, and wait until they have ended."""
        for task in (self._task, *tasks):
            task.cancel()
        with suppress(RuntimeError):  # the monitor has already requested a stop of the loop
            self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.run_until_complete(asyncio.wait(tasks))

    def kill(self) -> None:
        """Kill the processes and all of their descendants."""
        self._task.cancel()
        self._at_exit()

    def _kill(self) -> None:
        for process in self._processes:
            for descendant in _descendants(process.pid):
                descendant.kill()
            process.kill()
            process.join(JOIN_S)

    async def _monitor(self) -> None:
        while not self._lost:
            await asyncio.sleep(POLL_S)
            silent_s = time.monotonic() - self._last_answer
            if silent_s > self._timeout_s:
                self._lost = f"the engine gave no answer for {silent_s:.0f} s (rollout.engine_timeout_s)"
            self._lost = self._lost or self._exited()
        self._loop.stop()

    def _exited(self) -> str:
        dead = [process.pid for process in self._processes if not process.is_alive()]
        return f"the engine's process {dead[0]} has exited" if dead else ""


@contextmanager
def preserve_signal_handlers() -> Iterator[None]:
    """Block the trainer's signals during the body, in which an engine starts, and restore their handlers after it.

    The engine's processes inherit the block, because some launchers signal all processes of a rank.
    """
    resource_tracker.ensure_running()  # if it started with the first child process, it would unblock the signals
    handlers = {number: signal.getsignal(number) for number in TRAINER_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINER_SIGNALS)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # signals that arrived meanwhile are delivered now


def _descendants(pid: int | None) -> list[Any]:
    """Return all descendants of a process as psutil processes."""
    import psutil  # a dependency of SGLang

    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
