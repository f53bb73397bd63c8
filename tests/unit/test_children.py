"""Waits for an engine end when its child process has exited or does not answer."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

import pytest

from megatron_rl.errors import EngineDied
from megatron_rl.rollout.engines.children import POLL_S, ChildWatch


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with closing(asyncio.new_event_loop()) as new:
        yield new


@pytest.fixture
def watch_of(loop: asyncio.AbstractEventLoop) -> Iterator[Callable[[BaseProcess, float], ChildWatch]]:
    watches: list[ChildWatch] = []

    def get(child: BaseProcess, timeout_s: float) -> ChildWatch:
        watches.append(ChildWatch(loop, [child], timeout_s))
        return watches[-1]

    yield get
    for watch in watches:
        watch.kill()


def sleeping_child() -> BaseProcess:
    child = get_context("spawn").Process(target=time.sleep, args=(600.0,))
    child.start()
    return child


async def slow_to_cancel() -> None:
    try:
        await asyncio.sleep(600.0)
    finally:
        await asyncio.sleep(2 * POLL_S)


def test_a_wait_ends_when_the_child_has_exited(
    loop: asyncio.AbstractEventLoop, watch_of: Callable[[BaseProcess, float], ChildWatch]
) -> None:
    child = sleeping_child()
    watch = watch_of(child, 600.0)
    loop.call_later(POLL_S / 2, child.kill)
    with pytest.raises(EngineDied, match=f"process {child.pid} has exited"), watch.waiting():
        loop.run_until_complete(asyncio.sleep(600.0))


def test_a_wait_ends_when_no_answer_comes(
    loop: asyncio.AbstractEventLoop, watch_of: Callable[[BaseProcess, float], ChildWatch]
) -> None:
    watch = watch_of(sleeping_child(), POLL_S)
    with pytest.raises(EngineDied, match="no answer for"), watch.waiting():
        loop.run_until_complete(asyncio.sleep(600.0))


@pytest.mark.parametrize("is_stopping", [False, True])
def test_tasks_that_wait_for_a_lost_child_are_cancelled_even_if_the_loop_is_stopping(
    is_stopping: bool, loop: asyncio.AbstractEventLoop, watch_of: Callable[[BaseProcess, float], ChildWatch]
) -> None:
    child = sleeping_child()
    watch = watch_of(child, 600.0)
    tasks = [loop.create_task(slow_to_cancel()) for _ in range(3)]
    loop.run_until_complete(asyncio.sleep(0))
    child.kill()
    child.join()
    assert watch.lost  # `lost` polls the process; the monitor has not run since, and will request a stop of the loop
    time.sleep(POLL_S)
    if is_stopping:
        loop.stop()
    watch.abandon(tasks)
    assert all(task.cancelled() for task in tasks)
