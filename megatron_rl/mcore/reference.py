"""The reference model: weights on the host that take the policy's place while they score."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rl.mcore.model.gpt_model import check_weights, load_hf_weights
from megatron_rl.mcore.policy import Policy
from megatron_rl.types import TrainBatch


class HostReference:
    """Scores with frozen weights of the policy's architecture; costs one copy of them in host memory, and
    another that holds the policy's meanwhile."""

    def __init__(self, policy: Policy, path: str) -> None:
        """
        Args:
            path: Hugging Face folder of the weights.
        """
        self._policy = policy
        self._weights = {name: _on_host(parameter) for name, parameter in policy.parameters.items()}
        self._aside = {name: _on_host(parameter) for name, parameter in policy.parameters.items()}
        self.load(path)

    def load(self, path: str) -> None:
        """Read this rank's part of a Hugging Face folder into host memory."""
        spec = self._policy.spec
        load_hf_weights(self._weights, spec, self._policy.parallel, check_weights(spec, path))

    def logprobs(self, batch: TrainBatch) -> list[Tensor]:
        """Log-probabilities of this rank's sequences under the frozen weights, as ``ScoringModel.logprobs``."""
        with self._in_place(), self._policy.without_adapters():
            return self._policy.logprobs(batch)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        _copy(self._policy.parameters, self._aside)
        _copy(self._weights, self._policy.parameters)
        try:
            yield
        finally:  # bit for bit what was there
            _copy(self._aside, self._policy.parameters)


class AdapterFreeReference:
    """The model that the policy's adapters were put beside; costs nothing."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(self, batch: TrainBatch) -> list[Tensor]:
        """Log-probabilities of this rank's sequences without the adapters, as ``ScoringModel.logprobs``."""
        with self._policy.without_adapters():
            return self._policy.logprobs(batch)


def _on_host(parameter: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name], non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
