"""Shared fixtures."""

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# OpenMP threads that spin on contended cores cost more time than they save; must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that requests anything from the hub fails

import pytest

from tests.durations import Durations
from tests.gang import Gang
from tests.toys import write_model


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--engine``, the engine that the tests of tests/engines run on, and ``--durations-table``."""
    parser.addoption("--engine", choices=("embedded", "vllm", "sglang"), default="embedded")
    parser.addoption("--durations-table", type=Path, help="write a table of where the time goes, by file")


def pytest_configure(config: pytest.Config) -> None:
    """Measure durations where a table is asked for."""
    if table := config.getoption("--durations-table"):
        config.pluginmanager.register(Durations(table))


# files that take longest, about in the order of their seconds: they come first, so that all workers end together
LONGEST = [
    "distributed/test_layouts",
    "e2e/test_interruptions",
    "distributed/test_checkpoint",
    "distributed/test_reward_model",
    "e2e/test_torchrun",
    "distributed/test_sampling",
    "distributed/test_invariance",
    "distributed/test_lora",
    "distributed/test_critic",
    "distributed/test_plan",
    "e2e/test_evaluate",
    "e2e/test_checkpoint_tools",
    "e2e/test_command",
    "distributed/test_weight_transfer",
    "engines/test_with_policy",
    "distributed/test_benchmarks",
    "unit/test_rewards",
    "unit/test_sandbox",
    "distributed/test_large_layouts",
    "distributed/test_conversion",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files by how long they take."""
    first = {f"tests/{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.nodeid.partition("::")[0], len(first)))


def pytest_report_header() -> str:
    """Return the versions of Megatron-Core and torch for the header of the report."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("megatron-core", "torch"))


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from a family and options to the folder of such a model; each model is written once."""
    folders: dict[str, Path] = {}

    def get(family: str = "qwen2", *, tied: bool = True, **sizes: int) -> Path:
        key = f"{family}-{'tied' if tied else 'untied'}-{'-'.join(f'{k}{v}' for k, v in sizes.items())}"
        if key not in folders:
            folders[key] = write_model(tmp_path_factory.mktemp("models") / key, family, tied=tied, **sizes)
        return folders[key]

    return get


@pytest.fixture(scope="session")
def gangs() -> Iterator[Callable[[int], Gang]]:
    """Return a function from a number of ranks to a gang of that size; each gang is started once."""
    started: dict[int, Gang] = {}

    def get(world_size: int) -> Gang:
        if world_size in started and not started[world_size].is_open:
            started.pop(world_size).close()
        if world_size not in started:
            started[world_size] = Gang(world_size)
        return started[world_size]

    yield get
    for gang in started.values():
        gang.close()
