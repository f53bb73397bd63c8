"""A planned weight transfer, carried out: full-shaped tensors of which the parts that are read are filled."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.weights.layout import box_index, box_shape, box_size, intersection, layer_of, relative_box
from megatron_rl.weights.reshard import Bucket, Move, ReshardPlan

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
    tensors: dict[str, Tensor]
    """Of each tensor the box that is read."""
    exchange: _Exchange


class _Memory:
    """Buffers of a push, used again: fresh memory costs more than what is copied into it."""

    def __init__(self, example: Tensor, traffic: Traffic) -> None:
        self._example = example
        self._traffic = traffic
        self._free: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)

    def take(self, *shape: int) -> Tensor:
        """A buffer with any contents."""
        free = self._free[shape]
        if free:
            return free.pop()
        made = self._example.new_empty(shape)
        self._traffic.hold(made)
        return made

    def give(self, *tensors: Tensor) -> None:
        """They may be overwritten."""
        for tensor in tensors:
            self._free[tuple(tensor.shape)].append(tensor)


class Transfer:
    """This rank's part in the transfers of one plan."""

    def __init__(self, plan: ReshardPlan, rank: int, group: Any = None) -> None:
        """
        Args:
            group: process group of all ranks of the plan; None: the default one.
        """
        self._plan = plan
        self._rank = rank
        self._group = group
        self._wanted = plan.wanted[rank]
        self._pieces = plan.pieces[rank]

    def stream(self, parameters: Mapping[str, Tensor], traffic: Traffic) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor of the whole shape) of everything this rank reads; what it does not read is NaN.

        Collective: every rank of the plan must exhaust the iterator. While a bucket is handed over the next one is
        under way. A tensor keeps its contents until a tensor of another layer has come.

        Args:
            parameters: this rank's shards.
            traffic: counts what is moved.
        """
        buckets = self._plan.buckets
        memory = _Memory(next(iter(parameters.values())), traffic)
        wholes: dict[str, Tensor] = {}
        ahead = self._begin(buckets[0], parameters, memory, traffic)
        for place in range(len(buckets)):
            landing = ahead
            self._finish(landing, memory)
            if place + 1 < len(buckets):
                ahead = self._begin(buckets[place + 1], parameters, memory, traffic)
            landing.exchange = self._exchange(landing.bucket.inside, parameters, landing.tensors, memory, traffic)
            self._finish(landing, memory)
            for name in landing.bucket.names:
                if name in landing.tensors:
                    yield name, self._whole(name, landing.tensors[name], wholes, traffic)
            memory.give(*landing.tensors.values())

    def _begin(self, bucket: Bucket, parameters: Mapping[str, Tensor], memory: _Memory, traffic: Traffic) -> _Landing:
        tensors = {name: memory.take(*box_shape(self._wanted[name])) for name in bucket.names if name in self._wanted}
        for name, target in tensors.items():
            for piece in self._pieces.get(name, ()):
                common = intersection(self._wanted[name], piece.slice.hf_box)
                if common is not None:
                    target[box_index(relative_box(common, self._wanted[name]))] = piece.part(parameters, common)
        return _Landing(bucket, tensors, self._exchange(bucket.across, parameters, tensors, memory, traffic))

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
        for piece in self._pieces.get(move.name, ()):
            if intersection(move.box, piece.slice.hf_box) == move.box:
                return piece.part(parameters, move.box)
        return self._target(move, landed)

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

    def _whole(self, name: str, part: Tensor, wholes: dict[str, Tensor], traffic: Traffic) -> Tensor:
        """The part in a tensor of the whole shape; each is used again for the same tensor of later layers."""
        box, shape = self._wanted[name], self._plan.shapes[name]
        if box_size(box) == torch.Size(shape).numel():
            return part
        key = name.removeprefix(layer_of(name))
        whole = wholes.get(key) if key else None
        if whole is None:
            whole = part.new_full(shape, float("nan"))
            traffic.peak = max(traffic.peak, traffic.held + _bytes(whole))
        if key and key not in wholes:
            traffic.hold(whole)
            wholes[key] = whole
        whole[box_index(box)] = part
        return whole


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
