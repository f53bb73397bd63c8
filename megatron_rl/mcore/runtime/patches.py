"""Everything of Megatron-Core that is worked around, in one place (0.16.1 to 0.19.x).

Without Transformer Engine or Apex the optimizer is torch's AdamW, and resuming Megatron's
distributed optimizer on top of it has three faults, one of them silent:

1. ``state_dict()`` asserts on an optimizer that has not stepped yet: ``create_adam_state``.
2. Loading fails with KeyError 'step', as torch keeps a step count for each parameter and Megatron
   does not save it there: ``keep_step_on_load``.
3. After a load all parameters share one step tensor, so that bias correction runs away with the
   number of parameters: ``separate_step_counts``.

Saving its state has a fourth fault, with at most a line in the log as sign: parameters are looked
up by their place in the gradient buffer, in a copy of it that leaves the padding between buckets
out. Where there is such padding (tied embeddings under pipeline parallelism have a bucket of their
own, and the other one's size need not be a multiple of 128 and of the data-parallel size),
parameters are saved shifted and with a tail of zeros: ``count_gaps``.

And one fault more: a synchronous save forks writer processes from a process full of threads,
hangs for ever when one of them dies, and starts a manager process that imports the main program
again only to hand the results over. ``write_in_process`` writes the same files without any of that.

Before 0.19, with tensor parallelism around experts that are whole on each rank (expert tensor
parallel size 1, no expert parallelism), experts are not marked as such; their gradients are then
reduced over the dense parameters' ranks and those of the tensor-parallel ranks are lost:
``mark_expert_parameters``. And without Transformer Engine names that the router and
recomputed norms need are never bound: ``bind_missing_names``.

tests/distributed/test_checkpoint.py fails once one of those about saving and loading is no longer needed.
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
    """The optimizers that Megatron chains."""
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def create_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the state of an AdamW that has made 0 steps, unless it has one."""
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


def count_gaps(model: DistributedDataParallel) -> None:
    """Let the sizes of buckets reach over the padding up to the next one, so that nothing is left out.

    Called before the optimizer is built, which copies these sizes.
    """
    for buffer in [*model.buffers, *model.expert_parallel_buffers]:
        buckets = sorted(buffer.buckets, key=lambda bucket: bucket.offset)
        end = max(buffer.param_index_map[parameter][1] for parameter in buckets[-1].params)
        ends = [bucket.offset for bucket in buckets[1:]] + [end]
        for bucket, stop in zip(buckets, ends, strict=True):
            bucket.numel_unpadded = stop - bucket.offset
        buffer.numel_unpadded = end


def mark_expert_parameters(chunks: Sequence[torch.nn.Module]) -> None:
    """Say which parameters are reduced over the ranks that hold the same experts.

    Under every layout, those that do not split experts included: only then are optimizer states laid
    out alike, and can be loaded under another one.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]


def bind_missing_names() -> None:
    """Let the router find that Transformer Engine's matrix product is not there, and recomputed norms its FP8."""
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
    """What FileSystemWriterAsync.write_preloaded_data_multiproc does, one bucket after the other."""
    local: queue.Queue[Any] = queue.Queue()
    results: Any = {}
    for number, bucket in enumerate(buckets):
        pending: queue.Queue[int] = queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, local, pending, True)
        _, outcome = local.get()
        if isinstance(outcome, Exception):
            results = outcome
            break
        results[number] = outcome
    results_queue.put(results)


_set_original = DistributedOptimizer._set_main_param_and_optimizer_states


def keep_step_on_load() -> None:
    """Let a load leave torch's step counts to ``separate_step_counts``."""
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_keeping_step


def write_in_process() -> None:
    """Let a synchronous save write its files itself."""
    filesystem_async._get_write_results_queue = queue.Queue
    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_buckets)


def apply() -> None:
    """Apply those that replace functions; the others are called where they are needed."""
    bind_missing_names()
    complete_collectives()
    keep_step_on_load()
    write_in_process()
