"""Execute a planned weight transfer; the tensors have their full shape, but only the boxes that are read are filled."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.weight_sync.host_memory import PeerAccess, PeerParameters, expose_host_memory, no_peer_access
from megatron_rl.weight_sync.partial_tensor import PartialTensor
from megatron_rl.weight_sync.plan import Bucket, Move, ReshardPlan
from megatron_rl.weights.export import Piece
from megatron_rl.weights.layout import box_index, box_shape, intersection, relative_box

# number of elements from which a box is sent as a message of its own
MIN_SINGLE_ELEMENTS = 2**17


@dataclass
class Traffic:
    """What one rank transferred in a push."""

    bytes_received: int = 0
    bytes_sent: int = 0
    buffer_bytes: int = 0
    """Bytes of all buffers; they are kept until the end of the push."""
    peak_buffer_bytes: int = 0
    """Largest value of ``buffer_bytes`` so far."""

    def add_buffers(self, *tensors: Tensor) -> None:
        """Count newly allocated buffers."""
        self.buffer_bytes += sum(map(_bytes, tensors))
        self.peak_buffer_bytes = max(self.peak_buffer_bytes, self.buffer_bytes)


@dataclass
class _PendingMessages:
    """Messages that are being sent and received."""

    works: Sequence[Any] = ()
    packed: Sequence[tuple[Tensor, Sequence[Move]]] = ()
    """Flat buffers of received messages that must be unpacked, each with the boxes in it."""
    buffers: Sequence[Tensor] = ()
    """Buffers that are free again once all messages are complete."""


@dataclass
class _IncomingBucket:
    """A bucket that this rank is receiving."""

    bucket: Bucket
    tensors: Mapping[str, Tensor]
    """Tensor name -> the box of it that this rank reads."""
    buffers: Sequence[Tensor]
    """Those of ``tensors`` that are not views of this rank's own shards."""
    messages: _PendingMessages


class _BufferPool:
    """Buffers that are reused: allocating memory costs more than copying into it."""

    def __init__(self, example: Tensor) -> None:
        self._example = example.new_empty(0)
        self._free: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self._buffers: list[Tensor] = []
        self._traffic = Traffic()

    def begin(self, traffic: Traffic) -> None:
        """Count the existing buffers, and those allocated from now on, in ``traffic``."""
        self._traffic = traffic
        traffic.add_buffers(*self._buffers)

    def take(self, *shape: int) -> Tensor:
        """Return a free buffer of this shape, with arbitrary contents."""
        free = self._free[shape]
        if free:
            return free.pop()
        buffer = self._example.new_empty(shape)
        self._buffers.append(buffer)
        self._traffic.add_buffers(buffer)
        return buffer

    def give(self, *tensors: Tensor) -> None:
        """Return buffers to the pool; they may be overwritten."""
        for tensor in tensors:
            self._free[tuple(tensor.shape)].append(tensor)


