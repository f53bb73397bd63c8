"""The protocol of a rollout engine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_rl.types import Completion, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Request:
    """Some samples of one prompt."""

    key: int
    """Given back with every completion."""
    token_ids: Tensor
    """[P] int64."""
    seeds: tuple[int, ...]
    """One for each sample; a sample depends on its seed and not on what else runs."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One sample that is done."""

    key: int
    sample: int
    """Place among the seeds of its request."""
    completion: Completion


class Engine(Protocol):
    """Samples from the policy."""

    @property
    def version(self) -> int:
        """Policy version of the weights in the engine; -1 before the first push."""
        ...

    def load_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Take over whole Hugging Face tensors.

        Raises:
            WeightSyncError: a name is missing or unexpected, or a shape is wrong.
        """
        ...

    def generate(self, requests: Iterator[Request], params: SamplingParams, *, max_requests: int) -> Iterator[Finished]:
        """Samples in the order in which they finish.

        Args:
            requests: pulled one by one, as places get free, so that engines can share a queue.
            max_requests: requests that may be in work at a time.

        Raises:
            EngineError: a request is empty, too long or has a token outside the vocabulary.
        """
        ...
