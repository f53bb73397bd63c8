"""Gather shards into whole Hugging Face tensors, streamed in buckets of one layer.

Every rank of a replica knows from the layout table which rank holds which box. One holder broadcasts each box once, so
every byte is sent once and the result is bit-exact. Memory is bounded by one layer. This full gather is the baseline of
the planned transfers in weight_sync.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import ConversionError
from megatron_rl.weights.layout import (
    Box,
    LayoutTable,
    Place,
    Slice,
    box_index,
    box_shape,
    box_size,
    full_box,
    hf_shapes,
    layer_of,
    moved_box,
)


@dataclass(frozen=True)
class Piece:
    """One box of one Hugging Face tensor, and the parameter whose shard holds it."""

    parameter: str
    slice: Slice

    def shard_box(self, box: Box) -> Box:
        """Coordinates in the parameter's shard of a box of the Hugging Face tensor inside this piece."""
        return moved_box(box, self.slice.hf_box, self.slice.shard_box)

    def part(self, parameters: Mapping[str, Tensor], box: Box) -> Tensor:
        """View of the parameter's shard at a box of the Hugging Face tensor inside this piece."""
        return parameters[self.parameter][box_index(self.shard_box(box))]


@dataclass(frozen=True)
class Bucket:
    """Tensors that are gathered together."""

    shapes: Mapping[str, tuple[int, ...]]
    """Hugging Face name -> shape of the whole tensor."""
    pieces: Mapping[int, Sequence[Piece]]
    """Rank in the replica -> the pieces that it broadcasts."""


ExportPlan = Sequence[Bucket]


def plan_export(held: Sequence[tuple[Sequence[str], Place]], table: LayoutTable) -> list[Bucket]:
    """Choose the rank that broadcasts each box.

    Args:
        held: for each rank of the replica, the names of its parameters and its tensor-parallel position.
        table: layout of every parameter.

    Raises:
        ConversionError: the boxes do not cover every tensor exactly once.
    """
    shapes = hf_shapes(table)
    pieces: dict[str, dict[int, list[Piece]]] = {name: {} for name in shapes}
    taken: set[tuple[str, Box]] = set()
    for rank, (names, place) in enumerate(held):
        for parameter in names:
            for piece in place.slices(table[parameter]):
                if (piece.hf_name, piece.hf_box) not in taken:
                    taken.add((piece.hf_name, piece.hf_box))
                    pieces[piece.hf_name].setdefault(rank, []).append(Piece(parameter, piece))
    for name, shape in shapes.items():
        covered = sum(box_size(piece.slice.hf_box) for sent in pieces[name].values() for piece in sent)
        size = box_size(full_box(shape))
        if covered != size:
            raise ConversionError(f"{name}: the ranks hold {covered} of its {size} elements")
    return [_bucket(names, shapes, pieces) for names in _group_by_layer(shapes)]


def export_weights(plan: ExportPlan, parameters: Mapping[str, Tensor], group: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every Hugging Face tensor, complete on every rank of ``group``.

    Collective: every rank of the group must exhaust the iterator.

    Args:
        plan: plan for the ranks of ``group``.
        parameters: this rank's shards, under the names of the plan.
        group: process group of the replica.
    """
    example = next(iter(parameters.values()))
    ranks = dist.get_process_group_ranks(group)
    for bucket in plan:
        whole = {name: example.new_empty(shape) for name, shape in bucket.shapes.items()}
        for owner, pieces in bucket.pieces.items():
            is_owner = owner == group.rank()
            if group.size() == 1:
                for piece in pieces:
                    source = parameters[piece.parameter][box_index(piece.slice.shard_box)]
                    whole[piece.slice.hf_name][box_index(piece.slice.hf_box)] = source
                continue
            flat = example.new_empty(sum(box_size(piece.slice.hf_box) for piece in pieces))
            chunks = flat.split([box_size(piece.slice.hf_box) for piece in pieces])
            if is_owner:
                for piece, chunk in zip(pieces, chunks, strict=True):
                    source = parameters[piece.parameter][box_index(piece.slice.shard_box)]
                    chunk.copy_(source.reshape(-1))
            dist.broadcast(flat, src=ranks[owner], group=group)
            for piece, chunk in zip(pieces, chunks, strict=True):
                box = piece.slice.hf_box
                whole[piece.slice.hf_name][box_index(box)] = chunk.view(box_shape(box))
        yield from whole.items()


def _group_by_layer(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Group the names of each layer; every other tensor is a group of its own."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(layer_of(name), []).append(name)
    return list(groups.values())


def _bucket(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, Mapping[int, Sequence[Piece]]]
) -> Bucket:
    """Bucket of some tensors, with their pieces grouped by rank."""
    by_owner: dict[int, list[Piece]] = {}
    for name in names:
        for rank, sent in pieces[name].items():
            by_owner.setdefault(rank, []).extend(sent)
    return Bucket({name: shapes[name] for name in names}, dict(sorted(by_owner.items())))
