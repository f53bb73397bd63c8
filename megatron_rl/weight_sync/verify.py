"""What the engine ranks received, against what the policy's ranks hold."""

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
    """[number of readers, number of tensors] int64: of what each reader should get; collective.

    Args:
        shards: this rank's weights.
        readers: one rank for every place in an engine.
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
                continue  # another rank has the same and counts it
            for row, reader in enumerate(readers):
                common = intersection(plan.wanted[reader][name], box)
                if common is not None:
                    sums[row, column] += box_checksum(piece.part(shards, common), common)
    dist.all_reduce(sums, group=parallel.host_group)
    return sums


class ReceivedChecksums:
    """Sums up the tensors on their way into the engine."""

    def __init__(self, plan: ReshardPlan, rank: int) -> None:
        self._plan = plan
        self._wanted = plan.wanted[rank]
        self._sums: dict[str, int] = {}

    def watch(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, each looked at as it passes."""
        for name, tensor in tensors:
            box = self._wanted[name]
            self._sums[name] = box_checksum(tensor[box_index(box)], box)
            yield name, tensor

    def check(self, expected: Tensor, version: int) -> None:
        """Compare with the row of ``sent_checksums`` for this rank's place.

        Raises:
            WeightSyncError: naming the tensors that differ.
        """
        wrong = [
            name
            for name, wanted in zip(self._plan.shapes, expected.tolist(), strict=True)
            if self._sums.get(name) != wanted
        ]
        if wrong:
            raise WeightSyncError(
                f"push of version {version}: {len(wrong)} tensors arrived with other contents than the policy has, "
                f"first {wrong[0]}. This is a fault of the transfer, not of the configuration."
            )
