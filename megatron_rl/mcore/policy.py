"""The policy: the language model that is trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from megatron_rl.algorithms.importance import build_correction
from megatron_rl.algorithms.objective import build_objective
from megatron_rl.config.schema import RunConfig
from megatron_rl.mcore.learner import Learner
from megatron_rl.mcore.logprob_model import LogProbModel, logprob_reader
from megatron_rl.mcore.lora import LoraAdapters
from megatron_rl.mcore.model.router_metrics import take_router_metrics
from megatron_rl.mcore.policy_loss import PolicyLoss
from megatron_rl.metrics.metric import Reduction, merge
from megatron_rl.types import ParallelContext, TrainBatch, UpdatePlan


class Policy(LogProbModel):
    """The trained language model, with its learner and, if configured, LoRA adapters."""

    def __init__(self, config: RunConfig, parallel: ParallelContext) -> None:
        """
        Args:
            config: configuration of the run; the initial weights are in ``model.path``.
            parallel: layout of this rank.
        """
        super().__init__(config, parallel, config.model.path)
        self.adapters = LoraAdapters(self) if config.lora.rank else None
        """None if all weights are trained."""
        warmup = config.critic.warmup_steps if config.algorithm.uses_critic else 0
        self.learner = Learner(self, num_steps=config.run.num_steps - warmup)
        self._objective = build_objective(config.algorithm)
        self._correction = build_correction(config.algorithm)

    def shards(self) -> dict[str, Tensor]:
        """This rank's weights with the adapters merged in; see ``ShardedModel.shards``."""
        weights = super().shards()
        if self.adapters is not None:
            self.adapters.merge_into(weights)
        return weights

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Disable the adapters during the body; does nothing without adapters."""
        if self.adapters is None:
            yield
            return
        with self.adapters.disabled():
            yield

    def update(self, batch: TrainBatch) -> dict[str, Reduction]:
        """Run every optimizer update of the batch and return the merged metrics.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; raised on every rank, before the weights change.
        """
        with self.learner.overlapped_param_gather():
            return merge(self._update_once(batch, plan) for plan in batch.updates)

    def _update_once(self, batch: TrainBatch, plan: UpdatePlan) -> dict[str, Reduction]:
        self._scale_router_losses(plan)
        loss = PolicyLoss(
            self._objective,
            self._correction,
            has_rollout_logprobs=self.config.rollout.source != "demonstrations",
            has_old_logprobs=len(batch.updates) > 1,
            context_group=self.parallel.groups.cp if self.parallel.cp_size > 1 else None,
        )
        metrics = self.learner.update(
            [[batch.sequences[i] for i in members] for members in plan.micro_batches],
            logprob_reader(self.config, loss),
            name="actor",
            loss="actor/loss",
            replay_routing=True,
        )
        if self.spec.moe is not None:
            metrics |= take_router_metrics(len(plan.micro_batches), self.parallel)
        return metrics

    def _scale_router_losses(self, plan: UpdatePlan) -> None:
        """Scale the router-loss coefficients so that router losses are averaged over all tokens.

        Megatron sums router losses over all tokens, but divides by the number of tokens with loss.
        """
        if self.spec.moe is None:
            return
        share = plan.num_tokens / plan.num_processed_tokens
        moe = self.config.moe
        if moe.aux_loss != "disabled":
            self.transformer_config.moe_aux_loss_coeff = moe.aux_loss_coef * share
        if moe.z_loss_coef:
            self.transformer_config.moe_z_loss_coeff = moe.z_loss_coef * share
