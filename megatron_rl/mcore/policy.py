"""The policy: a scoring model that learns."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megatron_rl.algorithms.importance import build_correction
from megatron_rl.algorithms.objective import build_objective
from megatron_rl.collective import any_rank
from megatron_rl.config.machine import OffloadPart
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import TrainingDiverged
from megatron_rl.mcore import patches
from megatron_rl.mcore.forward import ForwardPass
from megatron_rl.mcore.offload import Offloader
from megatron_rl.mcore.optimizer import build_optimizer, build_scheduler, step_if_finite
from megatron_rl.mcore.policy_loss import PolicyLoss
from megatron_rl.mcore.router_metrics import take_router_metrics
from megatron_rl.mcore.scoring import ScoringModel
from megatron_rl.metrics.metric import Max, Mean, Reduction, merge
from megatron_rl.types import ParallelContext, TrainBatch, UpdatePlan


class Policy(ScoringModel):
    """The model that learns: gradients, optimizer and schedule on top."""

    def __init__(self, config: RunConfig, parallel: ParallelContext) -> None:
        super().__init__(config, parallel, config.model.path)
        self.ddp = self._wrap()
        self.optimizer = build_optimizer(config, self.ddp)
        self._offloader = Offloader(config.memory.offload, self.ddp, self.optimizer)
        num_updates = max(1, config.run.num_steps * config.batching.num_updates * config.batching.num_epochs)
        self.scheduler = build_scheduler(config.optimizer, self.optimizer, num_updates)
        self._objective = build_objective(config.algorithm)
        self._correction = build_correction(config.algorithm)

    def update(self, batch: TrainBatch) -> dict[str, Reduction]:
        """Make every optimizer update of the batch.

        Raises:
            TrainingDiverged: on every rank before the weights change, when a loss or gradient is not finite.
        """
        if not self.config.parallel.overlap_param_gather:
            return merge(self._update_once(batch, plan) for plan in batch.updates)
        for wrapped in self.ddp:
            wrapped.enable_forward_pre_hook()
        try:
            return merge(self._update_once(batch, plan) for plan in batch.updates)
        finally:  # whoever reads the weights between the updates finds them whole
            for wrapped in self.ddp:
                wrapped.disable_forward_pre_hook(param_sync=True)

    def to_host(self) -> int:
        """Move the parts of memory.offload to the host; the bytes of device memory that are free then."""
        return self._offloader.to_host()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Whatever is on the host for the time being comes back for the body."""
        if not self._offloader.is_out:
            yield
            return
        self.to_device()
        try:
            yield
        finally:
            self.to_host()

    def memory(self) -> dict[OffloadPart, int]:
        """Bytes of each part on this rank's device now."""
        return self._offloader.held()

    def to_device(self) -> None:
        """Undo ``to_host``."""
        self._offloader.to_device()

    def _wrap(self) -> list[DistributedDataParallel]:
        """The chunks with their gradients, and Megatron's schedule told about them."""
        parallel = self.config.parallel
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            fp8_param_gather=self.config.precision.fp8_params,
        )
        # only the first chunk's gradients come late enough for buckets to be worth it
        wrapped = [
            DistributedDataParallel(self.transformer_config, settings, chunk, disable_bucketing=place > 0)
            for place, chunk in enumerate(self.chunks)
        ]
        for one in wrapped:
            patches.count_gaps(one)
            if parallel.overlap_param_gather:
                one.disable_forward_pre_hook(param_sync=False)
        schedule = self.transformer_config
        schedule.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_grad_reduce:
            schedule.no_sync_func = _one_or_all([one.no_sync for one in wrapped])
            schedule.grad_sync_func = _one_or_all([one.start_grad_sync for one in wrapped])
        if parallel.overlap_param_gather and len(wrapped) > 1:
            schedule.param_sync_func = [one.start_param_sync for one in wrapped]
        return wrapped

    def _update_once(self, batch: TrainBatch, plan: UpdatePlan) -> dict[str, Reduction]:
        for wrapped in self.ddp:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._weigh_router_losses(plan)
        results = ForwardPass(self.ddp, self.config, self.parallel).run(
            [[batch.sequences[i] for i in places] for places in plan.micro_batches],
            PolicyLoss(
                self._objective,
                self._correction,
                on_samples=self.config.rollout.source != "demonstrations",
                scored_before=len(batch.updates) > 1,
                context_group=self.parallel.groups.cp if self.parallel.cp_size > 1 else None,
            ),
            forward_only=False,
            replay_routing=True,
        )
        metrics = merge(results)
        self._raise_unless_finite(metrics)
        self.scheduler.step(increment=1)  # before the update, so that the first one has a learning rate above 0
        norm = step_if_finite(self.optimizer)
        if self.parallel.tp_rank != 0:
            metrics = {}  # the tensor-parallel ranks all saw the same tokens
        if self.spec.moe is not None:
            metrics |= take_router_metrics(len(plan.micro_batches), self.parallel)
        rate = self.optimizer.param_groups[0]["lr"] if self.optimizer.param_groups else 0.0
        return {**metrics, "actor/grad_norm": Max(norm), "actor/lr": Max(rate)}

    def _weigh_router_losses(self, plan: UpdatePlan) -> None:
        """Megatron sums router losses over all tokens and divides by those with loss; here by all of them."""
        if self.spec.moe is None:
            return
        share = plan.num_tokens / plan.num_processed_tokens
        moe = self.config.moe
        if moe.aux_loss != "disabled":
            self.transformer_config.moe_aux_loss_coeff = moe.aux_loss_coef * share
        if moe.z_loss_coef:
            self.transformer_config.moe_z_loss_coeff = moe.z_loss_coef * share

    def _raise_unless_finite(self, metrics: dict[str, Reduction]) -> None:
        if any_rank(bool(metrics) and not math.isfinite(_loss_sum(metrics)), self.parallel):
            raise TrainingDiverged(
                "the loss is not finite. The weights were left as they were. "
                "Lower optimizer.lr, or look at the last rollouts."
            )


def _one_or_all(values: Sequence[Any]) -> Any:
    """Megatron wants a list only where there are several chunks."""
    return values[0] if len(values) == 1 else list(values)


def _loss_sum(metrics: dict[str, Reduction]) -> float:
    """The sum, and not the mean: a rank may have no token with loss in an update."""
    loss = metrics["actor/loss"]
    assert isinstance(loss, Mean)
    return loss.total
