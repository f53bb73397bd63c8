"""A planned weight transfer, carried out: full-shaped tensors of which the parts that are read are filled."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.weights.layout import box_index, box_shape, box_size, intersection, moved_box, relative_box
from megatron_rl.weights.reshard import Bucket, Move, ReshardPlan


@dataclass
class Traffic:
    """What one rank moved in a push."""

    bytes_received: int = 0
    bytes_sent: int = 0
    held: int = 0
    """Bytes of buffers at the moment."""
    peak: int = 0
    """Most bytes of buffers at a time."""

    def hold(self, *tensors: Tensor) -> None:
        """Count buffers that are made."""
        self.held += sum(map(_bytes, tensors))
        self.peak = max(self.peak, self.held)

    def drop(self, *tensors: Tensor) -> None:
        """Count buffers that are given up."""
        self.held -= sum(map(_bytes, tensors))


@dataclass
class _Exchange:
    """Messages under way."""

    works: Sequence[Any] = ()
    incoming: Sequence[tuple[Tensor, Sequence[Move]]] = ()
    """Flat messages and the boxes in them."""
    outgoing: Sequence[Tensor] = ()


@dataclass
class _Landing:
    """A bucket on its way to this rank."""

    bucket: Bucket
    tensors: dict[str, Tensor]
    """Of each tensor the box that is read."""
    exchange: _Exchange


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
        under way.

        Args:
            parameters: this rank's shards.
            traffic: counts what is moved.
        """
        buckets = self._plan.buckets
        ahead = self._begin(buckets[0], parameters, traffic)
        for place in range(len(buckets)):
            landing = ahead
            self._finish(landing, traffic)
            if place + 1 < len(buckets):
                ahead = self._begin(buckets[place + 1], parameters, traffic)
            landing.exchange = self._exchange(landing.bucket.inside, parameters, landing.tensors, traffic)
            self._finish(landing, traffic)
            for name in landing.bucket.names:
                if name in landing.tensors:
                    yield name, self._whole(name, landing.tensors[name], traffic)
                    traffic.drop(landing.tensors.pop(name))

    def _begin(self, bucket: Bucket, parameters: Mapping[str, Tensor], traffic: Traffic) -> _Landing:
        example = next(iter(parameters.values()))
        tensors = {
            name: example.new_empty(box_shape(self._wanted[name])) for name in bucket.names if name in self._wanted
        }
        traffic.hold(*tensors.values())
        for name, target in tensors.items():
            for piece in self._pieces.get(name, ()):
                common = intersection(self._wanted[name], piece.slice.hf_box)
                if common is not None:
                    source = moved_box(common, piece.slice.hf_box, piece.slice.shard_box)
                    index = box_index(relative_box(common, self._wanted[name]))
                    target[index] = parameters[piece.parameter][box_index(source)]
        return _Landing(bucket, tensors, self._exchange(bucket.across, parameters, tensors, traffic))

    def _exchange(
        self, moves: Sequence[Move], parameters: Mapping[str, Tensor], landed: Mapping[str, Tensor], traffic: Traffic
    ) -> _Exchange:
        """Send this rank's messages, one to each receiver, and get ready for those that come."""
        to: dict[int, list[Move]] = defaultdict(list)
        come: dict[int, list[Move]] = defaultdict(list)
        for move in moves:
            if move.source == self._rank:
                to[move.target].append(move)
            if move.target == self._rank:
                come[move.source].append(move)
        example = next(iter(parameters.values()))
        packed: dict[tuple[Any, ...], Tensor] = {}  # receivers of the same boxes share a message
        operations = []
        for target, sent in sorted(to.items()):
            key = tuple((move.name, move.box) for move in sent)
            if key not in packed:
                packed[key] = torch.cat([self._source(move, parameters, landed).reshape(-1) for move in sent])
            traffic.bytes_sent += _bytes(packed[key])
            operations.append(dist.P2POp(dist.isend, packed[key], target, self._group))
        incoming = []
        for source, received in sorted(come.items()):
            flat = example.new_empty(sum(move.num_elements for move in received))
            traffic.bytes_received += _bytes(flat)
            operations.append(dist.P2POp(dist.irecv, flat, source, self._group))
            incoming.append((flat, received))
        traffic.hold(*packed.values(), *(flat for flat, _ in incoming))
        works = dist.batch_isend_irecv(operations) if operations else ()
        return _Exchange(works, incoming, list(packed.values()))

    def _source(self, move: Move, parameters: Mapping[str, Tensor], landed: Mapping[str, Tensor]) -> Tensor:
        for piece in self._pieces.get(move.name, ()):
            if intersection(move.box, piece.slice.hf_box) == move.box:
                box = moved_box(move.box, piece.slice.hf_box, piece.slice.shard_box)
                return parameters[piece.parameter][box_index(box)]
        return landed[move.name][box_index(relative_box(move.box, self._wanted[move.name]))]

    def _finish(self, landing: _Landing, traffic: Traffic) -> None:
        """Wait for the messages under way and put what came into its place."""
        exchange, landing.exchange = landing.exchange, _Exchange()
        for work in exchange.works:
            work.wait()
        for flat, moves in exchange.incoming:
            for move, part in zip(moves, flat.split([move.num_elements for move in moves]), strict=True):
                index = box_index(relative_box(move.box, self._wanted[move.name]))
                landing.tensors[move.name][index] = part.view(box_shape(move.box))
        traffic.drop(*exchange.outgoing, *(flat for flat, _ in exchange.incoming))

    def _whole(self, name: str, part: Tensor, traffic: Traffic) -> Tensor:
        box, shape = self._wanted[name], self._plan.shapes[name]
        if box_size(box) == torch.Size(shape).numel():
            return part
        whole = part.new_full(shape, float("nan"))
        whole[box_index(box)] = part
        traffic.peak = max(traffic.peak, traffic.held + _bytes(whole))  # given up with the next tensor
        return whole


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
