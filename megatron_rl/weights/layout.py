"""The layout table: a Megatron tensor-parallel shard is a list of boxes of Hugging Face tensors.

A box is one (start, stop) pair per dimension. A layout maps (tp_rank, tp_size) to the slices of that shard; loading,
exporting and weight transfer are all derived from these slices.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from megatron_rl.errors import ConversionError

Box = tuple[tuple[int, int], ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Slice:
    """A box of a Hugging Face tensor and the box of a shard that holds its elements; both have the same shape."""

    hf_name: str
    hf_box: Box
    shard_box: Box


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the shards of one Megatron parameter are composed of Hugging Face tensors."""

    shape: Callable[[int], tuple[int, ...]]
    """tp_size -> shape of a shard."""
    slices: Callable[[int, int], list[Slice]]
    """(tp_rank, tp_size) -> slices of that shard."""
    replicated: bool = False
    """Every tensor-parallel rank holds the whole parameter."""
    expert: bool = False
    """The parameter belongs to an expert and is split over the expert-tensor-parallel ranks."""


LayoutTable = Mapping[str, Layout]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Tensor-parallel position of a rank; the matrices of experts may be split over other ranks (etp)."""

    tp_rank: int = 0
    tp_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """Shape of this rank's shard."""
        return layout.shape(self.etp_size if layout.expert else self.tp_size)

    def slices(self, layout: Layout) -> list[Slice]:
        """The slices of this rank's shard."""
        if layout.expert:
            return layout.slices(self.etp_rank, self.etp_size)
        return layout.slices(self.tp_rank, self.tp_size)


def full_box(shape: tuple[int, ...]) -> Box:
    """Return the box of a whole tensor."""
    return tuple((0, extent) for extent in shape)


def box_index(box: Box) -> Index:
    """Return a box as an index into a tensor."""
    return tuple(slice(start, stop) for start, stop in box)


def box_shape(box: Box) -> tuple[int, ...]:
    """Extent of a box in each dimension."""
    return tuple(stop - start for start, stop in box)


def box_size(box: Box) -> int:
    """Number of elements in a box."""
    return prod(box_shape(box))


