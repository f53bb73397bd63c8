"""Whether exactly the model's tensors come into an engine that would not say so itself."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from megatron_rl.errors import WeightSyncError


class ExpectedTensors:
    """Names and shapes of a model's Hugging Face tensors, held against those of a push."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._seen: set[str] = set()

    def watch(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, each checked as it passes.

        Raises:
            WeightSyncError: one is unexpected or misshapen.
        """
        self._seen = set()
        for name, tensor in tensors:
            if name not in self._shapes or name in self._seen:
                often = "twice" if name in self._seen else "unexpectedly"
                raise WeightSyncError(f"weights for the engine: {name} came {often}.")
            if tuple(tensor.shape) != self._shapes[name]:
                raise WeightSyncError(
                    f"weights for the engine: {name} is {tuple(tensor.shape)}, expected {self._shapes[name]}."
                )
            self._seen.add(name)
            yield name, tensor

    def check_complete(self) -> None:
        """
        Raises:
            WeightSyncError: one did not come.
        """
        missing = sorted(set(self._shapes) - self._seen)
        if missing:
            raise WeightSyncError(f"weights for the engine: {len(missing)} tensors did not come, first {missing[0]}.")
