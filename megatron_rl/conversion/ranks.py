"""The processes that share a conversion: one, or those that torchrun starts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from megatron_rl.distributed.collectives import gather_over, raise_over
from megatron_rl.errors import ConversionError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among them."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def together(self, function: Callable[[], T]) -> list[T]:
        """What the function returns on every rank; an exception of one is raised on all.

        Raises:
            MegatronRLError: the function failed on another rank; ConversionError unless it is of another kind.
        """
        with raise_over(self.size, otherwise=ConversionError):
            result = function()
        return gather_over(result, self.size)

    def add_up(self, name: str, amount: int) -> int:
        """Add to a count that all ranks share; the new count."""
        assert self.size > 1, "a single process counts for itself"
        return int(dist.distributed_c10d._get_default_store().add(name, amount))


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes of a torchrun, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(rank=0, size=1)
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(rank=dist.get_rank(), size=size)
    finally:
        dist.destroy_process_group()
