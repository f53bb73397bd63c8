"""The plan of a weight transfer: who sends which box of which tensor to whom.

A wanted element that its receiver does not hold arrives exactly once. An element crosses to a node at most once,
to one rank there that wants it, and goes on to the others inside the node. Buckets are whole layers, one of every
pipeline stage side by side, so that all stages send at the same time.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.errors import WeightSyncError
from megatron_rl.weights.export import Piece
from megatron_rl.weights.layout import Box, LayoutTable, Place, box_size, hf_shapes, intersection, layer_of

Held = Sequence[tuple[Sequence[str], Place]]
"""For each rank its parameters and its place."""
Wanted = Sequence[Mapping[str, Box]]
"""For each rank the box that it reads of every tensor; an empty mapping: it reads nothing."""


@dataclass(frozen=True)
class Move:
    """One box of one tensor from one rank to another."""

    name: str
    box: Box
    source: int
    target: int

    @property
    def num_elements(self) -> int:
        return box_size(self.box)


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together."""

    names: tuple[str, ...]
    across: Sequence[Move]
    """Between nodes; done first."""
    inside: Sequence[Move]
    """Between ranks of a node; of what they hold, or what came to them from another node."""


@dataclass(frozen=True)
class ReshardPlan:
    """All moves of a push."""

    shapes: Mapping[str, tuple[int, ...]]
    wanted: Wanted
    pieces: Sequence[Mapping[str, Sequence[Piece]]]
    """For each rank what it holds of every tensor."""
    buckets: Sequence[Bucket]

    def num_received(self, rank: int) -> int:
        """Elements that reach a rank from others."""
        return sum(move.num_elements for move in self.moves() if move.target == rank)

    def num_sent(self, rank: int) -> int:
        """Elements that a rank sends."""
        return sum(move.num_elements for move in self.moves() if move.source == rank)

    def num_across(self) -> int:
        """Elements that pass between nodes."""
        return sum(move.num_elements for bucket in self.buckets for move in bucket.across)

    def minimum(self, rank: int) -> int:
        """Elements that a rank wants and does not hold."""
        return sum(
            box_size(box) - sum(map(box_size, _held_parts(box, self.pieces[rank].get(name, ()))))
            for name, box in self.wanted[rank].items()
        )

    def moves(self) -> list[Move]:
        """Of all buckets, in order."""
        return [move for bucket in self.buckets for move in (*bucket.across, *bucket.inside)]


def plan_reshard(
    held: Held, table: LayoutTable, wanted: Wanted, nodes: Sequence[int], *, bucket_elements: int
) -> ReshardPlan:
    """Plan a transfer.

    Args:
        held: what every rank has, under the table's names.
        table: layout at the tensor-parallel size of the holders.
        nodes: the node of every rank.
        bucket_elements: most elements that a rank receives in a bucket, if a layer of each stage has no more.

    Raises:
        WeightSyncError: something that is wanted is held by nobody.
    """
    shapes = hf_shapes(table)
    pieces = [_pieces(names, place, table) for names, place in held]
    groups = _rounds(shapes, pieces, wanted, bucket_elements)
    buckets = [_plan_bucket(names, pieces, wanted, nodes) for names in groups]
    return ReshardPlan(shapes, wanted, pieces, buckets)


def _pieces(names: Sequence[str], place: Place, table: LayoutTable) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for parameter in names:
        for piece in place.slices(table[parameter]):
            mine = found.setdefault(piece.hf_name, [])
            if all(piece.hf_box != other.slice.hf_box for other in mine):  # a tied output layer repeats the embedding
                mine.append(Piece(parameter, piece))
    return found


def _held_parts(box: Box, pieces: Sequence[Piece]) -> list[Box]:
    parts = (intersection(box, piece.slice.hf_box) for piece in pieces)
    return [part for part in parts if part is not None]


def _rounds(
    shapes: Mapping[str, tuple[int, ...]], pieces: Sequence[Mapping[str, Sequence[Piece]]], wanted: Wanted, most: int
) -> list[tuple[str, ...]]:
    """Names of each bucket: a layer of every stage, and further ones while they fit."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in sorted(shapes, key=lambda name: layer_of(name) == name):  # layers first: every stage has as many
        layers[layer_of(name)].append(name)
    stages: dict[tuple[int, ...], deque[list[str]]] = defaultdict(deque)
    for names in layers.values():
        holders = tuple(rank for rank, mine in enumerate(pieces) if names[0] in mine)
        stages[holders].append(names)
    rounds: list[tuple[str, ...]] = []
    held = 0
    while any(stages.values()):
        names = [name for queue in stages.values() if queue for name in queue.popleft()]
        size = max(sum(box_size(mine[name]) for name in names if name in mine) for mine in wanted)
        if rounds and held + size <= most:
            rounds[-1] += tuple(names)
            held += size
        else:
            rounds.append(tuple(names))
            held = size
    return rounds


def _plan_bucket(
    names: tuple[str, ...], pieces: Sequence[Mapping[str, Sequence[Piece]]], wanted: Wanted, nodes: Sequence[int]
) -> Bucket:
    across: list[Move] = []
    inside: list[Move] = []
    sent: dict[int, int] = defaultdict(int)
    received: dict[int, int] = defaultdict(int)

    def move(moves: list[Move], name: str, box: Box, sources: Sequence[int], target: int) -> None:
        source = min(sources, key=lambda rank: (sent[rank], rank))
        sent[source] += box_size(box)
        received[target] += box_size(box)
        moves.append(Move(name, box, source, target))

    for name in names:
        for box, holders, targets in _cells(name, pieces, wanted):
            by_node: dict[int, list[int]] = defaultdict(list)
            for rank in targets:
                by_node[nodes[rank]].append(rank)
            for node, ranks in by_node.items():
                near = [rank for rank in holders if nodes[rank] == node]
                if not near:
                    entry = min(ranks, key=lambda rank: (received[rank], rank))
                    move(across, name, box, holders, entry)
                    ranks, near = [rank for rank in ranks if rank != entry], [entry]
                for rank in ranks:
                    move(inside, name, box, near, rank)
    return Bucket(names, across, inside)


def _cells(
    name: str, pieces: Sequence[Mapping[str, Sequence[Piece]]], wanted: Wanted
) -> list[tuple[Box, list[int], list[int]]]:
    """Boxes that some ranks hold alike and others want alike: (box, holders, those who want it and do not hold it).

    Raises:
        WeightSyncError: part of what a rank wants is held by nobody.
    """
    holders: dict[Box, list[int]] = defaultdict(list)
    for rank, held in enumerate(pieces):
        for piece in held.get(name, ()):
            holders[piece.slice.hf_box].append(rank)
    cells = []
    found: dict[int, int] = defaultdict(int)
    for box, ranks in holders.items():
        targets: dict[Box, list[int]] = defaultdict(list)
        for rank, mine in enumerate(wanted):
            common = intersection(mine[name], box) if name in mine else None
            if common is not None:
                found[rank] += box_size(common)
                targets[common].append(rank)
        cells += [(common, ranks, [rank for rank in all_ if rank not in ranks]) for common, all_ in targets.items()]
    for rank, mine in enumerate(wanted):
        if name in mine and found[rank] != box_size(mine[name]):
            raise WeightSyncError(
                f"{name}: rank {rank} reads {box_size(mine[name])} elements, the training ranks hold {found[rank]} of "
                "them. A parameter is missing from the layout table, or held twice in different parts."
            )
    return cells
