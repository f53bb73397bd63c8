"""Parts of the policy moved to host memory while rollouts are generated, and back."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, UntypedStorage

from megatron_rl.config.performance import OffloadPart
from megatron_rl.mcore.model.quantized import held_tensors
from megatron_rl.mcore.runtime.patches import inner_optimizers


class Offloader:
    """Empties the storages of some parts, so that every view of them stays valid, and fills them again."""

    def __init__(
        self, parts: Sequence[OffloadPart], chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
    ) -> None:
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        weights = _unique(held for parameter in parameters for held in held_tensors(parameter))
        gradients = _unique(
            buffer.grad_data for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
        )
        states = _unique(_optimizer_tensors(optimizer), without=weights)
        found: dict[OffloadPart, list[_Moved]] = {
            "params": [_Moved(storage, keep=True) for storage in weights],
            # gradients are zeroed before they are used again
            "grads": [_Moved(storage, keep=False) for storage in gradients],
            "optimizer": [_Moved(storage, keep=True) for storage in states],
        }
        self._found = found
        self._parts = tuple(parts)
        self._out: set[OffloadPart] = set()

    def held(self) -> dict[OffloadPart, int]:
        """Bytes of each part on the device now."""
        return {part: sum(moved.held for moved in every) for part, every in self._found.items()}

    def to_host(self) -> int:
        """Free the device memory; the number of bytes that were freed."""
        every = [moved for part in self._parts if part not in self._out for moved in self._found[part]]
        self._out |= set(self._parts)
        for moved in every:
            moved.copy_out()
        _wait()
        for moved in every:
            moved.free()
        if torch.cuda.is_available():  # engines may run in other processes
            torch.cuda.empty_cache()
        return sum(moved.size for moved in every)

    def to_device(self, parts: Iterable[OffloadPart] = ("params", "grads", "optimizer")) -> None:
        """Put back what is out of some parts."""
        wanted = self._out & set(parts)
        self._out -= wanted
        for moved in (moved for part in self._parts if part in wanted for moved in self._found[part]):
            moved.fill()
        _wait()

    def is_out(self, part: OffloadPart) -> bool:
        """Whether a part is on the host."""
        return part in self._out


class _Moved:
    """One storage and its place on the host, which is kept from one time to the next."""

    def __init__(self, storage: UntypedStorage, *, keep: bool) -> None:
        self._storage = storage
        self.size = storage.nbytes()
        self._keep = keep
        self._host: Tensor | None = None

    @property
    def held(self) -> int:
        """Bytes that the storage has now."""
        return self._storage.nbytes()

    def copy_out(self) -> None:
        if not self._keep:
            return
        if self._host is None:
            self._host = torch.empty(self.size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._host.copy_(self._bytes(), non_blocking=True)

    def free(self) -> None:
        self._storage.resize_(0)

    def fill(self) -> None:
        self._storage.resize_(self.size)
        if self._host is not None:
            self._bytes().copy_(self._host, non_blocking=True)
        else:
            self._bytes().zero_()

    def _bytes(self) -> Tensor:
        """[size] uint8 view of the storage."""
        return torch.empty(0, dtype=torch.uint8, device=self._storage.device).set_(self._storage)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Master weights and moments; step counts are too small to be worth moving."""
    for inner in inner_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            yield from group["params"]
        for state in inner.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0)


def _unique(tensors: Iterable[Tensor], without: Sequence[UntypedStorage] = ()) -> list[UntypedStorage]:
    """Every storage once, with tensors of the host left out on a machine with a GPU."""
    known = {storage.data_ptr() for storage in without}
    found = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        at_home = torch.cuda.is_available() and not tensor.is_cuda
        if storage.data_ptr() not in known and storage.nbytes() and not at_home:
            known.add(storage.data_ptr())
            found.append(storage)
    return found
