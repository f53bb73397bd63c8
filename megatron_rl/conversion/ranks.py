"""The processes that share a conversion: a single one, or those that torchrun starts."""

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
    """This process's rank, and the number of processes."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def together(self, function: Callable[[], T]) -> list[T]:
        """Call the function on every rank and return the results of all ranks, in rank order; collective.

        Raises:
            MegatronRLError: the function failed on another rank; ConversionError for exceptions of other packages.
        """
        with raise_over(self.size, otherwise=ConversionError):
            result = function()
        return gather_over(result, self.size)

    def add_up(self, name: str, amount: int) -> int:
        """Add to a named counter that all ranks share and return the new count; for several processes only."""
        assert self.size > 1, "a single process keeps its own count"
        return int(dist.distributed_c10d._get_default_store().add(name, amount))


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the process group of torchrun; without torchrun, this process is the only rank."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(rank=0, size=1)
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(rank=dist.get_rank(), size=size)
    finally:
        dist.destroy_process_group()
