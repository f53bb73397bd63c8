"""Skips the tests of this folder, with a reason, where a GPU or Transformer Engine is missing."""

import pytest
import torch

from megatron_rl.mcore.model.precision import transformer_engine_version


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in str(item.path):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
            elif item.get_closest_marker("transformer_engine") and transformer_engine_version() is None:
                item.add_marker(pytest.mark.skip(reason="needs Transformer Engine with its PyTorch bindings"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "transformer_engine: needs Transformer Engine and a GPU")
