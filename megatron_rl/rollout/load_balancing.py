"""How the engines of all ranks share the requests of a step."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

from megatron_rl.rollout.engines.base import EnginePlace

T = TypeVar("T")


def share(
    items: Sequence[T], schedule: Literal["dynamic", "static"], name: str, place: EnginePlace, store: Any
) -> Iterator[T]:
    """An engine's items, handed out as its leader asks for them.

    Args:
        items: the same on every rank.
        schedule: static: one in so many as there are engines; dynamic: the next that no engine has taken yet.
        name: of the counter, different for every list that is shared.
        store: torch.distributed store of the world.
    """
    if schedule == "static" or place.count == 1:
        yield from items[place.index :: place.count]
        return
    while (taken := store.add(name, 1) - 1) < len(items):
        yield items[taken]


def fair_share(num_items: int, place: EnginePlace) -> int:
    """Items that one engine may have in work, so that none starts with more than its part."""
    return max(1, -(-num_items // place.count))
