"""The critic: a model that learns what a policy's tokens will earn."""

from torch import Tensor

from megatron_rl.algorithms.losses import value_loss
from megatron_rl.config.schema import RunConfig
from megatron_rl.mcore.forward import HiddenReader
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.model.gpt_model import ValueModel
from megatron_rl.mcore.runtime.parallel import in_layout
from megatron_rl.mcore.sharded_model import ShardedModel, collected
from megatron_rl.metrics.metric import Mean, Reduction, merge
from megatron_rl.types import MicroBatch, ParallelContext, TrainBatch


class Critic(ShardedModel):
    """Values tokens and learns from returns, in a layout of its own."""

    def __init__(self, config: RunConfig, parallel: ParallelContext) -> None:
        """
        Args:
            config: as ``RunConfig.for_critic`` gives it.
            parallel: of its own layout.
        """
        with in_layout(parallel):
            super().__init__(config, parallel, config.model.path, head="value")
            self.learner = Learner(self, num_steps=config.run.num_steps)

    def values(self, batch: TrainBatch) -> list[Tensor]:
        """What the critic expects before each token of this rank's sequences, [L] float32, 0 without loss."""
        with in_layout(self.parallel):
            return self.score(batch, reads_values)

    def update(self, batch: TrainBatch) -> dict[str, Reduction]:
        """Make every optimizer update of a batch with values and returns.

        Raises:
            TrainingDiverged: on every rank before the weights change, when a loss or gradient is not finite.
        """
        read = reads_value_loss(self.config.critic.clip_value)
        with in_layout(self.parallel), self.learner.several_updates():
            return merge(
                self.learner.update(
                    [[batch.sequences[i] for i in places] for places in plan.micro_batches],
                    read,
                    name="critic",
                    loss="critic/vf_loss",
                )
                for plan in batch.updates
            )


def reads_values(
    model: ValueModel, batch: MicroBatch, hidden: Tensor
) -> tuple[Tensor, Tensor, tuple[MicroBatch, Tensor]]:
    return collected(batch, model.values(hidden, batch.loss_mask))


def reads_value_loss(clip: float | None) -> HiddenReader:
    """The sum of value losses over the tokens with loss, each of weight 1: a mean over tokens in the end."""

    def read(model: ValueModel, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Reduction]]:
        mask = batch.loss_mask
        values = model.values(hidden, mask)
        found = value_loss(values, batch.values[mask], batch.returns[mask], clip)
        loss, count = found.loss.sum(), mask.sum().int()
        metrics: dict[str, Reduction] = {"critic/vf_loss": Mean(float(loss.detach()), int(count))}
        if clip is not None:
            metrics["critic/vf_clipfrac"] = Mean(float(found.clipped.sum()), int(count))
        return loss + 0.0 * values.sum(), count, metrics

    return read
