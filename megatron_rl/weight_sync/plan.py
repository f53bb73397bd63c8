"""The plan of a weight transfer: which rank sends which box of which tensor to which rank.

Each rank receives every element that it reads but does not hold exactly once. An element enters a node at most once:
one rank of the node receives it and forwards it to the others there. A bucket consists of whole layers, at least one of
every pipeline stage, so that all stages send at the same time.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.errors import WeightSyncError
from megatron_rl.weights.export import Piece
from megatron_rl.weights.layout import Box, LayoutTable, Place, box_size, hf_shapes, intersection, layer_of

ParametersByRank = Sequence[tuple[Sequence[str], Place]]
"""For each rank, the names of its parameters and its tensor-parallel position."""
BoxesByRank = Sequence[Mapping[str, Box]]
"""For each rank, tensor name -> the box of that tensor that it reads; an empty mapping if it reads nothing."""


@dataclass(frozen=True)
class Move:
    """The transfer of one box of one tensor from a source rank to a target rank."""

    name: str
    box: Box
    source: int
    target: int

    @property
    def num_elements(self) -> int:
        """Number of elements in the box."""
        return box_size(self.box)


@dataclass(frozen=True)
class Bucket:
    """Tensors that are transferred together."""

    names: tuple[str, ...]
    inter_node: Sequence[Move]
    """Moves between nodes; these are done first."""
    intra_node: Sequence[Move]
    """Moves between ranks of one node: boxes that the source holds or has received from another node."""


@dataclass(frozen=True)
class ReshardPlan:
    """All moves of a push, and what they are derived from."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every Hugging Face tensor."""
    target_boxes: BoxesByRank
    pieces: Sequence[Mapping[str, Sequence[Piece]]]
    """For each rank, tensor name -> the pieces of that tensor that it holds."""
    buckets: Sequence[Bucket]

    def num_received(self, rank: int) -> int:
        """Number of elements that a rank receives from others."""
        return sum(move.num_elements for move in self.moves() if move.target == rank)

    def num_sent(self, rank: int) -> int:
        """Number of elements that a rank sends."""
        return sum(move.num_elements for move in self.moves() if move.source == rank)

    def num_inter_node(self) -> int:
        """Number of elements that are sent between nodes."""
        return sum(move.num_elements for bucket in self.buckets for move in bucket.inter_node)

    def minimum(self, rank: int) -> int:
        """Number of elements that a rank reads and does not hold: the least that it can receive."""
        return sum(
            box_size(box) - sum(map(box_size, _held_parts(box, self.pieces[rank].get(name, ()))))
            for name, box in self.target_boxes[rank].items()
        )

    def moves(self) -> list[Move]:
        """The moves of all buckets, in order."""
        return [move for bucket in self.buckets for move in (*bucket.inter_node, *bucket.intra_node)]


def plan_reshard(
    held: ParametersByRank, table: LayoutTable, target_boxes: BoxesByRank, nodes: Sequence[int], *, bucket_elements: int
) -> ReshardPlan:
    """Plan a transfer from training shards to the boxes that every rank reads.

    Args:
        held: parameters of every rank, under the names of the table.
        table: layout at the tensor-parallel size of the training.
        target_boxes: boxes that every rank reads.
        nodes: node index of every rank.
        bucket_elements: maximum elements that a rank reads in one bucket; one layer of each stage may exceed it.

    Raises:
        WeightSyncError: a rank reads elements that no rank holds.
    """
    shapes = hf_shapes(table)
    pieces = [_pieces(names, place, table) for names, place in held]
    groups = _group_names(shapes, pieces, target_boxes, bucket_elements)
    buckets = [_plan_bucket(names, pieces, target_boxes, nodes) for names in groups]
    return ReshardPlan(shapes, target_boxes, pieces, buckets)


def _pieces(names: Sequence[str], place: Place, table: LayoutTable) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for parameter in names:
        for piece in place.slices(table[parameter]):
            same_tensor = found.setdefault(piece.hf_name, [])
            # a tied output layer has the same boxes as the embedding
            if all(piece.hf_box != other.slice.hf_box for other in same_tensor):
                same_tensor.append(Piece(parameter, piece))
    return found


