"""A planned weight transfer, carried out: full-shaped tensors of which the parts that are read are in memory."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.weight_sync.host_memory import Meeting, Neighbours, meet_neighbours, meet_nobody
from megatron_rl.weight_sync.partial_tensor import PartialTensor
from megatron_rl.weight_sync.plan import Bucket, Move, ReshardPlan
from megatron_rl.weights.export import Piece
from megatron_rl.weights.layout import box_index, box_shape, intersection, relative_box

# elements from which a box is a message of its own
ALONE = 2**17


@dataclass
class Traffic:
    """What one rank moved in a push."""

    bytes_received: int = 0
    bytes_sent: int = 0
    held: int = 0
    """Bytes of buffers that are kept until the end of the push."""
    peak: int = 0
    """Most bytes of buffers at a time."""

    def hold(self, *tensors: Tensor) -> None:
        """Count buffers that are made."""
        self.held += sum(map(_bytes, tensors))
        self.peak = max(self.peak, self.held)


@dataclass
class _Exchange:
    """Messages under way."""

    works: Sequence[Any] = ()
    incoming: Sequence[tuple[Tensor, Sequence[Move]]] = ()
    """Flat messages to be put into their places, and the boxes in them."""
    buffers: Sequence[Tensor] = ()
    """Memory that is free again when all has come and gone."""


@dataclass
class _Landing:
    """A bucket on its way to this rank."""

    bucket: Bucket
    tensors: Mapping[str, Tensor]
    """Of each tensor the box that is read."""
    buffers: Sequence[Tensor]
    """Those of them that are not views of this rank's own shards."""
    exchange: _Exchange


class _Memory:
    """Buffers that are used again: fresh memory costs more than what is copied into it."""

    def __init__(self, example: Tensor) -> None:
        self._example = example.new_empty(0)
        self._free: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self._made: list[Tensor] = []
        self._traffic = Traffic()

    def begin(self, traffic: Traffic) -> None:
        """Count for this push what there is and what will be made."""
        self._traffic = traffic
        traffic.hold(*self._made)

    def take(self, *shape: int) -> Tensor:
        """A buffer with any contents."""
        free = self._free[shape]
        if free:
            return free.pop()
        made = self._example.new_empty(shape)
        self._made.append(made)
        self._traffic.hold(made)
        return made

    def give(self, *tensors: Tensor) -> None:
        """They may be overwritten."""
        for tensor in tensors:
            self._free[tuple(tensor.shape)].append(tensor)


