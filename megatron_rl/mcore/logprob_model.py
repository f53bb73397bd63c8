"""Log-probabilities of a Megatron model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_rl.config.schema import RunConfig
from megatron_rl.mcore.forward import HiddenReader
from megatron_rl.mcore.model.gpt_model import PolicyModel
from megatron_rl.mcore.sharded_model import ShardedModel, collected
from megatron_rl.types import MicroBatch, TrainBatch

LossOfLogprobs = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, Tensor, Any]]
"""(micro-batch, logprobs, entropy) -> (loss sum, number of tokens, anything to return).

Log-probabilities and entropies are [number of true entries of the loss mask], in its order."""


class LogProbModel(ShardedModel):
    """A language model that gives log-probabilities and its weights; as it stands, a frozen one."""

    def logprobs(self, batch: TrainBatch, *, replay_routing: bool = False) -> list[Tensor]:
        """Log-probabilities of this rank's sequences under the current weights, as ``ShardedModel.score``."""
        read = reads_logprobs(self.config, lambda batch, logprobs, entropy: collected(batch, logprobs))
        return self.score(batch, read, replay_routing=replay_routing)


def reads_logprobs(config: RunConfig, loss: LossOfLogprobs) -> HiddenReader:
    """Hands log-probabilities and entropies at the sampling temperature to a loss."""
    temperature = config.rollout.temperature if config.rollout.source != "demonstrations" else 1.0

    def read(model: PolicyModel, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
        logprobs, entropy = model.logprobs(
            hidden,
            batch.labels,
            batch.loss_mask,
            temperature=temperature,
            chunk_tokens=config.batching.logprob_chunk_tokens,
        )
        return loss(batch, logprobs, entropy)

    return read
