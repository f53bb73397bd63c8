"""Host-side collectives of Python objects, and errors that all ranks raise together."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_rl.errors import MegatronRLError
from megatron_rl.types import ParallelContext

T = TypeVar("T")


def gather_objects(value: T, parallel: ParallelContext) -> list[T]:
    """The values of all ranks in rank order, on every rank; collective."""
    return gather_over(value, parallel.world_size, parallel.host_group)


def gather_over(value: T, size: int, group: Any = None) -> list[T]:
    """The values of all ranks of a group in rank order, on every rank of it; collective.

    Args:
        size: number of ranks in the group.
        group: None: the whole world.
    """
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def any_rank(flag: bool, parallel: ParallelContext) -> bool:
    """Whether ``flag`` is true on any rank; collective."""
    reduced = torch.tensor(int(flag))
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=parallel.host_group)
    return bool(reduced)


def barrier(parallel: ParallelContext) -> None:
    """Wait until every rank has called this; collective."""
    gather_objects(None, parallel)


def raise_together(parallel: ParallelContext) -> AbstractContextManager[None]:
    """Raise on every rank if the body raises on any, so that no rank waits for a failed one; collective.

    The body must not contain a collective in which the other ranks would wait for a rank that has failed.
    """
    return raise_over(parallel.world_size, parallel.host_group)


@contextmanager
def raise_over(size: int, group: Any = None, *, otherwise: type[MegatronRLError] = MegatronRLError) -> Iterator[None]:
    """``raise_together`` for the ranks of a group.

    Args:
        size, group: as in ``gather_over``.
        otherwise: type that the other ranks raise if the exception is not a MegatronRLError.

    Raises:
        Exception: on every rank, the failure of the first rank that has one, so that all ranks can handle it alike.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # of any kind: the other ranks must learn of it before it propagates
        failure = error
    kind = type(failure) if isinstance(failure, MegatronRLError) else otherwise
    failures = gather_over((kind, None if failure is None else str(failure)), size, group)
    first = next((rank for rank, (_, message) in enumerate(failures) if message is not None), None)
    if first is None:
        return
    if failure is not None and first == (dist.get_rank(group) if size > 1 else 0):
        raise failure
    kind, message = failures[first]
    raise kind(f"{message} (on rank {first})") from failure
