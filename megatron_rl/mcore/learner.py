"""What makes a model learn: gradients, optimizer and schedule."""

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
    """Updates a model, and moves what it holds for that to the host and back."""

    def __init__(self, model: ShardedModel, *, num_steps: int) -> None:
        """
        Args:
            num_steps: of the run in which the model learns; its learning rate decays over them.
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
        """One optimizer update over micro-batches.

        Args:
            read: its third result are metrics, all of them sums over tokens.
            name: before the metrics "grad_norm" and "lr".
            loss: the metric that must be finite; a Mean.

        Raises:
            TrainingDiverged: on every rank before the weights change, when loss or gradient is not finite.
        """
        parallel = self.model.parallel
        for wrapped in self.ddp:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward = ForwardPass(self.ddp, self.model.config, parallel)
        metrics = merge(forward.run(batches, read, forward_only=False, replay_routing=replay_routing))
        if any_rank(not _is_finite(metrics, loss), parallel):
            raise TrainingDiverged(
                f"the loss {loss} is not finite. The weights were left as they were. "
                "Lower the learning rate, or look at the last rollouts."
            )
        self.scheduler.step(increment=1)  # before the update, so that the first one has a learning rate above 0
        norm = step_if_finite(self.optimizer)
        if parallel.tp_rank != 0:
            metrics = {}  # the tensor-parallel ranks all saw the same tokens
        rate = self.optimizer.param_groups[0]["lr"] if self.optimizer.param_groups else 0.0
        return {**metrics, f"{name}/grad_norm": Max(norm), f"{name}/lr": Max(rate)}

    @contextmanager
    def several_updates(self) -> Iterator[None]:
        """With parallel.overlap_param_gather updated weights are gathered as the next forward pass needs them."""
        if not self.model.config.parallel.overlap_param_gather:
            yield
            return
        for wrapped in self.ddp:
            wrapped.enable_forward_pre_hook()
        try:
            yield
        finally:  # whoever reads the weights between the updates finds them whole
            for wrapped in self.ddp:
                wrapped.disable_forward_pre_hook(param_sync=True)

    def to_host(self) -> int:
        """Move the parts of memory.offload to the host; the bytes of device memory that are free then."""
        return self._offloader.to_host()

    def to_device(self) -> None:
        """Undo ``to_host``."""
        self._offloader.to_device()

    @contextmanager
    def weights_at_hand(self) -> Iterator[None]:
        """The weights, if they are on the host for the time being, come back for the body."""
        if not self._offloader.is_out("params"):
            yield
            return
        self._offloader.to_device(("params",))
        try:
            yield
        finally:
            self.to_host()

    def memory(self) -> dict[OffloadPart, int]:
        """Bytes of each part on this rank's device now."""
        return self._offloader.held()

    def _wrap(self) -> list[DistributedDataParallel]:
        """The chunks with their gradients, and Megatron's schedule told about them."""
        model, parallel = self.model, self.model.config.parallel
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            fp8_param_gather=model.config.precision.fp8_params,
        )
        # only the first chunk's gradients come late enough for buckets to be worth it
        wrapped = [
            DistributedDataParallel(model.transformer_config, settings, chunk, disable_bucketing=place > 0)
            for place, chunk in enumerate(model.chunks)
        ]
        for one in wrapped:
            patches.count_gaps(one)
            if parallel.overlap_param_gather:
                one.disable_forward_pre_hook(param_sync=False)
        schedule = model.transformer_config
        schedule.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_grad_reduce:
            schedule.no_sync_func = _one_or_all([one.no_sync for one in wrapped])
            schedule.grad_sync_func = _one_or_all([one.start_grad_sync for one in wrapped])
        if parallel.overlap_param_gather and len(wrapped) > 1:
            schedule.param_sync_func = [one.start_param_sync for one in wrapped]
        return wrapped


def _is_finite(metrics: Mapping[str, Reduction], loss: str) -> bool:
    """Of the sum, and not the mean: a rank may have no token with loss in an update."""
    found = metrics.get(loss)
    assert found is None or isinstance(found, Mean)
    return found is None or math.isfinite(found.total)


def _one_or_all(values: Sequence[Any]) -> Any:
    """Megatron wants a list only where there are several chunks."""
    return values[0] if len(values) == 1 else list(values)