class Transfer:
    """This rank's part in the transfers of one plan."""

    def __init__(
        self, plan: ReshardPlan, rank: int, group: Any = None, *, peer_access: PeerAccess = expose_host_memory
    ) -> None:
        """
        Args:
            group: process group of all ranks of the plan; None: the default one.
            peer_access: gives direct access to parameters of ranks of the same node; otherwise messages are sent.
        """
        self._plan = plan
        self._rank = rank
        self._group = group
        self._boxes = plan.target_boxes[rank]
        self._pieces = plan.pieces[rank]
        self._pool: _BufferPool | None = None
        intra_node = [move for bucket in plan.buckets for move in bucket.intra_node]
        self._peer_access = peer_access if intra_node else no_peer_access
        self._local_sources = {move.source for move in intra_node if move.target == rank and self._source_piece(move)}

    def stream(self, parameters: Mapping[str, Tensor], traffic: Traffic) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor of the full shape) of every tensor this rank reads; elements it does not read are NaN.

        Collective: every rank of the plan must exhaust the iterator. While the tensors of a bucket are yielded, the
        messages of the next bucket from other nodes are being received. A tensor keeps its contents until a tensor of
        another layer is yielded. It must not be written to, as it may be a view of the rank's own shard.

        Args:
            parameters: this rank's shards.
            traffic: counters of the bytes transferred.
        """
        example = next(iter(parameters.values()))
        # kept for the next push on CPU (CUDA's allocator caches memory itself); an aborted push drops the pool
        pool, self._pool = self._pool or _BufferPool(example), None
        pool.begin(traffic)
        with self._peer_access(parameters, self._local_sources, self._group) as peers:
            yield from self._stream_buckets(parameters, peers, pool, traffic)
        self._pool = None if example.is_cuda else pool

    def _stream_buckets(
        self, parameters: Mapping[str, Tensor], peers: PeerParameters, pool: _BufferPool, traffic: Traffic
    ) -> Iterator[tuple[str, Tensor]]:
        buckets = self._plan.buckets
        prefetched: _IncomingBucket | None = None
        for index, bucket in enumerate(buckets):
            incoming = prefetched or self._begin(bucket, parameters, pool, traffic)
            self._finish(incoming, pool)
            next_bucket = buckets[index + 1] if index + 1 < len(buckets) else None
            # intra-node moves come last, so starting a bucket that has only these early would just occupy memory
            if next_bucket and next_bucket.inter_node:
                prefetched = self._begin(next_bucket, parameters, pool, traffic)
            else:
                prefetched = None
            remaining = self._read(bucket.intra_node, peers, parameters, incoming.tensors, traffic)
            incoming.messages = self._exchange(remaining, parameters, incoming.tensors, pool, traffic)
            self._finish(incoming, pool)
            for name in bucket.names:
                if name in incoming.tensors:
                    yield name, self._full_shaped(name, incoming.tensors[name])
            pool.give(*incoming.buffers)

    def _begin(
        self, bucket: Bucket, parameters: Mapping[str, Tensor], pool: _BufferPool, traffic: Traffic
    ) -> _IncomingBucket:
        """Fill what this rank holds itself, and start the messages between nodes."""
        tensors, buffers = {}, []
        for name in bucket.names:
            if name not in self._boxes:
                continue
            target_box, pieces = self._boxes[name], self._pieces.get(name, ())
            own = [(piece, common) for piece in pieces if (common := intersection(target_box, piece.slice.hf_box))]
            if len(own) == 1 and own[0][1] == target_box:
                tensors[name] = own[0][0].part(parameters, target_box)
                continue
            tensors[name] = pool.take(*box_shape(target_box))
            buffers.append(tensors[name])
            for piece, common in own:
                tensors[name][box_index(relative_box(common, target_box))] = piece.part(parameters, common)
        messages = self._exchange(bucket.inter_node, parameters, tensors, pool, traffic)
        return _IncomingBucket(bucket, tensors, buffers, messages)

    def _read(
        self,
        moves: Sequence[Move],
        peers: PeerParameters,
        parameters: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        traffic: Traffic,
    ) -> list[Move]:
        """Read the boxes that peers hold from their memory.

        Returns:
            The moves that must be sent as messages.
        """
        remaining = []
        for move in moves:
            piece = self._source_piece(move) if peers else None
            if piece is None:
                remaining.append(move)
            elif move.target == self._rank:
                target = self._target(move, tensors)
                peers[move.source][piece.parameter].read(piece.shard_box(move.box), target)
                traffic.bytes_received += _bytes(target)
            elif move.source == self._rank:
                traffic.bytes_sent += _bytes(piece.part(parameters, move.box))
        return remaining

    def _exchange(
        self,
        moves: Sequence[Move],
        parameters: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        pool: _BufferPool,
        traffic: Traffic,
    ) -> _PendingMessages:
        """Start sending and receiving this rank's messages."""
        operations, packed_received, buffers = [], [], []
        packed: dict[tuple[Any, ...], Tensor] = {}  # receivers of the same boxes share a buffer
        for target, sent in _messages([move for move in moves if move.source == self._rank], by_target=True):
            key = tuple((move.name, move.box) for move in sent)
            if key not in packed:
                sources = [self._source(move, parameters, tensors) for move in sent]
                if len(sources) == 1 and sources[0].is_contiguous():
                    packed[key] = sources[0]
                else:
                    packed[key] = pool.take(sum(move.num_elements for move in sent))
                    torch.cat([source.reshape(-1) for source in sources], out=packed[key])
                    buffers.append(packed[key])
            traffic.bytes_sent += _bytes(packed[key])
            operations.append(dist.P2POp(dist.isend, packed[key], target, self._group))
        for source, received in _messages([move for move in moves if move.target == self._rank], by_target=False):
            destination = self._target(received[0], tensors)
            if len(received) > 1 or not destination.is_contiguous():
                destination = pool.take(sum(move.num_elements for move in received))
                buffers.append(destination)
                packed_received.append((destination, received))
            traffic.bytes_received += _bytes(destination)
            operations.append(dist.P2POp(dist.irecv, destination, source, self._group))
        works = dist.batch_isend_irecv(operations) if operations else ()
        return _PendingMessages(works, packed_received, buffers)

    def _source(self, move: Move, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        piece = self._source_piece(move)
        return self._target(move, tensors) if piece is None else piece.part(parameters, move.box)

    def _source_piece(self, move: Move) -> Piece | None:
        """The piece of the source's shards that holds the box; None if the source receives it from another node."""
        pieces = self._plan.pieces[move.source].get(move.name, ())
        return next((piece for piece in pieces if intersection(move.box, piece.slice.hf_box) == move.box), None)

    def _target(self, move: Move, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[move.name][box_index(relative_box(move.box, self._boxes[move.name]))]

    def _finish(self, incoming: _IncomingBucket, pool: _BufferPool) -> None:
        """Wait for the pending messages and unpack those that were received."""
        messages, incoming.messages = incoming.messages, _PendingMessages()
        for work in messages.works:
            work.wait()
        for flat, moves in messages.packed:
            for move, part in zip(moves, flat.split([move.num_elements for move in moves]), strict=True):
                self._target(move, incoming.tensors).copy_(part.view(box_shape(move.box)))
        pool.give(*messages.buffers)

    def _full_shaped(self, name: str, part: Tensor) -> Tensor:
        shape = self._plan.shapes[name]
        return part if part.shape == shape else PartialTensor(part, self._boxes[name], shape)


def _messages(moves: Sequence[Move], *, by_target: bool) -> list[tuple[int, list[Move]]]:
    """(peer, boxes) of every message: large boxes are sent alone, without a copy; small ones of a peer are packed."""
    messages: list[tuple[int, list[Move]]] = []
    small: dict[int, list[Move]] = defaultdict(list)
    for move in moves:
        peer = move.target if by_target else move.source
        if move.num_elements >= MIN_SINGLE_ELEMENTS:
            messages.append((peer, [move]))
        else:
            small[peer].append(move)
    return messages + sorted(small.items())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
