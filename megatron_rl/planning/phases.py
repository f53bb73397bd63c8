"""Who holds how much of a device in each phase of a step, and of a host."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from megatron_rl.config.parallel import ParallelSection
from megatron_rl.config.schema import RunConfig
from megatron_rl.models.spec import ModelSpec
from megatron_rl.planning.activations import FLOAT, element_bytes
from megatron_rl.planning.hardware import Hardware
from megatron_rl.planning.memory import ModelMemory, model_memory
from megatron_rl.planning.reference import Where, place_of_reference
from megatron_rl.planning.shares import stage_shares
from megatron_rl.planning.workload import Workload

ENGINE_SHARE = {"vllm": 0.92, "sglang": 0.85}
"""Of a device's memory that an engine takes unless rollout.engine_options says otherwise, about."""
OPTIONS = {"vllm": "gpu_memory_utilization", "sglang": "mem_fraction_static"}
ENGINE_WORK = 2e9
"""Bytes that an engine of the GPU needs for its passes, beside weights and cache; an assumption."""
WORKER_HOST_BYTES = 0.3e9
"""Of a reward worker on its host; an assumption."""

Parts = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Specs:
    """The models of a run, on paper."""

    policy: ModelSpec
    critic: ModelSpec | None = None
    reference: ModelSpec | None = None
    reward_model: ModelSpec | None = None


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes of a rank's part of an engine."""

    weights: float
    cache: float
    work: float
    cache_tokens: float
    """Tokens whose keys and values fit, over all ranks of the engine."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes by phase and holder, of the rank that has least room, and bytes of its host."""

    stage: int
    phases: Mapping[str, Parts]
    host: Parts
    engine: EngineMemory

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        return max(self.phases, key=self.total)


def rank_memory(specs: Specs, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int) -> RankMemory:
    """Of the stage that needs most."""
    policy = model_memory(specs.policy, config, workload, world_size)
    critic = None
    if specs.critic is not None:
        own = config.for_critic()
        per_stage = model_memory(specs.critic, own, workload, world_size, "value")
        critic = max(per_stage, key=lambda one: sum(one.parts.values()) + one.activations)
    engine = engine_memory(specs.policy, config, workload, hardware, world_size)
    found = [
        RankMemory(
            stage=stage,
            phases=_phases(specs, config, one, critic, engine, hardware),
            host=_host(specs, config, one, critic, hardware, world_size),
            engine=engine,
        )
        for stage, one in enumerate(policy)
    ]
    return max(found, key=lambda one: one.total(one.fullest))


def engine_memory(
    spec: ModelSpec, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int
) -> EngineMemory:
    """What an engine takes; nothing where none is used."""
    rollout, size = config.rollout, element_bytes(config)
    if rollout.source != "engine" and config.data.validation is None and config.benchmarks.suite is None:
        return EngineMemory(weights=0.0, cache=0.0, work=0.0, cache_tokens=0.0)
    tp = rollout.tensor_parallel_size
    weights = num_parameters(spec) * size / tp
    per_token = token_cache_bytes(spec, config)
    if rollout.engine == "embedded":
        sequences = min(rollout.max_num_sequences, ceil(workload.num_prompts * workload.group_size / world_size))
        tokens = float(sequences * workload.longest)
        # rows that join or leave are copied once
        return EngineMemory(
            weights=weights, cache=2 * tokens * per_token, work=4.0 * FLOAT * sequences * spec.vocab_size,
            cache_tokens=tokens,
        )  # fmt: skip
    share = float(rollout.engine_options.get(OPTIONS[rollout.engine], ENGINE_SHARE[rollout.engine]))
    cache = max(0.0, share * hardware.device_gb * 1e9 - weights - ENGINE_WORK)
    if hardware.engine_cache_gb is not None:
        cache = hardware.engine_cache_gb * 1e9
    held = max(1.0, per_token / min(tp, spec.num_query_groups))
    return EngineMemory(weights=weights, cache=cache, work=ENGINE_WORK, cache_tokens=cache / held)


def num_parameters(spec: ModelSpec) -> int:
    """Of the whole model."""
    return stage_shares(spec, ParallelSection())[0].total


def token_cache_bytes(spec: ModelSpec, config: RunConfig) -> float:
    """Keys and values of a token in all layers."""
    return 2.0 * spec.num_layers * spec.num_query_groups * spec.head_dim * element_bytes(config)


def _phases(
    specs: Specs,
    config: RunConfig,
    policy: ModelMemory,
    critic: ModelMemory | None,
    engine: EngineMemory,
    hardware: Hardware,
) -> dict[str, Parts]:
    offload = set(config.memory.offload)
    others: dict[str, float] = {"contexts and libraries": hardware.base_gb * 1e9}
    beside_policy = specs.reference if _reference_place(specs, config) == "device" else None
    for name, spec in (("reference", beside_policy), ("reward model", specs.reward_model)):
        if spec is not None:
            shares = stage_shares(spec, config.parallel)
            others[name] = max(share.total for share in shares) * float(element_bytes(config))
    learners = {"policy": policy} | ({"critic": critic} if critic is not None else {})
    held = {f"{name} {part}": size for name, one in learners.items() for part, size in one.parts.items()}
    lent = {name: size for name, size in held.items() if name.split()[-1] not in offload}
    pushing = lent | {"policy params": policy.weights}
    awake = {"engine weights": engine.weights, "engine cache": engine.cache, "engine work": engine.work}
    beside = {} if config.rollout.sleep_engine else awake
    bucket = {"transfer buffers": 2.0 * config.weight_sync.bucket_mb * 2**20} if engine.weights else {}
    phases = {
        "push": {**others, **pushing, **awake, **bucket},
        "generation": {**others, **lent, **awake},
        "log-probabilities": {**others, **held, **beside, "activations": policy.scoring},
        "update": {**others, **held, **beside, "activations": policy.activations},
    }
    if critic is not None:
        phases["critic"] = {**others, **held, **beside, "activations": critic.activations}
    return {
        phase: {**parts, "kept by the allocator": hardware.fragmentation * parts.get("activations", 0.0)}
        for phase, parts in phases.items()
    }


def _reference_place(specs: Specs, config: RunConfig) -> Where:
    return place_of_reference(config, is_alike=specs.reference in (None, specs.policy))


def _host(
    specs: Specs,
    config: RunConfig,
    policy: ModelMemory,
    critic: ModelMemory | None,
    hardware: Hardware,
    world_size: int,
) -> Parts:
    ranks = min(world_size, hardware.ranks_per_node)
    offload = set(config.memory.offload) - {"grads"}
    moved = sum(
        size for one in (policy, critic) if one is not None for part, size in one.parts.items() if part in offload
    )
    saved = sum(one.weights + one.optimizer for one in (policy, critic) if one is not None)
    parts = {
        "processes": ranks * hardware.process_gb * 1e9,
        "offloaded": ranks * moved,
        # its weights, and room for the policy's while it has their place
        "reference": 2 * ranks * policy.weights * (_reference_place(specs, config) == "host"),
        "optimizer on the host": ranks * policy.optimizer_on_host,
        "checkpoint in background": ranks * saved * config.checkpoint.in_background,
        "reward workers": ranks * config.reward.num_workers * WORKER_HOST_BYTES,
    }
    return {name: size for name, size in parts.items() if size}
