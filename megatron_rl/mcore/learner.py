"""The learner of a model: gradients, optimizer, learning-rate schedule and offloading."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megatron_rl.config.performance import OffloadPart
from megatron_rl.distributed.collectives import any_rank
from megatron_rl.errors import TrainingDiverged
from megatron_rl.mcore.forward import ForwardPass, HiddenReader
from megatron_rl.mcore.offload import Offloader
from megatron_rl.mcore.optimizer import build_optimizer, build_scheduler, step_if_finite
from megatron_rl.mcore.runtime import patches
from megatron_rl.mcore.sharded_model import ShardedModel
from megatron_rl.metrics.metric import Max, Mean, Reduction, merge
from megatron_rl.types import TrainSequence


class Learner:
    """Updates a model, and offloads its training state to the host."""

    def __init__(self, model: ShardedModel, *, num_steps: int) -> None:
        """
        Args:
            model: model to train.
            num_steps: number of run steps that train the model; the learning rate decays over them.
        """
        config = model.config
        self.model = model
        self.ddp = self._wrap()
        self.optimizer = build_optimizer(config, self.ddp)
        self._offloader = Offloader(config.memory.offload, self.ddp, self.optimizer)
        num_updates = max(1, num_steps * config.batching.num_mini_batches * config.batching.num_epochs)
        self.scheduler = build_scheduler(config.optimizer, self.optimizer, num_updates)

    def update(
        self,
        batches: Sequence[Sequence[TrainSequence]],
        read: HiddenReader,
        *,
        name: str,
        loss: str,
        replay_routing: bool = False,
    ) -> dict[str, Reduction]:
        """Run one optimizer update over micro-batches and return its metrics.

        Args:
            batches: the sequences of each micro-batch.
            read: computes the loss; its third result is a dict of metrics, all of them sums over tokens.
            name: prefix of the metrics "grad_norm" and "lr".
            loss: name of the metric that must be finite; a Mean.
            replay_routing: send tokens to the experts recorded in the sequences, where they have any recorded.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite; raised on every rank, before the weights change.
        """
        parallel = self.model.parallel
        for wrapped in self.ddp:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward = ForwardPass(self.ddp, self.model.config, parallel)
        metrics = merge(forward.run(batches, read, forward_only=False, replay_routing=replay_routing))
        if any_rank(not _is_finite(metrics, loss), parallel):
            raise TrainingDiverged(
                f"the loss {loss} is not finite. The weights are unchanged. "
                "Lower the learning rate, or inspect the last rollouts."
            )
        self.scheduler.step(increment=1)  # before the update, so that the first update has a learning rate above 0
        norm = step_if_finite(self.optimizer)
        if parallel.tp_rank != 0:
            metrics = {}  # all tensor-parallel ranks processed the same tokens, so only one reports
        learning_rate = self.optimizer.param_groups[0]["lr"] if self.optimizer.param_groups else 0.0
        return {**metrics, f"{name}/grad_norm": Max(norm), f"{name}/lr": Max(learning_rate)}

    @contextmanager
    def overlapped_param_gather(self) -> Iterator[None]:
        """Overlap the gather of updated weights with the next forward pass; needs ``parallel.overlap_param_gather``.

        The weights are fully gathered again when the body ends. Without the setting this does nothing.
        """
        if not self.model.config.parallel.overlap_param_gather:
            yield
            return
        for wrapped in self.ddp:
            wrapped.enable_forward_pre_hook()
        try:
            yield
        finally:  # code that reads the weights after the body needs them fully gathered
            for wrapped in self.ddp:
                wrapped.disable_forward_pre_hook(param_sync=True)

    def to_host(self) -> int:
        """Move the parts in memory.offload to the host and return the number of device bytes that were freed."""
        return self._offloader.to_host()

    def to_device(self) -> None:
        """Move all parts back to the device."""
        self._offloader.to_device()

    @contextmanager
    def weights_on_device(self) -> Iterator[None]:
        """Keep the weights on the device during the body, even if they are offloaded."""
        if not self._offloader.is_on_host("params"):
            yield
            return
        self._offloader.to_device(("params",))
        try:
            yield
        finally:
            self.to_host()

    def memory(self) -> dict[OffloadPart, int]:
        """Bytes of each part that are on this rank's device now."""
        return self._offloader.device_bytes()

    def _wrap(self) -> list[DistributedDataParallel]:
        """Wrap the chunks in DistributedDataParallel and register their hooks with Megatron's pipeline schedule."""
        model, parallel = self.model, self.model.config.parallel
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            fp8_param_gather=model.config.precision.fp8_params,
        )
        # buckets only pay off for the first chunk, whose gradients are computed last
        wrapped = [
            DistributedDataParallel(model.transformer_config, settings, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(model.chunks)
        ]
        for chunk in wrapped:
            patches.include_bucket_padding(chunk)
            if parallel.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=False)
        schedule = model.transformer_config
        schedule.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_grad_reduce:
            schedule.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
            schedule.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
        if parallel.overlap_param_gather and len(wrapped) > 1:
            schedule.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
        return wrapped


def _is_finite(metrics: Mapping[str, Reduction], loss: str) -> bool:
    """Whether the sum of the loss is finite; its mean is undefined on a rank without tokens with loss."""
    mean = metrics.get(loss)
    assert mean is None or isinstance(mean, Mean)
    return mean is None or math.isfinite(mean.total)


def _one_or_all(values: Sequence[Any]) -> Any:
    """Return the single value, or the list for several chunks, as Megatron expects."""
    return values[0] if len(values) == 1 else list(values)
