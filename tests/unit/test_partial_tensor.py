"""A PartialTensor, which holds one box of a tensor, behaves as if all other elements were NaN."""

import itertools

import pytest
import torch
from torch import Tensor

from megatron_rl.weight_sync.partial_tensor import PartialTensor
from megatron_rl.weights.layout import Box, box_index

WHOLE = torch.arange(48.0).reshape(8, 6)
BOXES: list[Box] = [
    ((2, 6), (0, 6)),
    ((0, 8), (2, 4)),
    ((2, 4), (1, 5)),
    ((3, 3), (0, 6)),
    ((8, 8), (0, 6)),
]


def partial(box: Box) -> tuple[PartialTensor, Tensor]:
    """Return a partial tensor and the full tensor that it represents."""
    expected = torch.full_like(WHOLE, float("nan"))
    expected[box_index(box)] = WHOLE[box_index(box)]
    return PartialTensor(WHOLE[box_index(box)], box, WHOLE.shape), expected


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert torch.equal(actual.clone().nan_to_num(7e7), expected.nan_to_num(7e7))


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_a_slice_of_the_held_box_is_a_view(box: Box) -> None:
    tensor, _ = partial(box)
    view = tensor[box_index(box)]
    assert not isinstance(view, PartialTensor)
    assert torch.equal(view, WHOLE[box_index(box)])
    assert view.numel() == 0 or view.data_ptr() == WHOLE[box_index(box)].data_ptr()


@pytest.mark.parametrize("mode", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_any_slice_equals_that_of_the_full_tensor(box: Box, mode: bool) -> None:
    tensor, expected = partial(box)
    with torch.inference_mode(mode):
        for start, stop in itertools.product(range(-9, 10), repeat=2):
            assert_same(tensor[start:stop], expected[start:stop])
            assert_same(tensor[:, start:stop], expected[:, start:stop])
            assert_same(tensor[1:7, start:stop], expected[1:7, start:stop])
        for start in range(8):
            for length in range(9 - start):
                assert_same(tensor.narrow(0, start, length), expected.narrow(0, start, length))
        assert_same(tensor.narrow(-1, -2, 1), expected.narrow(-1, -2, 1))


@pytest.mark.parametrize(
    "operation",
    [
        lambda one: one.data,
        lambda one: one.detach()[1:],
        lambda one: one.to(torch.float64),
        lambda one: one.t(),
        lambda one: one.flatten(),
        lambda one: torch.cat([one, WHOLE]),
        lambda one: one[3],
        lambda one: one[::2],
        lambda one: one.chunk(2)[1],
        lambda one: torch.zeros(8, 6).copy_(one),
        lambda one: one.add_(1),
    ],
)
@pytest.mark.parametrize("box", BOXES, ids=str)
def test_other_operations_act_on_the_full_tensor(box: Box, operation: object) -> None:
    tensor, expected = partial(box)
    assert callable(operation)
    assert_same(operation(tensor), operation(expected))
    assert_same(tensor, expected)  # also after in-place operations
