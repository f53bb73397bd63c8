"""Offload to the host, and the hosted reference."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.gang import Gang
from tests.toys import toy_config


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offload_frees_all_storages(
    dtype: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = toy_config(
        tmp_path,
        toy_model("qwen2", tied=True),
        f"model.dtype={dtype}",
        "parallel.pipeline_parallel_size=2",
        "memory.offload=[params,grads,optimizer]",
    )
    for moved in gangs(4).call(cases.offload, config=config):
        assert moved.freed_bytes == moved.held_bytes > 0
        assert moved.left_bytes == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_hosted_reference_equals_a_separate_model(
    dtype: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy_model("qwen3", tied=False)
    config = toy_config(
        tmp_path,
        model,
        f"model.dtype={dtype}",
        "parallel.tensor_parallel_size=2",
        "parallel.pipeline_parallel_size=2",
    )
    for same, distance, restored in gangs(4).call(cases.compare_hosted_reference, config=config, path=str(model)):
        assert same
        assert distance > 1e-4
        assert restored
