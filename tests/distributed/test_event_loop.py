"""Gloo groups share one event loop."""

from collections.abc import Callable

from tests.distributed import cases
from tests.gang import Gang


def test_groups_share_an_event_loop(gangs: Callable[[int], Gang]) -> None:
    """Every group has two threads; torch's own groups have a third one, which wakes up all the time."""
    assert gangs(2).call(cases.threads_added_by_groups, num_groups=4) == [(8, 12), (8, 12)]
