"""Tensor memory that an engine releases while it sleeps."""

from collections.abc import Iterable

from torch import Tensor


class Storages:
    """Releases and reallocates the memory of tensors; all views stay valid, but the contents are lost."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        unique = {storage.data_ptr(): storage for storage in storages.values() if storage.nbytes()}
        self._sized = [(storage, storage.nbytes()) for storage in unique.values()]

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensors hold now."""
        return sum(storage.nbytes() for storage, _ in self._sized)

    def release(self) -> None:
        """Release the memory of all tensors."""
        for storage, _ in self._sized:
            storage.resize_(0)

    def reallocate(self) -> None:
        """Allocate memory of the original size for all tensors, with undefined contents."""
        for storage, size in self._sized:
            if storage.nbytes() != size:
                storage.resize_(size)