def _held_parts(box: Box, pieces: Sequence[Piece]) -> list[Box]:
    parts = (intersection(box, piece.slice.hf_box) for piece in pieces)
    return [part for part in parts if part is not None]


def _group_names(
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Sequence[Mapping[str, Sequence[Piece]]],
    target_boxes: BoxesByRank,
    max_elements: int,
) -> list[tuple[str, ...]]:
    """Tensor names of each bucket: one layer of every stage, and further ones while they fit."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in sorted(shapes, key=lambda name: layer_of(name) == name):  # layers first: every stage has equally many
        layers[layer_of(name)].append(name)
    stages: dict[tuple[int, ...], deque[list[str]]] = defaultdict(deque)
    for names in layers.values():
        holders = tuple(rank for rank, held in enumerate(pieces) if names[0] in held)
        stages[holders].append(names)
    groups: list[tuple[str, ...]] = []
    group_size = 0
    while any(stages.values()):
        names = [name for queue in stages.values() if queue for name in queue.popleft()]
        size = max(sum(box_size(boxes[name]) for name in names if name in boxes) for boxes in target_boxes)
        if groups and group_size + size <= max_elements:
            groups[-1] += tuple(names)
            group_size += size
        else:
            groups.append(tuple(names))
            group_size = size
    return groups


def _plan_bucket(
    names: tuple[str, ...],
    pieces: Sequence[Mapping[str, Sequence[Piece]]],
    target_boxes: BoxesByRank,
    nodes: Sequence[int],
) -> Bucket:
    inter_node: list[Move] = []
    intra_node: list[Move] = []
    sent: dict[int, int] = defaultdict(int)
    received: dict[int, int] = defaultdict(int)

    def move(moves: list[Move], name: str, box: Box, sources: Sequence[int], target: int) -> None:
        source = min(sources, key=lambda rank: (sent[rank], rank))
        sent[source] += box_size(box)
        received[target] += box_size(box)
        moves.append(Move(name, box, source, target))

    for name in names:
        for box, holders, targets in _cells(name, pieces, target_boxes):
            by_node: dict[int, list[int]] = defaultdict(list)
            for rank in targets:
                by_node[nodes[rank]].append(rank)
            for node, ranks in by_node.items():
                local_sources = [rank for rank in holders if nodes[rank] == node]
                if not local_sources:
                    entry = min(ranks, key=lambda rank: (received[rank], rank))
                    move(inter_node, name, box, holders, entry)
                    ranks, local_sources = [rank for rank in ranks if rank != entry], [entry]
                for rank in ranks:
                    move(intra_node, name, box, local_sources, rank)
    return Bucket(names, inter_node, intra_node)


def _cells(
    name: str, pieces: Sequence[Mapping[str, Sequence[Piece]]], target_boxes: BoxesByRank
) -> list[tuple[Box, list[int], list[int]]]:
    """Split one tensor into boxes that each have one set of holders and one set of readers.

    Returns:
        (box, ranks that hold it, ranks that read it and do not hold it) for every box.

    Raises:
        WeightSyncError: a rank reads elements that no rank holds.
    """
    holders: dict[Box, list[int]] = defaultdict(list)
    for rank, held in enumerate(pieces):
        for piece in held.get(name, ()):
            holders[piece.slice.hf_box].append(rank)
    cells = []
    found: dict[int, int] = defaultdict(int)
    for box, ranks in holders.items():
        readers: dict[Box, list[int]] = defaultdict(list)
        for rank, boxes in enumerate(target_boxes):
            common = intersection(boxes[name], box) if name in boxes else None
            if common is not None:
                found[rank] += box_size(common)
                readers[common].append(rank)
        cells += [(common, ranks, [rank for rank in all_ if rank not in ranks]) for common, all_ in readers.items()]
    for rank, boxes in enumerate(target_boxes):
        if name in boxes and found[rank] != box_size(boxes[name]):
            raise WeightSyncError(
                f"{name}: rank {rank} reads {box_size(boxes[name])} elements, the training ranks hold {found[rank]} of "
                "them. A parameter is missing from the layout table, or ranks hold different boxes of it that overlap."
            )
    return cells
