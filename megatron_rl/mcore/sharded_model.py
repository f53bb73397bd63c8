"""A Megatron model over some ranks: built, filled, run forward, handed out."""

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
    """This rank's part of a model."""

    def __init__(self, config: RunConfig, parallel: ParallelContext, path: str, head: Head = "language") -> None:
        """Build it and read its weights from a Hugging Face folder.

        Args:
            config: with the model's own layout.
        """
        self.spec = read_model_spec(path)
        self.parallel = parallel
        self.config = config
        self.head: Head = head
        self.implementation = choose_implementation(config)
        self.transformer_config = transformer_config(self.spec, config, self.implementation)
        self.chunks = build_chunks(self.spec, self.transformer_config, self.implementation, parallel, head)
        self.parameters = global_parameters(self.chunks, parallel)
        """This rank's parameters under the layout table's names."""
        if self.spec.moe is not None:
            for chunk in self.chunks:
                routing_replay.attach(chunk)
        self.load(path)
        self._export_plan = self.plan_export(self.parameters, layout_table(self.spec, parallel.tp_size, head))

    @property
    def num_bytes(self) -> int:
        """That this rank's weights take."""
        return sum(held.nbytes for parameter in self.parameters.values() for held in held_tensors(parameter))

    def load(self, path: str) -> None:
        """Read this rank's part of a Hugging Face folder of the same architecture."""
        reader = check_weights(self.spec, path, self.head)
        load_hf_weights(self.parameters, self.spec, self.parallel, reader, self.head)

    def score(self, batch: TrainBatch, read: HiddenReader, *, replay_routing: bool = False) -> list[Tensor]:
        """What a reader finds for the tokens of this rank's sequences, [L] float32 each, 0 without loss.

        Every rank takes part; the last pipeline stage shares its result with the others.

        Args:
            read: its third result must be the micro-batch and [S, L] values of it.
            replay_routing: send tokens to the experts that the sequences name, if they name any.
        """
        distinct = dict.fromkeys(tuple(places) for update in batch.updates for places in update.micro_batches)
        for chunk in self.chunks:
            chunk.eval()
        results = ForwardPass(self.chunks, self.config, self.parallel).run(
            [[batch.sequences[i] for i in places] for places in distinct],
            read,
            forward_only=True,
            replay_routing=replay_routing,
        )
        for chunk in self.chunks:
            chunk.train()
        rows = [torch.zeros(sequence.token_ids.numel()) for sequence in batch.sequences]
        if self.parallel.is_last_stage:
            for places, (micro_batch, values) in zip(distinct, results, strict=True):
                whole = self._gather_context(micro_batch, values).cpu()
                for place, row in zip(places, unalign(whole, micro_batch), strict=True):
                    rows[place] = row
        return self._share_over_stages(rows)

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as whole Hugging Face tensors, streamed.

        Collective over the ranks of one replica, each of which must exhaust the iterator.
        """
        return export_weights(self._export_plan, self.shards(), replica_group(self.parallel))

    @property
    def is_in_first_replica(self) -> bool:
        """This rank exports together with the first one of all."""
        return 0 in dist.get_process_group_ranks(replica_group(self.parallel))

    def shards(self) -> dict[str, Tensor]:
        """This rank's weights under the layout table's names, in the model's type."""
        return {name: plain_weight(parameter) for name, parameter in self.parameters.items()}

    def plan_export(self, parameters: Mapping[str, Tensor], table: LayoutTable) -> ExportPlan:
        """Who of the replica sends what of some parameters; collective over it."""
        mine, group = (list(parameters), place_of(self.parallel)), replica_group(self.parallel)
        held: list[Any] = [mine] * group.size()
        dist.all_gather_object(held, mine, group=group)
        return plan_export(held, table)

    def _gather_context(self, batch: MicroBatch, values: Tensor) -> Tensor:
        """[S, L] of the whole micro-batch from every context-parallel rank's [S, L / cp]."""
        group = self.parallel.groups.cp
        if group.size() == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(group.size())]
        dist.all_gather(parts, values.contiguous(), group=group)
        width = values.size(1) * group.size()
        return torch.cat(parts, dim=1)[:, restore_order(batch.cu_seqlens or (0, width), group.size())]

    def _share_over_stages(self, rows: list[Tensor]) -> list[Tensor]:
        group = self.parallel.groups.pp
        if group.size() == 1:
            return rows
        flat = torch.cat(rows).to(self.parallel.device)
        dist.broadcast(flat, src=dist.get_process_group_ranks(group)[-1], group=group)
        return list(flat.cpu().split([row.numel() for row in rows]))


def replica_group(parallel: ParallelContext) -> Any:
    """The smallest group of ranks that together hold the whole model."""
    groups = parallel.groups
    # the ranks that share experts also hold every dense shard once they are a multiple of the dense ones
    return groups.tp_ep_pp if parallel.ep_size * parallel.etp_size > parallel.tp_size else groups.mp


def collected(batch: MicroBatch, found: Tensor) -> tuple[Tensor, Tensor, tuple[MicroBatch, Tensor]]:
    """What ``ShardedModel.score`` needs of [number with loss] values, with a stand-in for the loss."""
    values = torch.zeros(batch.tokens.shape, device=found.device)
    values[batch.loss_mask] = found
    return found.sum(), batch.loss_mask.sum().int(), (batch, values)
