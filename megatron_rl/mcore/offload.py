"""Move a learner's weights, gradients and optimizer state to host memory and back."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, UntypedStorage

from megatron_rl.config.performance import OffloadPart
from megatron_rl.mcore.model.quantized import held_tensors
from megatron_rl.mcore.runtime.patches import inner_optimizers


class Offloader:
    """Moves the storages of some parts to the host and back.

    Storages are resized to 0 and back, so every tensor that views them stays valid.
    """

    def __init__(
        self, parts: Sequence[OffloadPart], chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
    ) -> None:
        """
        Args:
            parts: parts that ``to_host`` moves.
            chunks: model chunks whose weights and gradients are moved.
            optimizer: optimizer whose master weights and moments are moved.
        """
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        weights = _unique(tensor for parameter in parameters for tensor in held_tensors(parameter))
        gradients = _unique(
            buffer.grad_data for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
        )
        states = _unique(_optimizer_tensors(optimizer), without=weights)
        self._storages: dict[OffloadPart, list[_OffloadedStorage]] = {
            "params": [_OffloadedStorage(storage, keep=True) for storage in weights],
            # gradients need no copy: they are zeroed before they are used again
            "grads": [_OffloadedStorage(storage, keep=False) for storage in gradients],
            "optimizer": [_OffloadedStorage(storage, keep=True) for storage in states],
        }
        self._parts = tuple(parts)
        self._on_host: set[OffloadPart] = set()

    def device_bytes(self) -> dict[OffloadPart, int]:
        """Bytes of each part that are on the device now."""
        return {part: sum(storage.device_bytes for storage in storages) for part, storages in self._storages.items()}

    def to_host(self) -> int:
        """Move the parts to the host and return the number of device bytes that were freed."""
        storages = [storage for part in self._parts if part not in self._on_host for storage in self._storages[part]]
        self._on_host |= set(self._parts)
        for storage in storages:
            storage.copy_to_host()
        _synchronize()
        for storage in storages:
            storage.free()
        if torch.cuda.is_available():  # returns the memory to engines in other processes
            torch.cuda.empty_cache()
        return sum(storage.size for storage in storages)

    def to_device(self, parts: Iterable[OffloadPart] = ("params", "grads", "optimizer")) -> None:
        """Move those of the given parts that are on the host back to the device."""
        returning = self._on_host & set(parts)
        self._on_host -= returning
        for storage in (storage for part in self._parts if part in returning for storage in self._storages[part]):
            storage.restore()
        _synchronize()

    def is_on_host(self, part: OffloadPart) -> bool:
        """Whether a part is on the host now."""
        return part in self._on_host


class _OffloadedStorage:
    """A storage and its host buffer, which is reused from one offload to the next."""

    def __init__(self, storage: UntypedStorage, *, keep: bool) -> None:
        self._storage = storage
        self.size = storage.nbytes()
        self._keep = keep
        self._host: Tensor | None = None

    @property
    def device_bytes(self) -> int:
        """Current size of the storage."""
        return self._storage.nbytes()

    def copy_to_host(self) -> None:
        if not self._keep:
            return
        if self._host is None:
            self._host = torch.empty(self.size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._host.copy_(self._bytes(), non_blocking=True)

    def free(self) -> None:
        self._storage.resize_(0)

    def restore(self) -> None:
        self._storage.resize_(self.size)
        if self._host is not None:
            self._bytes().copy_(self._host, non_blocking=True)
        else:
            self._bytes().zero_()

    def _bytes(self) -> Tensor:
        """[size] uint8 view of the storage."""
        return torch.empty(0, dtype=torch.uint8, device=self._storage.device).set_(self._storage)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Yield master weights and moments; step counts are too small to be worth moving."""
    for inner in inner_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            yield from group["params"]
        for state in inner.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0)


def _unique(tensors: Iterable[Tensor], without: Sequence[UntypedStorage] = ()) -> list[UntypedStorage]:
    """Distinct non-empty storages of the tensors, leaving out host tensors on a machine with a GPU.

    Args:
        tensors: tensors, several of which may share a storage.
        without: storages to leave out.
    """
    seen = {storage.data_ptr() for storage in without}
    storages = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        is_host_tensor = torch.cuda.is_available() and not tensor.is_cuda
        if storage.data_ptr() not in seen and storage.nbytes() and not is_host_tensor:
            seen.add(storage.data_ptr())
            storages.append(storage)
    return storages
