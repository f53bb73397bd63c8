"""Distribution of the requests of a step over the engines of all ranks."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

from megatron_rl.rollout.engines.base import EnginePlace

T = TypeVar("T")


def share(
    items: Sequence[T], schedule: Literal["dynamic", "static"], name: str, place: EnginePlace, store: Any
) -> Iterator[T]:
    """Yield the items of one engine, one by one as the engine's leader requests them.

    Args:
        items: all items, the same on every rank.
        schedule: "static" gives engine i the items i, i + N, i + 2N, ... of N engines; "dynamic" gives the next item
            that no engine has taken yet.
        name: name of the shared counter, different for every shared list.
        place: position of this rank among the engines.
        store: torch.distributed store of the world.
    """
    if schedule == "static" or place.count == 1:
        yield from items[place.index :: place.count]
        return
    while (taken := store.add(name, 1) - 1) < len(items):
        yield items[taken]


def fair_share(num_items: int, place: EnginePlace) -> int:
    """Number of items that one engine may process at a time, so that no engine starts with more than its share."""
    return max(1, -(-num_items // place.count))
