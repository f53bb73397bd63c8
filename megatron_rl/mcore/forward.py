"""One pass of Megatron's pipeline schedule over a list of micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rl.batching.align import align
from megatron_rl.mcore.attention import packed_sequences
from megatron_rl.mcore.logprobs import vocab_parallel_logprobs
from megatron_rl.types import MicroBatch, ParallelContext, TrainSequence

LossOfBatch = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, Tensor, Any]]
"""(micro-batch, logprobs, entropy) -> (loss sum, number of tokens, anything to return)."""


class ForwardPass:
    """Runs a (wrapped) GPTModel over micro-batches and hands log-probabilities to a loss."""

    def __init__(
        self,
        model: torch.nn.Module,
        parallel: ParallelContext,
        *,
        vocab_size: int,
        temperature: float,
        packed: bool,
        multiple_of: int,
    ) -> None:
        self._model = model
        self._parallel = parallel
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._packed = packed
        self._multiple_of = multiple_of

    def run(self, batches: Sequence[Sequence[TrainSequence]], loss: LossOfBatch, *, forward_only: bool) -> list[Any]:
        """The third result of ``loss`` for every micro-batch; empty except on the last pipeline stage."""

        def forward_step(micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
            batch = next(micro_batches)
            packing = None if batch.cu_seqlens is None else packed_sequences(batch.cu_seqlens, self._parallel.device)
            logits = model(batch.tokens, batch.position_ids, None, packed_seq_params=packing)

            def loss_of_logits(logits: Tensor) -> tuple[Tensor, Tensor, Any]:
                return loss(batch, *self._logprobs(logits, batch))

            return logits, loss_of_logits

        context = torch.no_grad() if forward_only else torch.enable_grad()
        with context:
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=self._align(batches),
                model=self._model,
                num_microbatches=len(batches),
                seq_length=1,  # lengths vary and are exchanged with each micro-batch
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _align(self, batches: Sequence[Sequence[TrainSequence]]) -> Iterator[MicroBatch]:
        for sequences in batches:
            batch = align(sequences, packed=self._packed, multiple_of=self._multiple_of)
            yield to_device(batch, self._parallel.device)

    def _logprobs(self, logits: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return vocab_parallel_logprobs(
            logits,
            batch.labels,
            self._parallel.groups.tp,
            temperature=self._temperature,
            vocab_size=self._vocab_size,
        )


def to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on the device."""
    if device.type == "cpu":
        return batch
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    }
    return MicroBatch(**moved)
