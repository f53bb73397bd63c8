"""Memory that an engine gives up while it sleeps and takes again."""

from collections.abc import Iterable

from torch import Tensor


class Storages:
    """Tensors whose memory comes and goes while every view of them stays valid; their contents are lost."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        found = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        unique = {storage.data_ptr(): storage for storage in found.values() if storage.nbytes()}
        self._sized = [(storage, storage.nbytes()) for storage in unique.values()]

    @property
    def num_bytes(self) -> int:
        """Held now."""
        return sum(storage.nbytes() for storage, _ in self._sized)

    def give_up(self) -> None:
        """Hold nothing."""
        for storage, _ in self._sized:
            storage.resize_(0)

    def take_again(self) -> None:
        """Hold what was held at first, with any contents."""
        for storage, size in self._sized:
            if storage.nbytes() != size:
                storage.resize_(size)
