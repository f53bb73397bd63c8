"""A watch over the processes of an engine, so that nobody waits for one that is gone."""

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
# signals that have a meaning in a training run: an engine must not answer them in its place
OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class ChildWatch:
    """Ends a wait on an event loop when a process is gone, or when no answer comes for too long."""

    def __init__(self, loop: asyncio.AbstractEventLoop, processes: Collection[BaseProcess], timeout_s: float) -> None:
        """
        Args:
            processes: children of this one.
            timeout_s: longest time without an answer.
        """
        self._loop = loop
        self._processes = processes
        self._timeout_s = timeout_s
        self._lost = ""
        self._last_answer = time.monotonic()
        self._task = loop.create_task(self._look())
        # a process that ends joins its children first, which an engine's never do
        self._at_exit = Finalize(None, self._kill, exitpriority=10)

    @property
    def lost(self) -> str:
        """Why the engine will not answer any more; empty while it may."""
        self._lost = self._lost or self._gone()
        return self._lost

    @contextmanager
    def waiting(self, *, goes_on: bool = False) -> Iterator[None]:
        """Around a wait for answers.

        Args:
            goes_on: it is the same wait as before, in which no answer came yet.

        Raises:
            EngineDied: none will come.
        """
        if not goes_on:
            self._last_answer = time.monotonic()
        if self.lost:
            raise EngineDied(self._lost)
        try:
            yield
        except RuntimeError as error:  # how a loop that is stopped ends a wait
            if self._lost:
                raise EngineDied(self._lost) from error
            raise

    def abandon(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        """Cancel tasks that wait for an engine that is lost, and let them hear of it."""
        for task in (self._task, *tasks):
            task.cancel()
        with suppress(RuntimeError):  # a stop of the loop that the watch had asked for already
            self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.run_until_complete(asyncio.wait(tasks))

    def kill(self) -> None:
        """End the processes and all that they started."""
        self._task.cancel()
        self._at_exit()

    def _kill(self) -> None:
        for process in self._processes:
            for one in _descendants(process.pid):
                one.kill()
            process.kill()
            process.join(JOIN_S)

    async def _look(self) -> None:
        while not self._lost:
            await asyncio.sleep(POLL_S)
            silent = time.monotonic() - self._last_answer
            if silent > self._timeout_s:
                self._lost = f"the engine gave no answer for {silent:.0f} s (rollout.engine_timeout_s)"
            self._lost = self._lost or self._gone()
        self._loop.stop()

    def _gone(self) -> str:
        dead = [process.pid for process in self._processes if not process.is_alive()]
        return f"the engine's process {dead[0]} is gone" if dead else ""


@contextmanager
def own_signals() -> Iterator[None]:
    """Keep this process's handlers of signals although an engine that starts sets its own.

    The engine's processes inherit that they do not hear them: some launchers signal all processes of a rank.
    """
    resource_tracker.ensure_running()  # its start, with the first process of all, would let signals through again
    before = {one: signal.getsignal(one) for one in OURS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what came meanwhile is heard now


def _descendants(pid: int | None) -> list[Any]:
    """As psutil knows them, which SGLang brings along."""
    import psutil

    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
