"""Device memory in each phase of a step, and host memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from megatron_rl.config.parallel import ParallelSection
from megatron_rl.config.schema import RunConfig
from megatron_rl.models.spec import ModelSpec
from megatron_rl.planning.activations import FP32_BYTES, element_bytes
from megatron_rl.planning.hardware import Hardware
from megatron_rl.planning.memory import ModelMemory, model_memory
from megatron_rl.planning.reference import ReferencePlacement, reference_placement
from megatron_rl.planning.shares import stage_shares
from megatron_rl.planning.workload import Workload

ENGINE_SHARE = {"vllm": 0.92, "sglang": 0.85}
"""Approximate share of a device's memory that an engine takes unless rollout.engine_options sets it."""
ENGINE_SHARE_OPTIONS = {"vllm": "gpu_memory_utilization", "sglang": "mem_fraction_static"}
ENGINE_WORKSPACE_BYTES = 2e9
"""Assumed bytes that a GPU engine needs for its forward passes, beside weights and cache."""
WORKER_HOST_BYTES = 0.3e9
"""Assumed host memory of a reward worker."""

Parts = Mapping[str, float]
"""What holds memory -> bytes."""


@dataclass(frozen=True, kw_only=True)
class Specs:
    """The specifications of the models of a run."""

    policy: ModelSpec
    critic: ModelSpec | None = None
    reference: ModelSpec | None = None
    reward_model: ModelSpec | None = None


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes of an engine on one of its ranks."""

    weights: float
    cache: float
    workspace: float
    cache_tokens: float
    """Tokens whose keys and values fit into the engine's cache, all of its ranks together."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of the fullest rank and of its host."""

    stage: int
    phases: Mapping[str, Parts]
    """Phase of a step -> memory of the rank's device."""
    host: Parts
    engine: EngineMemory

    def total(self, phase: str) -> float:
        """Bytes of the device in a phase."""
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        """The phase that needs most memory."""
        return max(self.phases, key=self.total)


def rank_memory(specs: Specs, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int) -> RankMemory:
    """Return the memory of a rank of the pipeline stage that needs most."""
    policy = model_memory(specs.policy, config, workload, world_size)
    critic = None
    if specs.critic is not None:
        critic_config = config.for_critic()
        per_stage = model_memory(specs.critic, critic_config, workload, world_size, "value")
        critic = max(per_stage, key=lambda model: sum(model.parts.values()) + model.activations)
    engine = engine_memory(specs.policy, config, workload, hardware, world_size)
    ranks = [
        RankMemory(
            stage=stage,
            phases=_phases(specs, config, model, critic, engine, hardware),
            host=_host(specs, config, model, critic, hardware, world_size),
            engine=engine,
        )
        for stage, model in enumerate(policy)
    ]
    return max(ranks, key=lambda rank: rank.total(rank.fullest))


def engine_memory(
    spec: ModelSpec, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int
) -> EngineMemory:
    """Return the memory of an engine; all zero if the run uses none."""
    rollout, size = config.rollout, element_bytes(config)
    if rollout.source != "engine" and config.data.validation is None and config.benchmarks.suite is None:
        return EngineMemory(weights=0.0, cache=0.0, workspace=0.0, cache_tokens=0.0)
    tp = rollout.tensor_parallel_size
    weights = num_parameters(spec) * size / tp
    per_token = token_cache_bytes(spec, config)
    if rollout.engine == "embedded":
        sequences = min(rollout.max_num_sequences, ceil(workload.num_prompts * workload.group_size / world_size))
        tokens = float(sequences * workload.longest)
        # the cache is copied once when sequences join or leave the batch
        return EngineMemory(
            weights=weights, cache=2 * tokens * per_token, workspace=4.0 * FP32_BYTES * sequences * spec.vocab_size,
            cache_tokens=tokens,
        )  # fmt: skip
    share = float(rollout.engine_options.get(ENGINE_SHARE_OPTIONS[rollout.engine], ENGINE_SHARE[rollout.engine]))
    cache = max(0.0, share * hardware.device_gb * 1e9 - weights - ENGINE_WORKSPACE_BYTES)
    if hardware.engine_cache_gb is not None:
        cache = hardware.engine_cache_gb * 1e9
    bytes_per_token = max(1.0, per_token / min(tp, spec.num_query_groups))
    return EngineMemory(
        weights=weights, cache=cache, workspace=ENGINE_WORKSPACE_BYTES, cache_tokens=cache / bytes_per_token
    )


