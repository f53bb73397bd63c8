"""What is moved to the host, swapped or never held."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.gang import Gang
from tests.toys import toy_config


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offloaded_parts_leave_nothing_behind(
    dtype: str, gangs: Callable[[int], Gang], toy_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = toy_config(
        tmp_path,
        toy_model("qwen2", tied=True),
        f"model.dtype={dtype}",
        "parallel.pipeline_parallel_size=2",
        "memory.offload=[params,grads,optimizer]",
    )
    for found in gangs(4).call(cases.offload, config=config):
        assert found.freed_bytes == found.held_bytes > 0
        assert found.left_bytes == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_hosted_reference_scores_like_a_model_of_its_own(
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
    for same, distance, back in gangs(4).call(cases.reference_in_place, config=config, path=str(model)):
        assert same
        assert distance > 1e-4
        assert back
