"""Host-side collectives of plain objects, and errors that all ranks raise together."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rl.errors import MegatronRLError
from megatron_rl.types import ParallelContext

T = TypeVar("T")


def gather_objects(value: T, parallel: ParallelContext) -> list[T]:
    """The value of every rank, on every rank, in rank order."""
    if parallel.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(gathered, value, group=parallel.host_group)
    return gathered


def any_rank(flag: bool, parallel: ParallelContext) -> bool:
    """True on every rank when it is true on one."""
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=parallel.host_group)
    return bool(raised)


def barrier(parallel: ParallelContext) -> None:
    """Wait for every rank."""
    gather_objects(None, parallel)


@contextmanager
def raise_together(parallel: ParallelContext) -> Iterator[None]:
    """Let every rank raise when one does, so that none waits for it in vain.

    The body must contain no collective that a failing rank could leave the others in.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # of any kind: the others must hear of it before it goes on
        failure = error
    told = None if failure is None else (type(failure) if isinstance(failure, MegatronRLError) else None, str(failure))
    failures = gather_objects(told, parallel)
    if failure is not None:
        raise failure
    for rank, found in enumerate(failures):
        if found is not None:
            kind, message = found
            raise (kind or MegatronRLError)(f"{message} (on rank {rank})")
