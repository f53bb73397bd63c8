"""Construction of an engine by name."""

import uuid
from typing import Literal

from megatron_rl.distributed.collectives import gather_objects
from megatron_rl.rollout.engines.base import Engine, EngineSetup
from megatron_rl.rollout.engines.embedded import EmbeddedEngine
from megatron_rl.rollout.engines.sampling import sample_seed
from megatron_rl.rollout.engines.sglang import SglangEngine
from megatron_rl.rollout.engines.vllm import VllmEngine
from megatron_rl.types import ParallelContext

EngineName = Literal["embedded", "vllm", "sglang"]


def start_engine(
    name: EngineName, setup: EngineSetup, parallel: ParallelContext, *, seed: int, reports_routing: bool = False
) -> Engine:
    """Start this rank's engine, without weights; collective.

    Args:
        name: value of ``rollout.engine``.
        setup: arguments of every engine.
        parallel: layout of this rank.
        seed: seed of the run.
        reports_routing: report the experts of every token; only with the embedded engine.

    Raises:
        EngineError: the engine is not installed, does not start, or cannot compute the model.
    """
    match name:
        case "vllm":
            return VllmEngine(setup, identity=gather_objects(uuid.uuid4().hex[:8], parallel)[0])
        case "sglang":
            return SglangEngine(setup, seed=sample_seed(seed, setup.place.index) % 2**31)
        case "embedded":
            return EmbeddedEngine(setup, reports_routing=reports_routing)
