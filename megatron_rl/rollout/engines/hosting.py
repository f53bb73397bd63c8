"""What vLLM and SGLang have in common: how they are started, and how they say that a request ended."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch

from megatron_rl.errors import EngineError
from megatron_rl.types import FinishReason

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


def finish_reason(said: str) -> FinishReason:
    """Our name of an engine's reason.

    Raises:
        EngineError: there is none.
    """
    if said not in _FINISH_REASONS:
        raise EngineError(f"the engine ended a request with {said!r}, expected one of {list(_FINISH_REASONS)}.")
    return _FINISH_REASONS[said]


@contextmanager
def surroundings(variables: Mapping[str, str], without: Collection[str] = ()) -> Iterator[None]:
    """Environment for the time of an engine's start; what it changes in the process is put back.

    Args:
        variables: to be set.
        without: beginnings of names that the engine must not see.
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
