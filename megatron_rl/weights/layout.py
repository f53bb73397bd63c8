"""The layout table: a Megatron tensor-parallel shard is a list of boxes of Hugging Face tensors.

A box is one (start, stop) pair per dimension. A layout answers (tp_rank, tp_size) with the slices
of that shard; loading, exporting and weight transfer all follow from these slices.
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
    """One copy between a shard and a Hugging Face tensor; both boxes have the same shape."""

    hf_name: str
    hf_box: Box
    shard_box: Box


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one Megatron parameter is made of Hugging Face tensors."""

    shape: Callable[[int], tuple[int, ...]]
    """tp_size -> shape of a shard."""
    slices: Callable[[int, int], list[Slice]]
    """(tp_rank, tp_size) -> the slices of that shard."""
    replicated: bool = False
    """Every tensor-parallel rank holds the whole parameter."""
    expert: bool = False
    """Part of an expert, which is split over the expert-tensor-parallel ranks."""


LayoutTable = Mapping[str, Layout]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands among those that share matrices; experts may be shared by other ranks."""

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
    """All of a tensor."""
    return tuple((0, extent) for extent in shape)


def box_index(box: Box) -> Index:
    """The box as an index of a tensor."""
    return tuple(slice(start, stop) for start, stop in box)


def box_shape(box: Box) -> tuple[int, ...]:
    """Extent in each dimension."""
    return tuple(stop - start for start, stop in box)


def box_size(box: Box) -> int:
    """Number of elements."""
    return prod(box_shape(box))


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes share; None: nothing."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def relative_box(box: Box, outer: Box) -> Box:
    """A box in the coordinates of one around it."""
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))


def moved_box(box: Box, source: Box, target: Box) -> Box:
    """A box inside ``source``, in the coordinates of ``target``, which has the same shape."""
    return tuple(
        (start - a + b, stop - a + b) for (start, stop), (a, _), (b, _) in zip(box, source, target, strict=True)
    )


def replicated(name: str, *shape: int) -> Layout:
    """The whole tensor on every rank."""
    box = full_box(shape)
    return Layout(shape=lambda size: shape, slices=lambda rank, size: [Slice(name, box, box)], replicated=True)


def column(name: str, rows: int, *rest: int) -> Layout:
    """Output features (rows) split over the ranks."""

    def slices(rank: int, size: int) -> list[Slice]:
        n = _share(rows, size, name)
        return [_rows(name, rank * n, 0, n, rest)]

    return Layout(shape=lambda size: (_share(rows, size, name), *rest), slices=slices)


def row(name: str, rows: int, columns: int) -> Layout:
    """Input features (columns) split over the ranks."""

    def slices(rank: int, size: int) -> list[Slice]:
        n = _share(columns, size, name)
        return [Slice(name, ((0, rows), (rank * n, (rank + 1) * n)), ((0, rows), (0, n)))]

    return Layout(shape=lambda size: (rows, _share(columns, size, name)), slices=slices)


def vocabulary(name: str, vocab_size: int, padded_size: int, hidden_size: int) -> Layout:
    """Rows split after padding the vocabulary; padding rows belong to no Hugging Face tensor."""

    def slices(rank: int, size: int) -> list[Slice]:
        n = _share(padded_size, size, name)
        start, stop = rank * n, min((rank + 1) * n, vocab_size)
        return [_rows(name, start, 0, stop - start, (hidden_size,))] if stop > start else []

    return Layout(shape=lambda size: (_share(padded_size, size, name), hidden_size), slices=slices)


def gated(gate: str, up: str, rows: int, *rest: int) -> Layout:
    """[gate; up] stacked inside each shard."""

    def slices(rank: int, size: int) -> list[Slice]:
        n = _share(rows, size, gate)
        return [_rows(gate, rank * n, 0, n, rest), _rows(up, rank * n, n, n, rest)]

    return Layout(shape=lambda size: (2 * _share(rows, size, gate), *rest), slices=slices)


def grouped_qkv(q: str, k: str, v: str, heads: int, groups: int, head_dim: int, *rest: int) -> Layout:
    """For each query group its query heads, its key, its value; groups split over the ranks."""
    queries = heads // groups * head_dim

    def slices(rank: int, size: int) -> list[Slice]:
        n, found, at = _share(groups, size, q), [], 0
        for group in range(rank * n, (rank + 1) * n):
            for name, start, length in (
                (q, group * queries, queries),
                (k, group * head_dim, head_dim),
                (v, group * head_dim, head_dim),
            ):
                found.append(_rows(name, start, at, length, rest))
                at += length
        return found

    def shape(size: int) -> tuple[int, ...]:
        return (_share(groups, size, q) * (queries + 2 * head_dim), *rest)

    return Layout(shape=shape, slices=slices)


def fill_shard(shard: Tensor, slices: Iterable[Slice], read: Callable[[str, Index], Tensor]) -> None:
    """Copy every slice into a shard; ``read(name, index)`` fetches only the wanted elements."""
    for piece in slices:
        shard[box_index(piece.shard_box)].copy_(read(piece.hf_name, box_index(piece.hf_box)))


def layer_of(hf_name: str) -> str:
    """What the tensors of one layer have in common; every other tensor has its own."""
    parts = hf_name.split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else hf_name


def hf_shapes(table: LayoutTable) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor that a table refers to."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layout in table.values():
        for piece in layout.slices(0, 1):
            stops = tuple(stop for _, stop in piece.hf_box)
            known = shapes.get(piece.hf_name, stops)
            shapes[piece.hf_name] = tuple(max(a, b) for a, b in zip(known, stops, strict=True))
    return shapes


def check_each_once(table: LayoutTable) -> None:
    """Every element of every Hugging Face tensor belongs to one parameter, but for a tied output layer.

    Raises:
        ConversionError: naming the first tensor that is mapped twice or in part.
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
                f"{'some twice' if mapped > size else 'some not at all'}. Mend the family in megatron_rl/models/."
            )


def _rows(name: str, hf_start: int, shard_start: int, length: int, rest: tuple[int, ...]) -> Slice:
    tail = tuple((0, n) for n in rest)
    return Slice(name, ((hf_start, hf_start + length), *tail), ((shard_start, shard_start + length), *tail))


def _share(total: int, size: int, name: str) -> int:
    if total % size:
        raise ConversionError(
            f"{name}: {total} does not divide by tensor parallel size {size}. "
            f"Set parallel.tensor_parallel_size to a divisor of {total}."
        )
    return total // size