def intersection(a: Box, b: Box) -> Box | None:
    """Return the intersection of two boxes; None if it is empty."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def relative_box(box: Box, outer: Box) -> Box:
    """Return a box in the coordinates of a box that contains it."""
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))


def moved_box(box: Box, source: Box, target: Box) -> Box:
    """Translate a box inside ``source`` to the box at the same position in ``target``, which has the same shape."""
    return tuple(
        (start - a + b, stop - a + b) for (start, stop), (a, _), (b, _) in zip(box, source, target, strict=True)
    )


def replicated(name: str, *shape: int) -> Layout:
    """Layout with the whole tensor on every rank."""
    box = full_box(shape)
    return Layout(shape=lambda size: shape, slices=lambda rank, size: [Slice(name, box, box)], replicated=True)


def column(name: str, rows: int, *rest: int) -> Layout:
    """Layout with the output features (rows) split over the ranks."""

    def slices(rank: int, size: int) -> list[Slice]:
        n = _share(rows, size, name)
        return [_rows(name, rank * n, 0, n, rest)]

    return Layout(shape=lambda size: (_share(rows, size, name), *rest), slices=slices)


def row(name: str, rows: int, columns: int) -> Layout:
    """Layout with the input features (columns) split over the ranks."""

    def slices(rank: int, size: int) -> list[Slice]:
        n = _share(columns, size, name)
        return [Slice(name, ((0, rows), (rank * n, (rank + 1) * n)), ((0, rows), (0, n)))]

    return Layout(shape=lambda size: (rows, _share(columns, size, name)), slices=slices)


def vocabulary(name: str, vocab_size: int, padded_size: int, hidden_size: int) -> Layout:
    """Layout with the rows of the padded vocabulary split over the ranks; no Hugging Face tensor has padding rows."""

    def slices(rank: int, size: int) -> list[Slice]:
        n = _share(padded_size, size, name)
        start, stop = rank * n, min((rank + 1) * n, vocab_size)
        return [_rows(name, start, 0, stop - start, (hidden_size,))] if stop > start else []

    return Layout(shape=lambda size: (_share(padded_size, size, name), hidden_size), slices=slices)


def gated(gate: str, up: str, rows: int, *rest: int) -> Layout:
    """Layout with the rows of gate and up split over the ranks, stacked as [gate; up] in each shard."""

    def slices(rank: int, size: int) -> list[Slice]:
        n = _share(rows, size, gate)
        return [_rows(gate, rank * n, 0, n, rest), _rows(up, rank * n, n, n, rest)]

    return Layout(shape=lambda size: (2 * _share(rows, size, gate), *rest), slices=slices)


def grouped_qkv(q: str, k: str, v: str, heads: int, groups: int, head_dim: int, *rest: int) -> Layout:
    """Layout with the query groups split over the ranks; each group has its query heads, then its key, then its value.

    Args:
        q, k, v: names of the Hugging Face tensors.
        heads: number of query heads.
        groups: number of query groups (key-value heads).
        rest: input features; empty for biases.
    """
    queries = heads // groups * head_dim

    def slices(rank: int, size: int) -> list[Slice]:
        n, found, shard_row = _share(groups, size, q), [], 0
        for group in range(rank * n, (rank + 1) * n):
            for name, start, length in (
                (q, group * queries, queries),
                (k, group * head_dim, head_dim),
                (v, group * head_dim, head_dim),
            ):
                found.append(_rows(name, start, shard_row, length, rest))
                shard_row += length
        return found

    def shape(size: int) -> tuple[int, ...]:
        return (_share(groups, size, q) * (queries + 2 * head_dim), *rest)

    return Layout(shape=shape, slices=slices)


def fill_shard(shard: Tensor, slices: Iterable[Slice], read: Callable[[str, Index], Tensor]) -> None:
    """Copy every slice into a shard; ``read(name, index)`` returns those elements of a Hugging Face tensor."""
    for piece in slices:
        shard[box_index(piece.shard_box)].copy_(read(piece.hf_name, box_index(piece.hf_box)))


def layer_of(hf_name: str) -> str:
    """Name prefix of a tensor's layer (``model.layers.3``); the whole name for tensors outside the layers."""
    parts = hf_name.split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else hf_name


def hf_shapes(table: LayoutTable) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor that a table refers to."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layout in table.values():
        for piece in layout.slices(0, 1):
            stops = tuple(stop for _, stop in piece.hf_box)
            previous = shapes.get(piece.hf_name, stops)
            shapes[piece.hf_name] = tuple(max(a, b) for a, b in zip(previous, stops, strict=True))
    return shapes


def check_each_once(table: LayoutTable) -> None:
    """Check that every element of every Hugging Face tensor maps to exactly one parameter.

    A tied output layer, which repeats the embedding, is exempt.

    Raises:
        ConversionError: an element is mapped twice or not at all; the message names the first such tensor.
    """
    boxes: dict[str, list[Box]] = {}
    for parameter, layout in table.items():
        for piece in layout.slices(0, 1):
            others = boxes.setdefault(piece.hf_name, [])
            if parameter != "output_layer.weight" or not others:
                others.append(piece.hf_box)
    for name, shape in hf_shapes(table).items():
        mapped, size = sum(map(box_size, boxes[name])), prod(shape)
        if mapped != size:
            raise ConversionError(
                f"{name} has {size} elements, but the layout table maps {mapped}: "
                f"{'some twice' if mapped > size else 'some not at all'}. Fix the model family in megatron_rl/models/."
            )


def _rows(name: str, hf_start: int, shard_start: int, length: int, rest: tuple[int, ...]) -> Slice:
    tail = tuple((0, n) for n in rest)
    return Slice(name, ((hf_start, hf_start + length), *tail), ((shard_start, shard_start + length), *tail))


def _share(total: int, size: int, name: str) -> int:
    if total % size:
        raise ConversionError(
            f"{name}: {total} is not divisible by tensor parallel size {size}. "
            f"Set parallel.tensor_parallel_size to a divisor of {total}."
        )
    return total // size
