"""Which engine the tests are held against."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_rl.models import read_model_spec
from megatron_rl.rollout.engine import Engine
from megatron_rl.rollout.engines.embedded import EmbeddedEngine
from megatron_rl.rollout.engines.sglang import SglangEngine
from megatron_rl.rollout.engines.vllm import VllmEngine
from tests.engines.contract import ALONE


@pytest.fixture(scope="session")
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--engine"))


@pytest.fixture(scope="session")
def engine_of(engine_name: str) -> Iterator[Callable[..., Engine]]:
    """A function from a model folder to an engine with its weights at version 3; one lives at a time."""
    living: dict[tuple[Path, int], Engine] = {}

    def get(folder: Path, max_num_sequences: int = 64) -> Engine:
        key = (folder, max_num_sequences)
        if key not in living:
            for other in list(living):
                living.pop(other).close()
            living[key] = START[engine_name](folder, max_num_sequences)
        living[key].load_weights(iter(load_file(folder / "model.safetensors").items()), version=3)
        return living[key]

    yield get
    for engine in living.values():
        engine.close()


def start_embedded(folder: Path, max_num_sequences: int) -> Engine:
    return EmbeddedEngine(
        read_model_spec(folder),
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_num_sequences=max_num_sequences,
        place=ALONE,
    )


def start_vllm(folder: Path, max_num_sequences: int) -> Engine:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return VllmEngine(
        str(folder),
        read_model_spec(folder),
        place=ALONE,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_num_sequences=max_num_sequences,
        max_model_len=512,
        rank=0,
        local_rank=0,
        identity="tests",
        options={},
    )


def start_sglang(folder: Path, max_num_sequences: int) -> Engine:
    return SglangEngine(
        str(folder),
        read_model_spec(folder),
        place=ALONE,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_num_sequences=max_num_sequences,
        max_model_len=512,
        local_rank=0,
        seed=0,
        options={},
    )


START = {"embedded": start_embedded, "vllm": start_vllm, "sglang": start_sglang}
