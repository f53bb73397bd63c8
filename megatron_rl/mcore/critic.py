"""The critic: a model that predicts the return at every token."""

from torch import Tensor

from megatron_rl.algorithms.losses import value_loss
from megatron_rl.config.schema import RunConfig
from megatron_rl.mcore.forward import HiddenReader
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.model.gpt_model import ValueModel
from megatron_rl.mcore.runtime.parallel import in_layout
from megatron_rl.mcore.sharded_model import ShardedModel, forward_only_result
from megatron_rl.metrics.metric import Mean, Reduction, merge
from megatron_rl.types import MicroBatch, ParallelContext, TrainBatch


class Critic(ShardedModel):
    """A value model with its own learner and its own parallel layout."""

    def __init__(self, config: RunConfig, parallel: ParallelContext) -> None:
        """
        Args:
            config: the result of ``RunConfig.for_critic``.
            parallel: this rank's position in the critic's layout.
        """
        with in_layout(parallel):
            super().__init__(config, parallel, config.model.path, head="value")
            self.learner = Learner(self, num_steps=config.run.num_steps)

    def values(self, batch: TrainBatch) -> list[Tensor]:
        """Predicted return before each token of this rank's sequences, [L] float32 each; 0 at tokens without loss."""
        with in_layout(self.parallel):
            return self.forward_only(batch, read_values)

    def update(self, batch: TrainBatch) -> dict[str, Reduction]:
        """Run every optimizer update of a batch that has values and returns.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; raised on every rank, before the weights change.
        """
        read = value_loss_reader(self.config.critic.clip_value)
        with in_layout(self.parallel), self.learner.overlapped_param_gather():
            return merge(
                self.learner.update(
                    [[batch.sequences[i] for i in members] for members in plan.micro_batches],
                    read,
                    name="critic",
                    loss="critic/vf_loss",
                )
                for plan in batch.updates
            )


def read_values(
    model: ValueModel, batch: MicroBatch, hidden: Tensor
) -> tuple[Tensor, Tensor, tuple[MicroBatch, Tensor]]:
    """A ``HiddenReader`` that returns the values of the tokens with loss, for ``ShardedModel.forward_only``."""
    return forward_only_result(batch, model.values(hidden, batch.loss_mask))


def value_loss_reader(clip: float | None) -> HiddenReader:
    """Build the reader that sums value losses over tokens with loss, each of weight 1, so the update averages them."""

    def read(model: ValueModel, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Reduction]]:
        mask = batch.loss_mask
        values = model.values(hidden, mask)
        losses = value_loss(values, batch.values[mask], batch.returns[mask], clip)
        loss, count = losses.loss.sum(), mask.sum().int()
        metrics: dict[str, Reduction] = {"critic/vf_loss": Mean(float(loss.detach()), int(count))}
        if clip is not None:
            metrics["critic/vf_clipfrac"] = Mean(float(losses.clipped.sum()), int(count))
        return loss + 0.0 * values.sum(), count, metrics

    return read
