"""A plan: whether a configuration fits on a machine, how long a step takes, and what to change."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rl.config.schema import RunConfig
from megatron_rl.config.validate import validate
from megatron_rl.errors import ConfigError
from megatron_rl.models import read_model_spec
from megatron_rl.models.engine_shards import check_engine_size
from megatron_rl.planning.hardware import Hardware
from megatron_rl.planning.phases import RankMemory, Specs, rank_memory
from megatron_rl.planning.time import Seconds, step_seconds
from megatron_rl.planning.workload import Workload, micro_batches_of, workload_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory and time of a run on given hardware."""

    config: RunConfig
    hardware: Hardware
    world_size: int
    workload: Workload
    memory: RankMemory
    seconds: Seconds

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def layout(self) -> str:
        """The parallel sizes as text; CP and EP only if larger than 1."""
        parallel = self.config.parallel
        tp, pp, cp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
        context = f" x CP{cp}" if cp > 1 else ""
        experts = f", EP{parallel.expert_parallel_size}" if parallel.expert_parallel_size > 1 else ""
        return f"TP{tp} x PP{pp}{context} x DP{self.num_replicas}{experts}"

    @property
    def num_replicas(self) -> int:
        """Data-parallel size."""
        parallel = self.config.parallel
        sizes = parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.context_parallel_size
        return self.world_size // sizes

    @property
    def tokens_per_s(self) -> float:
        """Tokens of prompts and responses per second and rank."""
        return self.workload.num_sequences * self.workload.mean / self.step_s / self.world_size

    @property
    def shortfalls(self) -> list[str]:
        """Reasons why the run does not fit; empty if it does."""
        reasons = []
        available, phase = self.hardware.device_gb, self.memory.fullest
        needed = self.memory.total(phase) / 1e9
        if needed > available:
            parts = sorted(self.memory.phases[phase].items(), key=lambda item: -item[1])[:3]
            largest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts)
            reasons.append(f"{phase} needs {needed:.1f} GB of a device's {available:.1f} GB (largest: {largest} GB)")
        engine, longest = self.memory.engine, self.workload.longest
        if engine.weights and engine.cache_tokens < longest:
            reasons.append(
                f"an engine's cache holds {engine.cache_tokens:.0f} tokens, fewer than the longest prompt with its "
                f"response ({longest})"
            )
        host = sum(self.memory.host.values()) / 1e9
        if host > self.hardware.host_gb:
            parts = sorted(self.memory.host.items(), key=lambda item: -item[1])[:2]
            largest = ", ".join(f"{name} {size / 1e9:.0f}" for name, size in parts)
            reasons.append(f"a host needs {host:.0f} GB of its {self.hardware.host_gb:.0f} GB (largest: {largest} GB)")
        return reasons

    @property
    def advice(self) -> list[str]:
        """Changes of the configuration that save memory, the cheapest first; empty if the run fits."""
        if not self.shortfalls:
            return []
        config, memory = self.config, self.memory
        phase = memory.fullest
        parts = memory.phases[phase]
        changes = []
        if phase in ("update", "critic", "log-probabilities"):
            if config.rollout.engine != "embedded" and not config.rollout.sleep_engine:
                changes.append("rollout.sleep_engine=true")
            if parts["activations"] > sum(parts.values()) / 4:
                if config.memory.recompute != "full":
                    changes.append("memory.recompute=full")
                lower = max(self.workload.longest, config.batching.max_tokens_per_micro_batch // 2)
                if lower < config.batching.max_tokens_per_micro_batch:
                    changes.append(f"batching.max_tokens_per_micro_batch={lower}")
        else:
            missing = [part for part in ("grads", "optimizer", "params") if part not in config.memory.offload]
            if missing:
                changes.append("memory.offload=[params,grads,optimizer]")
            size = "larger" if memory.engine.cache_tokens < self.workload.longest else "smaller"
            if config.rollout.engine != "embedded":
                changes.append(f"a {size} share of the memory for the engine (rollout.engine_options)")
                if 2 * config.rollout.tensor_parallel_size <= self.hardware.ranks_per_node:
                    changes.append(f"rollout.tensor_parallel_size={2 * config.rollout.tensor_parallel_size}")
        states = sum(size for name, size in parts.items() if name.endswith(("params", "grads", "optimizer")))
        if states > self.hardware.device_gb * 1e9 / 2:
            changes.append(f"parallel.pipeline_parallel_size={2 * config.parallel.pipeline_parallel_size}")
        changes.append("more ranks, or a layout that --search finds")
        return changes


def make_plan(
    config: RunConfig,
    hardware: Hardware,
    world_size: int,
    *,
    specs: Specs | None = None,
    mean_prompt: float | None = None,
    mean_response: float | None = None,
) -> Plan:
    """Return the plan of a configuration.

    Args:
        specs: specifications of the models; None: read from the folders that the configuration names.
        mean_prompt, mean_response: mean lengths in tokens; None: a quarter of the longest prompt, half of the longest
            response.

    Raises:
        ConfigError: the configuration cannot run on ``world_size`` ranks.
    """
    validate(config, world_size)
    specs = specs_of(config) if specs is None else specs
    if config.rollout.source == "engine":
        check_engine_size(specs.policy, config.rollout.tensor_parallel_size)
    workload = workload_of(config, mean_prompt=mean_prompt, mean_response=mean_response)
    memory = rank_memory(specs, config, workload, hardware, world_size)
    seconds = step_seconds(specs, config, workload, hardware, world_size, memory)
    return Plan(
        config=config, hardware=hardware, world_size=world_size, workload=workload, memory=memory, seconds=seconds
    )


def specs_of(config: RunConfig) -> Specs:
    """Read the specifications of the models that a configuration names, from their config.json alone."""
    path = config.algorithm.reference_path
    has_own = config.algorithm.uses_reference and path is not None
    return Specs(
        policy=read_model_spec(config.model.path),
        critic=read_model_spec(config.for_critic().model.path) if config.algorithm.uses_critic else None,
        reference=read_model_spec(path) if has_own and path is not None else None,
        reward_model=read_model_spec(config.reward.model.path) if config.reward.model is not None else None,
    )


def check_fits(plan: Plan) -> None:
    """Raise an error if the run does not fit.

    Raises:
        ConfigError: the run does not fit; the message says what needs how much, and what to change.
    """
    if plan.shortfalls:
        raise ConfigError(
            f"this run does not fit on {plan.hardware.name}, {plan.world_size} ranks: {'; '.join(plan.shortfalls)}. "
            f"Change: {', '.join(plan.advice)}, or set memory.on_overcommit=warn to start it anyway."
        )


def summary(plan: Plan) -> str:
    """Return the plan's memory as one line for the console."""
    memory = plan.memory
    phase = memory.fullest
    return (
        f"plan: at most {memory.total(phase) / 1e9:.1f} of {plan.hardware.device_gb:.1f} GB per rank (pipeline stage "
        f"{memory.stage}, {phase}), {sum(memory.host.values()) / 1e9:.1f} of {plan.hardware.host_gb:.1f} GB per host"
    )


def describe(plan: Plan) -> str:
    """Return the whole plan as text."""
    config, memory, hardware, workload = plan.config, plan.memory, plan.hardware, plan.workload
    batches = micro_batches_of(config, workload, plan.num_replicas, longest=True)
    nodes = -(-plan.world_size // hardware.ranks_per_node)
    phases = list(memory.phases)
    rows = list(dict.fromkeys(name for parts in memory.phases.values() for name in parts))
    width = max(map(len, rows))
    lines = [
        f"{Path(config.model.path).name} on {nodes} x {hardware.ranks_per_node} {hardware.name}: {plan.layout}, "
        f"{config.rollout.engine} of TP{config.rollout.tensor_parallel_size}",
        f"an update: {workload.sequences_per_update} sequences of at most {workload.longest} tokens, at least "
        f"{batches.count} micro-batches of at most {batches.tokens} tokens on each rank",
        "",
        f"{f'GB of a rank, stage {memory.stage}':<{width}} " + " ".join(f"{phase:>17}" for phase in phases),
    ]
    for name in rows:
        cells = (memory.phases[phase].get(name, 0.0) for phase in phases)
        lines.append(f"{name:<{width}} " + " ".join(f"{size / 1e9:17.1f}" if size else " " * 17 for size in cells))
    lines.append(f"{'total':<{width}} " + " ".join(f"{memory.total(phase) / 1e9:17.1f}" for phase in phases))
    lines.append(f"{'available':<{width}} " + " ".join(f"{hardware.device_gb:17.1f}" for _ in phases))
    host = ", ".join(f"{name} {size / 1e9:.0f}" for name, size in memory.host.items())
    lines += ["", f"GB of a host: {sum(memory.host.values()) / 1e9:.0f} of {hardware.host_gb:.0f} ({host})"]
    if memory.engine.cache_tokens:
        lines.append(f"an engine's cache: {memory.engine.cache_tokens:,.0f} tokens")
    lines += [
        "",
        f"a step of {workload.num_sequences} sequences with {workload.mean_prompt:.0f} + {workload.mean_response:.0f} "
        f"tokens on average: about {plan.step_s:.0f} s, {plan.tokens_per_s:.0f} tokens/s/rank",
        *(f"  {name:<18}{seconds:9.1f} s" for name, seconds in plan.seconds.items()),
        "",
    ]
    if plan.shortfalls:
        lines += [f"does not fit: {reason}" for reason in plan.shortfalls]
        lines.append(f"change: {'; '.join(plan.advice)}")
    else:
        left = hardware.device_gb - memory.total(memory.fullest) / 1e9
        lines.append(f"fits: {left:.1f} GB of a device are left in the fullest phase ({memory.fullest})")
    return "\n".join(lines)


def with_known_models(config: RunConfig, shapes: Path) -> RunConfig:
    """Replace model folders that do not exist by folders with the published ``config.json`` of the same name.

    Args:
        shapes: folder that contains a folder with a ``config.json`` for each model (configs/model_shapes).
    """

    def existing_or_published(path: str) -> str:
        published = shapes / Path(path).name
        if Path(path).exists() or not published.exists():
            return path
        print(f"{path} does not exist; planning with {os.path.relpath(published)}", file=sys.stderr)
        return str(published)

    changed = replace(config, model=replace(config.model, path=existing_or_published(config.model.path)))
    if config.critic.path is not None:
        changed = replace(changed, critic=replace(config.critic, path=existing_or_published(config.critic.path)))
    if config.algorithm.reference_path is not None:
        path = existing_or_published(config.algorithm.reference_path)
        changed = replace(changed, algorithm=replace(config.algorithm, reference_path=path))
    if config.reward.model is not None:
        reward_model = replace(config.reward.model, path=existing_or_published(config.reward.model.path))
        changed = replace(changed, reward=replace(config.reward, model=reward_model))
    return changed
