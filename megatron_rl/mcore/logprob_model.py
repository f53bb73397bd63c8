"""A language model that computes log-probabilities."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_rl.config.schema import RunConfig
from megatron_rl.mcore.forward import HiddenReader
from megatron_rl.mcore.model.gpt_model import PolicyModel
from megatron_rl.mcore.sharded_model import ShardedModel, forward_only_result
from megatron_rl.types import MicroBatch, TrainBatch

LossOfLogprobs = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, Tensor, Any]]
"""(micro-batch, logprobs, entropy) -> (loss sum, number of tokens with loss, any further result).

Log-probabilities and entropies are [number of tokens with loss], in the order of the loss mask."""


class LogProbModel(ShardedModel):
    """A frozen language model that computes log-probabilities; ``Policy`` is the trained one."""

    def logprobs(self, batch: TrainBatch, *, replay_routing: bool = False) -> list[Tensor]:
        """Log-probabilities of this rank's sequences under the current weights.

        Args and result: see ``ShardedModel.forward_only``.
        """
        read = logprob_reader(self.config, lambda batch, logprobs, entropy: forward_only_result(batch, logprobs))
        return self.forward_only(batch, read, replay_routing=replay_routing)


def logprob_reader(config: RunConfig, loss: LossOfLogprobs) -> HiddenReader:
    """Build the reader that passes log-probabilities and entropies at the sampling temperature to a loss."""
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