def num_parameters(spec: ModelSpec) -> int:
    """Number of weight elements of the whole model."""
    return stage_shares(spec, ParallelSection())[0].total


def token_cache_bytes(spec: ModelSpec, config: RunConfig) -> float:
    """Bytes of the keys and values of a token in all layers."""
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
    constant: dict[str, float] = {"contexts and libraries": hardware.base_gb * 1e9}
    beside_policy = specs.reference if _reference_placement(specs, config) == "device" else None
    for name, spec in (("reference", beside_policy), ("reward model", specs.reward_model)):
        if spec is not None:
            shares = stage_shares(spec, config.parallel)
            constant[name] = max(share.total for share in shares) * float(element_bytes(config))
    trained_models = {"policy": policy} | ({"critic": critic} if critic is not None else {})
    trainer_state = {
        f"{name} {part}": size for name, model in trained_models.items() for part, size in model.parts.items()
    }
    resident = {name: size for name, size in trainer_state.items() if name.split()[-1] not in offload}
    during_push = resident | {"policy params": policy.weights}
    engine_awake = {
        "engine weights": engine.weights,
        "engine cache": engine.cache,
        "engine workspace": engine.workspace,
    }
    engine_beside_update = {} if config.rollout.sleep_engine else engine_awake
    transfer_buffers = {"transfer buffers": 2.0 * config.weight_sync.bucket_mb * 2**20} if engine.weights else {}
    phases = {
        "push": {**constant, **during_push, **engine_awake, **transfer_buffers},
        "generation": {**constant, **resident, **engine_awake},
        "log-probabilities": {**constant, **trainer_state, **engine_beside_update, "activations": policy.forward_only},
        "update": {**constant, **trainer_state, **engine_beside_update, "activations": policy.activations},
    }
    if critic is not None:
        phases["critic"] = {**constant, **trainer_state, **engine_beside_update, "activations": critic.activations}
    return {
        phase: {**parts, "fragmentation": hardware.fragmentation * parts.get("activations", 0.0)}
        for phase, parts in phases.items()
    }


def _reference_placement(specs: Specs, config: RunConfig) -> ReferencePlacement:
    return reference_placement(config, is_alike=specs.reference in (None, specs.policy))


def _host(
    specs: Specs,
    config: RunConfig,
    policy: ModelMemory,
    critic: ModelMemory | None,
    hardware: Hardware,
    world_size: int,
) -> Parts:
    num_ranks = min(world_size, hardware.ranks_per_node)
    offload = set(config.memory.offload) - {"grads"}
    offloaded = sum(
        size for model in (policy, critic) if model is not None for part, size in model.parts.items() if part in offload
    )
    saved = sum(model.weights + model.optimizer for model in (policy, critic) if model is not None)
    parts = {
        "processes": num_ranks * hardware.process_gb * 1e9,
        "offloaded": num_ranks * offloaded,
        # its weights, and a buffer for the policy's while the two are swapped
        "reference": 2 * num_ranks * policy.weights * (_reference_placement(specs, config) == "host"),
        "optimizer on the host": num_ranks * policy.optimizer_on_host,
        "checkpoint in background": num_ranks * saved * config.checkpoint.in_background,
        "reward workers": num_ranks * config.reward.num_workers * WORKER_HOST_BYTES,
    }
    return {name: size for name, size in parts.items() if size}
