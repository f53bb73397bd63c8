"""Tensors of which only one box is in memory."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from megatron_rl.weights.layout import Box, box_index, full_box


class PartialTensor(Tensor):
    """A tensor of which one box is in memory; all other elements are NaN.

    An engine's loader narrows each tensor to its own shard, which is a view of that box. Any other operation
    materializes the whole tensor, which then stays in memory.
    """

    _part: Tensor
    _box: Box

    @staticmethod
    def __new__(cls, part: Tensor, box: Box, shape: Sequence[int]) -> Self:
        """
        Args:
            part: the elements of the box.
            box: position of the elements in the whole tensor; may be empty.
            shape: shape of the whole tensor.
        """
        # in inference mode, torch rejects an inference tensor as a view of another tensor
        with torch.inference_mode(mode=False):
            tensor: Self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=part.dtype, device=part.device)
        tensor._part, tensor._box = part, box
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PartialTensor({tuple(self.shape)}, box={self._box})"

    def whole(self) -> Tensor:
        """Materialize this tensor and return it as an ordinary tensor that shares its memory."""
        if self._part.shape != self.shape:
            self._part, self._box = self._filled(), full_box(self.shape)
        return self._part

    def _filled(self) -> Tensor:
        with torch.inference_mode(mode=False):
            filled = self._part.new_full(self.shape, float("nan"))
            filled[box_index(self._box)] = self._part
        return filled

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares this method without types
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, cls):
            if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
                return cls(first._part, first._box, first.shape)
            if func is torch.ops.aten.clone.default:
                return first._filled()
            if func is torch.ops.aten.slice.Tensor and (len(args) < 5 or args[4] == 1):
                given = list(args[1:4])  # trailing defaults are left out
                dim, start, stop = given + [0, None, None][len(given) :]
                return first._narrowed(dim, *slice(start, stop).indices(first.size(dim))[:2])
            if func is torch.ops.aten.narrow.default:  # in inference mode torch does not decompose it into a slice
                dim, start, length = args[1:]
                start += first.size(dim) if start < 0 else 0
                if 0 <= start <= start + length <= first.size(dim):  # otherwise torch raises its own error
                    return first._narrowed(dim, start, start + length)
        whole: Callable[[Any], Any] = cls.whole
        args, kwargs = tree_map_only(cls, whole, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def _narrowed(self, dim: int, start: int, stop: int) -> Tensor:
        """Elements from start to stop in a dimension; an ordinary tensor if all of them are in memory."""
        dim %= self.ndim
        stop = max(start, stop)
        low, high = self._box[dim]
        kept = (min(max(low, start), stop), max(min(high, stop), start))
        if kept[0] >= kept[1]:
            kept = (low, low)
        part = self._part.narrow(dim, kept[0] - low, kept[1] - kept[0])
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        if part.shape == torch.Size(shape):
            return part
        begin = max(kept[0] - start, 0)
        box = (*self._box[:dim], (begin, begin + part.size(dim)), *self._box[dim + 1 :])
        return PartialTensor(part, box, shape)
