"""Layouts for a number of ranks, the fastest that fit first."""

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
from megatron_rl.planning.phases import OPTIONS, Specs
from megatron_rl.planning.plan import Plan, make_plan, specs_of

RECOMPUTE: tuple[Literal["disabled", "selective", "full"], ...] = ("disabled", "selective", "full")
ENGINE_SIZES = (1, 2, 4, 8)
EVERYTHING: tuple[OffloadPart, ...] = ("params", "grads", "optimizer")
SPARE = 0.05
"""Share of a device that a found layout leaves free: the plan's error."""
CACHE_GB = 2.0
"""Least of an engine's cache on a rank that is worth a plan."""


def search(config: RunConfig, hardware: Hardware, world_size: int) -> list[Plan]:
    """Plans of all layouts that fit, the fastest first.

    The algorithm and the batch stay as they are; layout, recomputation, tokens of a micro-batch, offload and the
    engine's size vary.
    """
    specs = specs_of(config)
    found = []
    for candidate in _candidates(config, specs.policy, hardware, world_size):
        try:
            plan = make_plan(candidate, hardware, world_size, specs=specs)
        except (ConfigError, ConversionError):
            continue  # this model or batch cannot be cut so
        fitted = with_fitting_engine(plan, specs)
        memory = fitted.memory
        if not fitted.lacks and memory.total(memory.fullest) / 1e9 <= (1 - SPARE) * hardware.device_gb:
            found.append(fitted)
    return sorted(found, key=lambda plan: plan.step_s)


def with_fitting_engine(plan: Plan, specs: Specs) -> Plan:
    """The same with as large a share of the memory for the engine as the trainer leaves; the plan itself where the
    engine has no such share."""
    config, memory, hardware = plan.config, plan.memory, plan.hardware
    option = OPTIONS.get(config.rollout.engine)
    if option is None or not memory.engine.weights or hardware.engine_cache_gb is not None:
        return plan
    others = max(
        sum(size for name, size in parts.items() if not name.startswith("engine"))
        for parts in memory.phases.values()
        if "engine cache" in parts
    )
    share = int((1 - SPARE - others / 1e9 / hardware.device_gb) * 20) / 20  # in steps of 0.05
    least = (memory.engine.weights + memory.engine.work) / 1e9 + CACHE_GB
    if share * hardware.device_gb < least:
        return plan
    options = {**config.rollout.engine_options, option: min(share, 0.9)}
    fitted = replace(config, rollout=replace(config.rollout, engine_options=options))
    return make_plan(fitted, hardware, plan.world_size, specs=specs)


def settings(plan: Plan, asked: RunConfig) -> str:
    """The keys by which a found plan differs from the configuration that was asked about, as overrides."""
    before, after = _plain(asked), _plain(plan.config)
    changed = {key: value for key, value in after.items() if key not in before or value != before[key]}
    return " ".join(f"{key}={_written(value)}" for key, value in changed.items()) or "as it is"


def _plain(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flatten(config).items():
        found |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
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
        for recompute, size, engine, offload in product(RECOMPUTE, tokens, engines, ([], list(EVERYTHING))):
            yield replace(
                config,
                parallel=layout,
                memory=replace(config.memory, recompute=recompute, offload=offload),
                batching=replace(config.batching, max_tokens_per_micro_batch=size),
                rollout=replace(config.rollout, tensor_parallel_size=engine),
            )


def _powers(most: int) -> list[int]:
    return [2**exponent for exponent in range(most.bit_length()) if 2**exponent <= most]
