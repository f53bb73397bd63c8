"""Gloo groups share one event loop."""

from collections.abc import Callable

from tests.distributed import cases
from tests.gang import Gang


def test_groups_share_an_event_loop(gangs: Callable[[int], Gang]) -> None:
    """Two threads work for every group; torch's own groups have a third, which wakes all the time."""
    assert gangs(2).call(cases.threads_of_groups, number=4) == [(8, 12), (8, 12)]
