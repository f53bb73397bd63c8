"""Reads of boxes of tensors from the memory of a process, here the reading process itself."""

import subprocess
import sys

import pytest
import torch

from megatron_rl.errors import WeightSyncError
from megatron_rl.weight_sync import host_memory
from megatron_rl.weight_sync.host_memory import RemoteTensor
from megatron_rl.weights.layout import Box, box_index, box_shape

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process_vm_readv exists only on Linux")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "box",
    [((0, 3000), (0, 6)), ((10, 2900), (0, 6)), ((5, 2999), (2, 5)), ((7, 8), (1, 4)), ((4, 4), (0, 6))],
    ids=str,
)
@pytest.mark.parametrize("is_strided", [False, True], ids=["into a tensor", "into a part of one"])
def test_a_box_of_a_matrix_is_read(
    box: Box, dtype: torch.dtype, is_strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "MAX_BYTES", 1000)
    source = torch.arange(3000 * 6).reshape(3000, 6).to(dtype)
    rows, columns = box_shape(box)
    padded = torch.zeros(rows, columns + 3, dtype=dtype)
    into = padded[:, 1 : columns + 1] if is_strided else torch.zeros(rows, columns, dtype=dtype)
    RemoteTensor.of(source).read(box, into)
    assert torch.equal(into, source[box_index(box)])
    assert not padded[:, 0].any()
    assert not padded[:, columns + 1 :].any()


def test_a_range_of_a_vector_is_read() -> None:
    source, into = torch.arange(9.0), torch.zeros(4)
    RemoteTensor.of(source).read(((2, 6),), into)
    assert into.tolist() == [2, 3, 4, 5]


def test_reading_from_an_ended_process_raises() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(WeightSyncError, match=f"process {ended.pid} of this host could not be read"):
        RemoteTensor(ended.pid, 4096, (4,)).read(((0, 2),), torch.zeros(2))
