"""Asynchronous checkpoint saves: a thread writes the files while training continues.

Megatron instead forks writer processes from a process with many threads, and on CPU relies on copy-on-write. Here the
tensors are first copied to host memory and a thread writes them; writing files holds no lock that training needs.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor

# on a machine with a GPU, training keeps only tensors of at most this many elements in host memory (step counts)
MAX_HOST_ELEMENTS = 1024


class PendingSave:
    """A save in progress; every rank must call ``wait`` and then ``complete``."""

    def __init__(self, request: AsyncRequest, on_written: Callable[[], Any]) -> None:
        """Copy the tensors to host memory and start writing.

        Args:
            request: the result of ``dist_checkpointing.save``.
            on_written: called by the thread once this rank's files are written; ``wait`` returns its result.
        """
        self._finalize = request.finalize_fns
        self._on_written = on_written
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
        """Whether this rank has nothing left to write."""
        return not self._thread.is_alive()

    def wait(self) -> Any:
        """Wait until this rank's files are written, and return the result of ``on_written``.

        Raises:
            OSError: a file could not be written; any other exception of the writer thread is raised as well.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._result

    def complete(self) -> None:
        """Let Megatron finalize the folder; collective, after ``wait`` on every rank."""
        for finalize in self._finalize:
            finalize()

    def _write(self, write: Callable[..., Any] | None, arguments: list[Any], keywords: dict[str, Any]) -> None:
        try:
            if write is not None:
                write(*arguments, **keywords)
            self._result = self._on_written()
        except BaseException as failure:
            self._failure = failure


def _own_copy(bucket: Any) -> Any:
    """Return the bucket with copies of the tensors that training still changes; GPU tensors are copied already."""
    file, key, (bytes_data, tensors) = bucket
    return file, key, (bytes_data, [(item, _detached(tensor)) for item, tensor in tensors])


def _detached(tensor: Tensor) -> Tensor:
    copied_already = torch.cuda.is_available() and tensor.numel() > MAX_HOST_ELEMENTS
    return tensor if copied_already else tensor.detach().clone()
