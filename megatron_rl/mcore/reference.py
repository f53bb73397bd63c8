"""Reference models: frozen weights in host memory, or the policy without its adapters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rl.mcore.model.gpt_model import check_weights, load_hf_weights
from megatron_rl.mcore.policy import Policy
from megatron_rl.types import TrainBatch


class HostReference:
    """Frozen weights of the policy's architecture in host memory, swapped into the policy to compute log-probabilities.

    Needs host memory for two copies: the frozen weights, and a backup of the policy's weights during the swap.
    """

    def __init__(self, policy: Policy, path: str) -> None:
        """
        Args:
            policy: model whose parameters hold the frozen weights during a forward pass.
            path: Hugging Face folder of the weights.
        """
        self._policy = policy
        self._weights = {name: _on_host(parameter) for name, parameter in policy.parameters.items()}
        self._policy_backup = {name: _on_host(parameter) for name, parameter in policy.parameters.items()}
        self.load(path)

    def load(self, path: str) -> None:
        """Read this rank's part of a Hugging Face folder into host memory."""
        spec = self._policy.spec
        load_hf_weights(self._weights, spec, self._policy.parallel, check_weights(spec, path))

    def logprobs(self, batch: TrainBatch) -> list[Tensor]:
        """Log-probabilities of this rank's sequences under the frozen weights; see ``LogProbModel.logprobs``."""
        with self._swapped_in(), self._policy.without_adapters():
            return self._policy.logprobs(batch)

    @contextmanager
    def _swapped_in(self) -> Iterator[None]:
        _copy(self._policy.parameters, self._policy_backup)
        _copy(self._weights, self._policy.parameters)
        try:
            yield
        finally:  # a copy, so the policy's weights are restored bit for bit
            _copy(self._policy_backup, self._policy.parameters)


class AdapterFreeReference:
    """The policy with its adapters disabled; needs no memory of its own."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def logprobs(self, batch: TrainBatch) -> list[Tensor]:
        """Log-probabilities of this rank's sequences without the adapters; see ``LogProbModel.logprobs``."""
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
