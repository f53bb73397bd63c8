"""A Megatron model sharded over ranks: build it, load weights, run forward passes, export weights."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.batching.align import unalign
from megatron_rl.batching.context_parallel import restore_order
from megatron_rl.config.schema import RunConfig
from megatron_rl.mcore.forward import ForwardPass, HiddenReader
from megatron_rl.mcore.model import routing_replay
from megatron_rl.mcore.model.config import transformer_config
from megatron_rl.mcore.model.gpt_model import build_chunks, check_weights, global_parameters, load_hf_weights, place_of
from megatron_rl.mcore.model.precision import choose_implementation, plain_weight
from megatron_rl.mcore.model.quantized import held_tensors
from megatron_rl.models import Head, layout_table, read_model_spec
from megatron_rl.types import MicroBatch, ParallelContext, TrainBatch
from megatron_rl.weights.export import ExportPlan, export_weights, plan_export
from megatron_rl.weights.layout import LayoutTable


class ShardedModel:
    """This rank's shards of a model."""

    def __init__(self, config: RunConfig, parallel: ParallelContext, path: str, head: Head = "language") -> None:
        """Build the model and load its weights from a Hugging Face folder.

        Args:
            config: configuration whose ``parallel`` section is the layout of this model.
            parallel: this rank's position in that layout.
            path: Hugging Face folder of the architecture and the weights.
            head: "language" for logits over the vocabulary, "value" for one number for each token.
        """
        self.spec = read_model_spec(path)
        self.parallel = parallel
        self.config = config
        self.head: Head = head
        self.implementation = choose_implementation(config)
        self.transformer_config = transformer_config(self.spec, config, self.implementation)
        self.chunks = build_chunks(self.spec, self.transformer_config, self.implementation, parallel, head)
        self.parameters = global_parameters(self.chunks, parallel)
        """This rank's parameters, by their names in the layout table."""
        if self.spec.moe is not None:
            for chunk in self.chunks:
                routing_replay.attach(chunk)
        self.load(path)
        self._export_plan = self.plan_export(self.parameters, layout_table(self.spec, parallel.tp_size, head))

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank's weights take."""
        return sum(tensor.nbytes for parameter in self.parameters.values() for tensor in held_tensors(parameter))

    def load(self, path: str) -> None:
        """Load this rank's shards from a Hugging Face folder of the same architecture."""
        reader = check_weights(self.spec, path, self.head)
        load_hf_weights(self.parameters, self.spec, self.parallel, reader, self.head)

    def forward_only(self, batch: TrainBatch, read: HiddenReader, *, replay_routing: bool = False) -> list[Tensor]:
        """Run a forward pass without gradients and return one row of token values per sequence.

        Collective over all ranks; the last pipeline stage broadcasts its result to the other stages.

        Args:
            batch: this rank's sequences and their micro-batches; each distinct micro-batch is run once.
            read: computes the values from hidden states; its third result must be (micro-batch, [S, L] values).
            replay_routing: send tokens to the experts recorded in the sequences, where they have any recorded.

        Returns:
            [L] float32 on the CPU for each sequence; 0 at tokens without loss.
        """
        distinct = dict.fromkeys(tuple(members) for update in batch.updates for members in update.micro_batches)
        for chunk in self.chunks:
            chunk.eval()
        results = ForwardPass(self.chunks, self.config, self.parallel).run(
            [[batch.sequences[i] for i in members] for members in distinct],
            read,
            forward_only=True,
            replay_routing=replay_routing,
        )
        for chunk in self.chunks:
            chunk.train()
        rows = [torch.zeros(sequence.token_ids.numel()) for sequence in batch.sequences]
        if self.parallel.is_last_stage:
            for members, (micro_batch, values) in zip(distinct, results, strict=True):
                whole = self._gather_context(micro_batch, values).cpu()
                for index, row in zip(members, unalign(whole, micro_batch), strict=True):
                    rows[index] = row
        return self._broadcast_over_stages(rows)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Stream the weights as unsharded Hugging Face tensors.

        Collective over the ranks of one model replica; each of them must exhaust the iterator.
        """
        return export_weights(self._export_plan, self.shards(), replica_group(self.parallel))

    @property
    def is_in_first_replica(self) -> bool:
        """Whether this rank belongs to the same model replica as global rank 0."""
        return 0 in dist.get_process_group_ranks(replica_group(self.parallel))

    def shards(self) -> dict[str, Tensor]:
        """This rank's weights in the model's dtype, by their names in the layout table."""
        return {name: plain_weight(parameter) for name, parameter in self.parameters.items()}

    def plan_export(self, parameters: Mapping[str, Tensor], table: LayoutTable) -> ExportPlan:
        """Plan which rank of the replica sends which part of the given parameters; collective over the replica."""
        local, group = (list(parameters), place_of(self.parallel)), replica_group(self.parallel)
        held: list[Any] = [local] * group.size()
        dist.all_gather_object(held, local, group=group)
        return plan_export(held, table)

    def _gather_context(self, batch: MicroBatch, values: Tensor) -> Tensor:
        """Gather the [S, L / cp] values of every context-parallel rank into [S, L] of the whole micro-batch."""
        group = self.parallel.groups.cp
        if group.size() == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(group.size())]
        dist.all_gather(parts, values.contiguous(), group=group)
        width = values.size(1) * group.size()
        return torch.cat(parts, dim=1)[:, restore_order(batch.cu_seqlens or (0, width), group.size())]

    def _broadcast_over_stages(self, rows: list[Tensor]) -> list[Tensor]:
        group = self.parallel.groups.pp
        if group.size() == 1:
            return rows
        flat = torch.cat(rows).to(self.parallel.device)
        dist.broadcast(flat, src=dist.get_process_group_ranks(group)[-1], group=group)
        return list(flat.cpu().split([row.numel() for row in rows]))


def replica_group(parallel: ParallelContext) -> Any:
    """Process group of one model replica: the smallest set of ranks that together hold all weights."""
    groups = parallel.groups
    # where ep_size * etp_size is a multiple of tp_size, the ranks that share experts also hold every dense shard
    return groups.tp_ep_pp if parallel.ep_size * parallel.etp_size > parallel.tp_size else groups.mp


def forward_only_result(batch: MicroBatch, masked: Tensor) -> tuple[Tensor, Tensor, tuple[MicroBatch, Tensor]]:
    """The result that ``ShardedModel.forward_only`` expects of a ``HiddenReader``.

    Args:
        batch: the micro-batch that the values belong to.
        masked: [number of tokens with loss] values, in the order of the loss mask.

    Returns:
        (a placeholder for the loss sum, number of tokens with loss, (micro-batch, [S, L] values with 0 elsewhere)).
    """
    values = torch.zeros(batch.tokens.shape, device=masked.device)
    values[batch.loss_mask] = masked
    return masked.sum(), batch.loss_mask.sum().int(), (batch, values)