class Transfer:
    """This rank's part in the transfers of one plan."""

    def __init__(self, plan: ReshardPlan, rank: int, group: Any = None, *, meet: Meeting = meet_neighbours) -> None:
        """
        Args:
            group: process group of all ranks of the plan; None: the default one.
            meet: the way to what ranks of the same node hold, tried before messages.
        """
        self._plan = plan
        self._rank = rank
        self._group = group
        self._wanted = plan.wanted[rank]
        self._pieces = plan.pieces[rank]
        self._memory: _Memory | None = None
        inside = [move for bucket in plan.buckets for move in bucket.inside]
        self._meet = meet if inside else meet_nobody
        self._near = {move.source for move in inside if move.target == rank and self._holding(move)}

    def stream(self, parameters: Mapping[str, Tensor], traffic: Traffic) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor of the whole shape) of everything this rank reads; what it does not read is NaN.

        Collective: every rank of the plan must exhaust the iterator. While a bucket is handed over, what the next one
        brings from other nodes is under way. A tensor keeps its contents until a tensor of another layer has come; it
        is to be read only, for it may be a view of the rank's own shard.

        Args:
            parameters: this rank's shards.
            traffic: counts what is moved.
        """
        example = next(iter(parameters.values()))
        # kept for the next push where nothing else does that; it is made anew if a push is left half-way
        memory, self._memory = self._memory or _Memory(example), None
        memory.begin(traffic)
        with self._meet(parameters, self._near, self._group) as neighbours:
            yield from self._streamed(parameters, neighbours, memory, traffic)
        self._memory = None if example.is_cuda else memory

    def _streamed(
        self, parameters: Mapping[str, Tensor], neighbours: Neighbours, memory: _Memory, traffic: Traffic
    ) -> Iterator[tuple[str, Tensor]]:
        buckets = self._plan.buckets
        ahead: _Landing | None = None
        for place, bucket in enumerate(buckets):
            landing = ahead or self._begin(bucket, parameters, memory, traffic)
            self._finish(landing, memory)
            following = buckets[place + 1] if place + 1 < len(buckets) else None
            # what stays inside the nodes comes last in a bucket, so that alone would only fill memory earlier
            ahead = self._begin(following, parameters, memory, traffic) if following and following.across else None
            sent = self._read(bucket.inside, neighbours, parameters, landing.tensors, traffic)
            landing.exchange = self._exchange(sent, parameters, landing.tensors, memory, traffic)
            self._finish(landing, memory)
            for name in bucket.names:
                if name in landing.tensors:
                    yield name, self._whole(name, landing.tensors[name])
            memory.give(*landing.buffers)

    def _begin(self, bucket: Bucket, parameters: Mapping[str, Tensor], memory: _Memory, traffic: Traffic) -> _Landing:
        tensors, buffers = {}, []
        for name in bucket.names:
            if name not in self._wanted:
                continue
            wanted, pieces = self._wanted[name], self._pieces.get(name, ())
            own = [(piece, common) for piece in pieces if (common := intersection(wanted, piece.slice.hf_box))]
            if len(own) == 1 and own[0][1] == wanted:
                tensors[name] = own[0][0].part(parameters, wanted)
                continue
            tensors[name] = memory.take(*box_shape(wanted))
            buffers.append(tensors[name])
            for piece, common in own:
                tensors[name][box_index(relative_box(common, wanted))] = piece.part(parameters, common)
        return _Landing(bucket, tensors, buffers, self._exchange(bucket.across, parameters, tensors, memory, traffic))

    def _read(
        self,
        moves: Sequence[Move],
        neighbours: Neighbours,
        parameters: Mapping[str, Tensor],
        landed: Mapping[str, Tensor],
        traffic: Traffic,
    ) -> list[Move]:
        """Copy what neighbours hold out of their memory.

        Returns:
            The moves that remain to be sent.
        """
        remaining = []
        for move in moves:
            piece = self._holding(move) if neighbours else None
            if piece is None:
                remaining.append(move)
            elif move.target == self._rank:
                target = self._target(move, landed)
                neighbours[move.source][piece.parameter].read(piece.shard_box(move.box), target)
                traffic.bytes_received += _bytes(target)
            elif move.source == self._rank:
                traffic.bytes_sent += _bytes(piece.part(parameters, move.box))
        return remaining

    def _exchange(
        self,
        moves: Sequence[Move],
        parameters: Mapping[str, Tensor],
        landed: Mapping[str, Tensor],
        memory: _Memory,
        traffic: Traffic,
    ) -> _Exchange:
        """Send this rank's messages and get ready for those that come."""
        operations, incoming, buffers = [], [], []
        packed: dict[tuple[Any, ...], Tensor] = {}  # receivers of the same boxes share a message
        for target, sent in _messages([move for move in moves if move.source == self._rank], by_target=True):
            key = tuple((move.name, move.box) for move in sent)
            if key not in packed:
                sources = [self._source(move, parameters, landed) for move in sent]
                if len(sources) == 1 and sources[0].is_contiguous():
                    packed[key] = sources[0]
                else:
                    packed[key] = memory.take(sum(move.num_elements for move in sent))
                    torch.cat([source.reshape(-1) for source in sources], out=packed[key])
                    buffers.append(packed[key])
            traffic.bytes_sent += _bytes(packed[key])
            operations.append(dist.P2POp(dist.isend, packed[key], target, self._group))
        for source, received in _messages([move for move in moves if move.target == self._rank], by_target=False):
            place = self._target(received[0], landed)
            if len(received) > 1 or not place.is_contiguous():
                place = memory.take(sum(move.num_elements for move in received))
                buffers.append(place)
                incoming.append((place, received))
            traffic.bytes_received += _bytes(place)
            operations.append(dist.P2POp(dist.irecv, place, source, self._group))
        works = dist.batch_isend_irecv(operations) if operations else ()
        return _Exchange(works, incoming, buffers)

    def _source(self, move: Move, parameters: Mapping[str, Tensor], landed: Mapping[str, Tensor]) -> Tensor:
        piece = self._holding(move)
        return self._target(move, landed) if piece is None else piece.part(parameters, move.box)

    def _holding(self, move: Move) -> Piece | None:
        """What the source has it from; None: from another node."""
        pieces = self._plan.pieces[move.source].get(move.name, ())
        return next((one for one in pieces if intersection(move.box, one.slice.hf_box) == move.box), None)

    def _target(self, move: Move, landed: Mapping[str, Tensor]) -> Tensor:
        return landed[move.name][box_index(relative_box(move.box, self._wanted[move.name]))]

    def _finish(self, landing: _Landing, memory: _Memory) -> None:
        """Wait for the messages under way and put what came into its place."""
        exchange, landing.exchange = landing.exchange, _Exchange()
        for work in exchange.works:
            work.wait()
        for flat, moves in exchange.incoming:
            for move, part in zip(moves, flat.split([move.num_elements for move in moves]), strict=True):
                self._target(move, landing.tensors).copy_(part.view(box_shape(move.box)))
        memory.give(*exchange.buffers)

    def _whole(self, name: str, part: Tensor) -> Tensor:
        shape = self._plan.shapes[name]
        return part if part.shape == shape else PartialTensor(part, self._wanted[name], shape)


def _messages(moves: Sequence[Move], *, by_target: bool) -> list[tuple[int, list[Move]]]:
    """(peer, boxes): large boxes travel alone, so that they need no copy; the small ones of a peer together."""
    messages: list[tuple[int, list[Move]]] = []
    small: dict[int, list[Move]] = defaultdict(list)
    for move in moves:
        peer = move.target if by_target else move.source
        if move.num_elements >= ALONE:
            messages.append((peer, [move]))
        else:
            small[peer].append(move)
    return messages + sorted(small.items())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
