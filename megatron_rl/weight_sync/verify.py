"""Compare checksums of the tensors that the engine ranks received with those that the policy's ranks hold."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import WeightSyncError
from megatron_rl.types import ParallelContext
from megatron_rl.weight_sync.checksum import box_checksum
from megatron_rl.weight_sync.plan import ReshardPlan
from megatron_rl.weights.layout import box_index, intersection


def sent_checksums(
    plan: ReshardPlan, shards: Mapping[str, Tensor], readers: list[int], parallel: ParallelContext
) -> Tensor:
    """Return the checksums of the tensors that each reader should receive; collective.

    Args:
        plan: plan of the transfer.
        shards: this rank's weights.
        readers: one rank for every tensor-parallel rank of an engine.

    Returns:
        [number of readers, number of tensors] int64.
    """
    sums = torch.zeros(len(readers), len(plan.shapes), dtype=torch.int64)
    for column, name in enumerate(plan.shapes):
        for piece in plan.pieces[parallel.rank].get(name, ()):
            box = piece.slice.hf_box
            first = next(
                rank
                for rank, held in enumerate(plan.pieces)
                if any(other.slice.hf_box == box for other in held.get(name, ()))
            )
            if first != parallel.rank:
                continue  # a lower rank holds the same box and counts it
            for row, reader in enumerate(readers):
                common = intersection(plan.target_boxes[reader][name], box)
                if common is not None:
                    sums[row, column] += box_checksum(piece.part(shards, common), common)
    dist.all_reduce(sums, group=parallel.host_group)
    return sums


class ReceivedChecksums:
    """Checksums of the tensors that this rank passes to its engine."""

    def __init__(self, plan: ReshardPlan, rank: int) -> None:
        self._plan = plan
        self._boxes = plan.target_boxes[rank]
        self._sums: dict[str, int] = {}

    def watch(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the same tensors and record the checksum of each."""
        for name, tensor in tensors:
            box = self._boxes[name]
            self._sums[name] = box_checksum(tensor[box_index(box)], box)
            yield name, tensor

    def check(self, expected: Tensor, version: int) -> None:
        """Compare the recorded checksums with the row of ``sent_checksums`` for this engine rank.

        Raises:
            WeightSyncError: some tensors differ; the message gives their number and the first name.
        """
        wrong = [
            name
            for name, checksum in zip(self._plan.shapes, expected.tolist(), strict=True)
            if self._sums.get(name) != checksum
        ]
        if wrong:
            raise WeightSyncError(
                f"push of version {version}: {len(wrong)} tensors that the engine received differ from the policy's, "
                f"first {wrong[0]}. This is a bug in the transfer, not an error in the configuration."
            )
