"""A checkpoint that is written while training goes on.

Megatron forks its writers, from a process full of threads, and on CPU relies on copy-on-write. Here
what is to be written is copied to host memory first, and a thread writes it: writing files holds no
lock that training needs.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor

# elements of the largest tensor that training keeps on the host of a machine with a GPU (step counts)
MOST_ON_HOST = 1024


class PendingSave:
    """One save that has begun; every rank must ``wait`` and then ``complete``."""

    def __init__(self, request: AsyncRequest, then: Callable[[], Any]) -> None:
        """Copy what is to be written and start to write.

        Args:
            request: as ``dist_checkpointing.save`` returns it.
            then: called by the thread once this rank's files are written; ``result`` is what it returns.
        """
        self._finalize = request.finalize_fns
        self._then = then
        self._failure: BaseException | None = None
        self._result: Any = None
        arguments = list(request.async_fn_args)
        if request.async_fn is not None:
            buckets = arguments[1] if request.preload_fn is None else request.preload_fn()
            arguments[1] = [_own_copy(bucket) for bucket in buckets]
        self._thread = threading.Thread(
            target=self._write, args=(request.async_fn, arguments, request.async_fn_kwargs), name="checkpoint"
        )
        self._thread.start()

    @property
    def written(self) -> bool:
        """This rank has nothing left to write."""
        return not self._thread.is_alive()

    def wait(self) -> Any:
        """Wait for this rank's files; what ``then`` returned.

        Raises:
            OSError: or whatever stopped the writer.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._result

    def complete(self) -> None:
        """Let Megatron complete the folder; collective, after ``wait`` on every rank."""
        for finalize in self._finalize:
            finalize()

    def _write(self, write: Callable[..., Any] | None, arguments: list[Any], keywords: dict[str, Any]) -> None:
        try:
            if write is not None:
                write(*arguments, **keywords)
            self._result = self._then()
        except BaseException as failure:
            self._failure = failure


def _own_copy(bucket: Any) -> Any:
    """The bucket with tensors that training does not change; those of a GPU were copied already."""
    file, key, (bytes_data, tensors) = bucket
    return file, key, (bytes_data, [(item, _detached(tensor)) for item, tensor in tensors])


def _detached(tensor: Tensor) -> Tensor:
    copied_already = torch.cuda.is_available() and tensor.numel() > MOST_ON_HOST
    return tensor if copied_already else tensor.detach().clone()
