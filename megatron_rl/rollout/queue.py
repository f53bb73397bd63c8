"""How the engines of all ranks share the requests of a step."""

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

from megatron_rl.types import ParallelContext

T = TypeVar("T")


def share(
    items: Sequence[T], schedule: Literal["dynamic", "static"], name: str, parallel: ParallelContext
) -> Iterator[T]:
    """This rank's items, handed out as they are asked for.

    Args:
        items: the same on every rank.
        schedule: static: every world_size-th item; dynamic: the next that no rank has taken yet.
        name: of the counter, different for every list that is shared.
    """
    if schedule == "static" or parallel.world_size == 1:
        yield from items[parallel.rank :: parallel.world_size]
        return
    while (taken := parallel.store.add(name, 1) - 1) < len(items):
        yield items[taken]


def fair_share(num_items: int, parallel: ParallelContext) -> int:
    """Items that one engine may have in work, so that none starts with more than its part."""
    return max(1, -(-num_items // parallel.world_size))
