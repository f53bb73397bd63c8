"""Search for the fastest layouts that fit on a number of ranks."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Literal

from megatron_rl.config.load import flatten
from megatron_rl.config.performance import OffloadPart
from megatron_rl.config.schema import RunConfig
from megatron_rl.errors import ConfigError, ConversionError
from megatron_rl.models.spec import ModelSpec
from megatron_rl.planning.hardware import Hardware
from megatron_rl.planning.phases import ENGINE_SHARE_OPTIONS, Specs
from megatron_rl.planning.plan import Plan, make_plan, specs_of

RECOMPUTE: tuple[Literal["disabled", "selective", "full"], ...] = ("disabled", "selective", "full")
ENGINE_SIZES = (1, 2, 4, 8)
ALL_PARTS: tuple[OffloadPart, ...] = ("params", "grads", "optimizer")
MEMORY_MARGIN = 0.05
"""Share of a device's memory that a layout must leave free, to allow for the error of the plan."""
MIN_CACHE_GB = 2.0
"""Smallest engine cache on a rank, in units of 1e9 bytes, for which a layout is considered."""


def search(config: RunConfig, hardware: Hardware, world_size: int) -> list[Plan]:
    """Return the plans of all layouts that fit, the fastest first.

    The algorithm and the batch are unchanged; the layout, recomputation, tokens per micro-batch, offload and the
    engine's tensor-parallel size vary.
    """
    specs = specs_of(config)
    plans = []
    for candidate in _candidates(config, specs.policy, hardware, world_size):
        try:
            plan = make_plan(candidate, hardware, world_size, specs=specs)
        except (ConfigError, ConversionError):
            continue  # the model or batch does not divide by this layout
        fitted = with_fitting_engine(plan, specs)
        memory = fitted.memory
        if not fitted.shortfalls and memory.total(memory.fullest) / 1e9 <= (1 - MEMORY_MARGIN) * hardware.device_gb:
            plans.append(fitted)
    return sorted(plans, key=lambda plan: plan.step_s)


def with_fitting_engine(plan: Plan, specs: Specs) -> Plan:
    """Return the plan with the largest share of memory for the engine that the trainer leaves.

    The plan is unchanged if the engine has no such share or if too little memory is left for it.
    """
    config, memory, hardware = plan.config, plan.memory, plan.hardware
    option = ENGINE_SHARE_OPTIONS.get(config.rollout.engine)
    if option is None or not memory.engine.weights or hardware.engine_cache_gb is not None:
        return plan
    others_bytes = max(
        sum(size for name, size in parts.items() if not name.startswith("engine"))
        for parts in memory.phases.values()
        if "engine cache" in parts
    )
    share = int((1 - MEMORY_MARGIN - others_bytes / 1e9 / hardware.device_gb) * 20) / 20  # in steps of 0.05
    min_gb = (memory.engine.weights + memory.engine.workspace) / 1e9 + MIN_CACHE_GB
    if share * hardware.device_gb < min_gb:
        return plan
    options = {**config.rollout.engine_options, option: min(share, 0.9)}
    fitted = replace(config, rollout=replace(config.rollout, engine_options=options))
    return make_plan(fitted, hardware, plan.world_size, specs=specs)


def settings(plan: Plan, base: RunConfig) -> str:
    """Return the keys by which a plan differs from a base configuration, as command-line overrides."""
    before, after = _flat(base), _flat(plan.config)
    changed = {key: value for key, value in after.items() if key not in before or value != before[key]}
    return " ".join(f"{key}={_as_override(value)}" for key, value in changed.items()) or "unchanged"


def _flat(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in flatten(config).items():
        flat |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _as_override(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_as_override, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _candidates(config: RunConfig, spec: ModelSpec, hardware: Hardware, world_size: int) -> Iterator[RunConfig]:
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    tokens = sorted({max(longest, size) for size in (8192, 16384, 32768)})
    sizes = [size for size in ENGINE_SIZES if size <= hardware.ranks_per_node and world_size % size == 0]
    engines = sizes if config.rollout.engine != "embedded" else [1]
    for tp, pp, cp, ep in product(_powers(hardware.ranks_per_node), _powers(16), _powers(4), _powers(64)):
        if tp * pp * cp > world_size or world_size % (tp * pp * cp) or (spec.moe is None and ep > 1):
            continue
        layout = replace(
            config.parallel,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            virtual_pipeline_parallel_size=1,
            context_parallel_size=cp,
            expert_parallel_size=ep,
            expert_tensor_parallel_size=1 if spec.moe is not None else None,
            sequence_parallel=tp > 1,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
        )
        for recompute, max_tokens, engine, offload in product(RECOMPUTE, tokens, engines, ([], list(ALL_PARTS))):
            yield replace(
                config,
                parallel=layout,
                memory=replace(config.memory, recompute=recompute, offload=offload),
                batching=replace(config.batching, max_tokens_per_micro_batch=max_tokens),
                rollout=replace(config.rollout, tensor_parallel_size=engine),
            )


def _powers(maximum: int) -> list[int]:
    return [2**exponent for exponent in range(maximum.bit_length()) if 2**exponent <= maximum]
