"""Check that a push contains exactly the model's tensors, for engines that do not check it themselves."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from megatron_rl.errors import WeightSyncError


class ExpectedTensors:
    """Compares the tensors of a push with the names and shapes of the model's Hugging Face tensors."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._seen: set[str] = set()

    def watch(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors unchanged, each after a check.

        Raises:
            WeightSyncError: a tensor is unexpected, comes twice, or has the wrong shape.
        """
        self._seen = set()
        for name, tensor in tensors:
            if name not in self._shapes or name in self._seen:
                problem = "came twice" if name in self._seen else "is not a tensor of the model"
                raise WeightSyncError(f"weights for the engine: {name} {problem}.")
            if tuple(tensor.shape) != self._shapes[name]:
                raise WeightSyncError(
                    f"weights for the engine: {name} has shape {tuple(tensor.shape)}, expected {self._shapes[name]}."
                )
            self._seen.add(name)
            yield name, tensor

    def check_complete(self) -> None:
        """Check that all tensors of the model came.

        Raises:
            WeightSyncError: a tensor is missing.
        """
        missing = sorted(set(self._shapes) - self._seen)
        if missing:
            raise WeightSyncError(f"weights for the engine: {len(missing)} tensors are missing, first {missing[0]}.")
