"""The engine under test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_rl.rollout.engines.base import Engine, EngineSetup
from megatron_rl.rollout.engines.embedded import EmbeddedEngine
from megatron_rl.rollout.engines.sglang import SglangEngine
from megatron_rl.rollout.engines.vllm import VllmEngine
from tests.engines.contract import setup_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize ``engine_tp``; the embedded engine holds the whole model on every rank."""
    if "engine_tp" in metafunc.fixturenames:
        metafunc.parametrize("engine_tp", [1] if metafunc.config.getoption("--engine") == "embedded" else [1, 2])


@pytest.fixture(scope="session")
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--engine"))


@pytest.fixture(scope="module")
def engine_of(engine_name: str) -> Iterator[Callable[..., Engine]]:
    """Return a function from a model folder to an engine with its weights at version 3; one engine exists at a time."""
    engines: dict[tuple[Path, int], Engine] = {}

    def get(folder: Path, max_num_sequences: int = 64) -> Engine:
        key = (folder, max_num_sequences)
        if key not in engines:
            for other in list(engines):
                engines.pop(other).close()
            engines[key] = START[engine_name](setup_of(folder, max_num_sequences))
        engines[key].load_weights(iter(load_file(folder / "model.safetensors").items()), version=3)
        return engines[key]

    yield get
    for engine in engines.values():
        engine.close()


def start_vllm(setup: EngineSetup) -> Engine:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return VllmEngine(setup, identity="tests")


START: dict[str, Callable[[EngineSetup], Engine]] = {
    "embedded": EmbeddedEngine,
    "vllm": start_vllm,
    "sglang": lambda setup: SglangEngine(setup, seed=0),
}
