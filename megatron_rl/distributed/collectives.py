"""Host-side collectives of plain objects, and errors that all ranks raise together."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rl.errors import MegatronRLError
from megatron_rl.types import ParallelContext

T = TypeVar("T")


def gather_objects(value: T, parallel: ParallelContext) -> list[T]:
    """The value of every rank, on every rank, in rank order."""
    return gather_over(value, parallel.world_size, parallel.host_group)


def gather_over(value: T, size: int, group: Any = None) -> list[T]:
    """The value of every one of a group's ranks, on each; group: None is all of them."""
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def any_rank(flag: bool, parallel: ParallelContext) -> bool:
    """True on every rank when it is true on one."""
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=parallel.host_group)
    return bool(raised)


def barrier(parallel: ParallelContext) -> None:
    """Wait for every rank."""
    gather_objects(None, parallel)


def raise_together(parallel: ParallelContext) -> AbstractContextManager[None]:
    """Let every rank raise when one does, so that none waits for it in vain.

    The body must contain no collective that a failing rank could leave the others in.
    """
    return raise_over(parallel.world_size, parallel.host_group)


@contextmanager
def raise_over(size: int, group: Any = None, *, otherwise: type[MegatronRLError] = MegatronRLError) -> Iterator[None]:
    """``raise_together`` for the ranks of a group.

    Args:
        size, group: as of ``gather_over``.
        otherwise: what the other ranks raise for an exception that is none of this package.

    Raises:
        Exception: on every rank the failure of the first rank that has one, so that all may act on it alike.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # of any kind: the others must hear of it before it goes on
        failure = error
    kind = type(failure) if isinstance(failure, MegatronRLError) else otherwise
    told = gather_over((kind, None if failure is None else str(failure)), size, group)
    first = next((rank for rank, (_, message) in enumerate(told) if message is not None), None)
    if first is None:
        return
    if failure is not None and first == (dist.get_rank(group) if size > 1 else 0):
        raise failure
    found, message = told[first]
    raise found(f"{message} (on rank {first})") from failure
