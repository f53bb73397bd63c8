"""Workarounds for faults of Megatron-Core 0.16.1 to 0.19.x.

Without Transformer Engine or Apex the optimizer is torch's AdamW. Resuming Megatron's distributed optimizer on top of
it has three faults, the third of them silent:

1. ``state_dict()`` asserts on an optimizer that has not stepped yet. Fixed by ``create_adam_state``.
2. Loading fails with KeyError 'step': torch keeps a step count for each parameter, and Megatron does not save it there.
   Fixed by ``keep_step_on_load``.
3. After a load all parameters share one step tensor, so the step count of bias correction grows with the number of
   parameters. Fixed by ``separate_step_counts``.

Saving that optimizer's state has a fourth fault, with at most a line in the log as a sign: Megatron looks parameters up
by their offset in the gradient buffer, but in a copy of the buffer without the padding between buckets. Where there is
such padding, parameters are saved shifted and with a tail of zeros. (With pipeline parallelism, tied embeddings have
a bucket of their own, and the size of the other bucket need not be a multiple of 128 and of the data-parallel size.)
Fixed by ``include_bucket_padding``.

A synchronous save forks writer processes from a process with many threads, hangs forever when one of them dies, and
starts a manager process that imports the main program again only to pass on the results. ``write_in_process`` writes
the same files in the calling process.

Before 0.19, with tensor parallelism and experts that are whole on each rank (expert tensor parallel size 1, no expert
parallelism), expert parameters are not marked as such. Their gradients are then reduced over the ranks of the dense
parameters, and the gradients of the other tensor-parallel ranks are lost. Fixed by ``mark_expert_parameters``.

Without Transformer Engine, names that the router and recomputed norms need are never bound. Fixed by
``bind_missing_names``.

tests/distributed/test_checkpoint.py fails once a workaround for saving or loading is no longer needed.
"""

import queue
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from megatron_rl.mcore.runtime.gloo import complete_collectives

STEP = "step"


def inner_optimizers(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """Yield the optimizers inside a chained optimizer, or the optimizer itself."""
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def create_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter without optimizer state the state of an AdamW after 0 steps."""
    for inner in inner_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                if not inner.optimizer.state[parameter]:
                    inner.optimizer.state[parameter] = {
                        STEP: torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def separate_step_counts(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own step tensor after a load."""
    for inner in inner_optimizers(optimizer):
        for state in inner.optimizer.state.values():
            state[STEP] = state[STEP].clone()


def include_bucket_padding(model: DistributedDataParallel) -> None:
    """Extend every bucket's size over the padding up to the next bucket, so that the copy omits nothing.

    Must be called before the optimizer is built, because it copies these sizes.
    """
    for buffer in [*model.buffers, *model.expert_parallel_buffers]:
        buckets = sorted(buffer.buckets, key=lambda bucket: bucket.offset)
        end = max(buffer.param_index_map[parameter][1] for parameter in buckets[-1].params)
        ends = [bucket.offset for bucket in buckets[1:]] + [end]
        for bucket, stop in zip(buckets, ends, strict=True):
            bucket.numel_unpadded = stop - bucket.offset
        buffer.numel_unpadded = end


def mark_expert_parameters(chunks: Sequence[torch.nn.Module]) -> None:
    """Mark the parameters whose gradients are reduced over the ranks that hold the same experts.

    They are marked under every layout, including layouts that do not split experts: only then do optimizer states have
    the same structure under every layout and can be loaded under another one.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]


def bind_missing_names() -> None:
    """Bind Transformer Engine's matrix product to None for the router, and recompute norms without its FP8 state."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not hasattr(random, "FP8GlobalStateManager"):
        random.CheckpointWithoutOutput.__init__ = _without_fp8


def _without_fp8(self: Any, fp8: Any = None) -> None:
    _init_original(self, None)


_init_original = random.CheckpointWithoutOutput.__init__


@torch.no_grad()
def _set_keeping_step(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    group, order = self.model_param_group_index_map[model_param]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
    if STEP in state and STEP not in tensors:
        tensors = {**tensors, STEP: state[STEP]}
    _set_original(self, model_param, tensors)


def _write_buckets(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results_queue: "queue.Queue[Any]"
) -> None:
    """Write buckets one after the other; replaces FileSystemWriterAsync.write_preloaded_data_multiproc."""
    local: queue.Queue[Any] = queue.Queue()
    results: Any = {}
    for index, bucket in enumerate(buckets):
        pending: queue.Queue[int] = queue.Queue()
        pending.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, local, pending, True)
        _, outcome = local.get()
        if isinstance(outcome, Exception):
            results = outcome
            break
        results[index] = outcome
    results_queue.put(results)


_set_original = DistributedOptimizer._set_main_param_and_optimizer_states


def keep_step_on_load() -> None:
    """Make a load keep torch's step counts, which ``separate_step_counts`` then separates."""
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_keeping_step


def write_in_process() -> None:
    """Make a synchronous save write its files in the calling process."""
    filesystem_async._get_write_results_queue = queue.Queue
    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_buckets)


def apply() -> None:
    """Apply the workarounds that replace functions; the others are called where they are needed."""
    bind_missing_names()
    complete_collectives()
    keep_step_on_load()
    write_in_process()
