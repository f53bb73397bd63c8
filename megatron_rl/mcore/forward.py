"""Run Megatron's pipeline schedule over a list of micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_rl.batching.align import align
from megatron_rl.batching.context_parallel import context_share
from megatron_rl.config.schema import RunConfig
from megatron_rl.mcore.model.attention import packed_sequences
from megatron_rl.mcore.model.precision import row_multiple
from megatron_rl.mcore.model.routing_replay import set_routes
from megatron_rl.types import MicroBatch, ParallelContext, TrainSequence

HiddenReader = Callable[[Any, MicroBatch, Tensor], tuple[Tensor, Tensor, Any]]
"""(model chunk of the last stage, micro-batch, hidden states) -> (loss sum, number of tokens, any further result).

Reads log-probabilities or values from hidden states and reduces them to a loss."""


class ForwardPass:
    """Runs this rank's (wrapped) model chunks over micro-batches and passes hidden states to a HiddenReader."""

    def __init__(self, chunks: Sequence[torch.nn.Module], config: RunConfig, parallel: ParallelContext) -> None:
        self._chunks = list(chunks)
        self._parallel = parallel
        self._batching = config.batching
        self._sequence_multiple = 2 * parallel.cp_size if parallel.cp_size > 1 else 1
        shards = parallel.tp_size if config.parallel.sequence_parallel else 1
        self._multiple = self._sequence_multiple * shards * row_multiple(config)
        model = unwrap_model(chunks[0])
        self._dtype = model.config.params_dtype
        self._has_experts = model.config.num_moe_experts is not None

    def run(
        self,
        batches: Sequence[Sequence[TrainSequence]],
        read: HiddenReader,
        *,
        forward_only: bool,
        replay_routing: bool = False,
    ) -> list[Any]:
        """Run forward passes, and backward passes unless ``forward_only``.

        Args:
            batches: the sequences of each micro-batch.
            read: computes the loss of a micro-batch from its hidden states.
            forward_only: compute no gradients.
            replay_routing: send tokens to the experts recorded in the sequences, where they have any recorded.

        Returns:
            The third result of ``read`` for every micro-batch; empty except on the last pipeline stage.
        """

        def forward_step(micro_batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
            batch = next(micro_batches)
            if self._has_experts:
                set_routes(unwrap_model(chunk), batch if replay_routing else None, self._parallel)
            output = chunk(
                batch.tokens,
                batch.position_ids,
                None,
                packed_seq_params=self._packing(batch),
                # padding must not count in the load-balancing loss
                padding_mask=~batch.real if self._has_experts else None,
            )

            return output, partial(read, unwrap_model(chunk), batch)

        iterators = [self._align(batches) for _ in self._chunks]
        is_interleaved = len(self._chunks) > 1
        context = torch.no_grad() if forward_only else torch.enable_grad()
        with context:
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if is_interleaved else iterators[0],
                model=self._chunks if is_interleaved else self._chunks[0],
                num_microbatches=len(batches),
                seq_length=1,  # lengths vary; the stages exchange the shape of each micro-batch
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _align(self, batches: Sequence[Sequence[TrainSequence]]) -> Iterator[MicroBatch]:
        for sequences in batches:
            batch = align(
                sequences,
                packed=self._batching.packed,
                multiple_of=self._multiple,
                sequence_multiple_of=self._sequence_multiple,
            )
            share = context_share(batch, self._parallel.cp_rank, self._parallel.cp_size)
            yield to_device(share, self._parallel.device)

    def _packing(self, batch: MicroBatch) -> Any:
        if batch.cu_seqlens is None:
            return None
        return packed_sequences(
            batch.cu_seqlens,
            batch.position_ids,
            cp_rank=self._parallel.cp_rank,
            cp_size=self._parallel.cp_size,
            dtype=self._dtype,
        )


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return the micro-batch with its tensors on the device."""
    if device.type == "cpu":
        return batch
    return batch.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))
