"""Helpers for vLLM and SGLang: dtype names, finish reasons, and the environment in which they start."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch

from megatron_rl.errors import EngineError
from megatron_rl.types import FinishReason

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


def finish_reason(reason: str) -> FinishReason:
    """Return the finish reason for the one that an engine reports.

    Raises:
        EngineError: the reason is unknown.
    """
    if reason not in _FINISH_REASONS:
        raise EngineError(f"the engine reported the finish reason {reason!r}, expected one of {list(_FINISH_REASONS)}.")
    return _FINISH_REASONS[reason]


@contextmanager
def temporary_environment(variables: Mapping[str, str], without: Collection[str] = ()) -> Iterator[None]:
    """Set environment variables during the body, in which an engine starts, and restore the process state after it.

    The environment, torch's CPU random state and ``torch.set_num_threads`` are restored.

    Args:
        variables: environment variables to set.
        without: prefixes of the names of environment variables to remove.
    """
    before, random_state, set_num_threads = dict(os.environ), torch.get_rng_state(), torch.set_num_threads
    for name in [name for name in before if name.startswith(tuple(without))]:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.set_rng_state(random_state)
        torch.set_num_threads = set_num_threads
