"""Seconds of a step: operations and bytes moved, divided by the rates that the hardware reaches.

Meant for choosing between layouts. The efficiencies are those of the hardware description.
"""

from collections.abc import Mapping
from math import ceil

from megatron_rl.algorithms.importance import build_correction, needs_old_logprobs
from megatron_rl.config.schema import RunConfig
from megatron_rl.models.flops import forward_flops
from megatron_rl.models.spec import ModelSpec
from megatron_rl.planning.activations import FP32_BYTES, element_bytes
from megatron_rl.planning.hardware import Hardware
from megatron_rl.planning.phases import EngineMemory, RankMemory, Specs, num_parameters, token_cache_bytes
from megatron_rl.planning.shares import layers_of_stages, stage_shares
from megatron_rl.planning.workload import Workload, micro_batches_of

Seconds = Mapping[str, float]
"""Part of a step -> seconds."""


def step_seconds(
    specs: Specs, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int, memory: RankMemory
) -> Seconds:
    """Return the estimated seconds of each part of a step."""
    seconds = {}
    if config.rollout.source == "engine":
        seconds["generation"] = _generation(specs.policy, config, workload, hardware, world_size, memory.engine)
        seconds["weight push"] = _push(specs.policy, config, hardware)
        if config.memory.offload:
            seconds["offload and reload"] = _offload(memory, hardware, world_size)
    passes = _num_forward_only_passes(config)
    if passes:
        forward = _pass(specs.policy, config, workload, hardware, world_size, factor=1.0)
        seconds["log-probabilities"] = passes * config.batching.num_mini_batches * forward
    epochs = config.batching.num_mini_batches * config.batching.num_epochs
    seconds["update"] = epochs * _update(specs.policy, config, workload, hardware, world_size)
    if specs.critic is not None:
        critic_config = config.for_critic()
        values = _pass(specs.critic, critic_config, workload, hardware, world_size, factor=1.0)
        seconds["critic"] = epochs * _update(specs.critic, critic_config, workload, hardware, world_size)
        seconds["critic"] += config.batching.num_mini_batches * values
    return seconds


def _num_forward_only_passes(config: RunConfig) -> int:
    """Number of passes without gradient over every sequence."""
    if config.rollout.source == "demonstrations":
        return 0
    algorithm, num_updates = config.algorithm, config.batching.num_mini_batches * config.batching.num_epochs
    old = needs_old_logprobs(algorithm, build_correction(algorithm), num_updates=num_updates)
    return old + algorithm.uses_reference


def _update(spec: ModelSpec, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int) -> float:
    recompute = {"disabled": 0.0, "selective": 0.4, "full": 1.0}[config.memory.recompute]
    seconds = _pass(spec, config, workload, hardware, world_size, factor=3.0 + recompute)
    return seconds + _optimizer_step(spec, config, hardware, world_size)


def _pass(
    spec: ModelSpec, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int, *, factor: float
) -> float:
    """Return the seconds of a pass over the sequences of one update.

    Args:
        factor: cost in units of a forward pass.
    """
    parallel = config.parallel
    tp, pp, cp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    dp = world_size // (tp * pp * cp)
    batches = micro_batches_of(config, workload, dp, longest=False)
    length = workload.mean
    sequences = batches.count * batches.tokens * cp / length  # per data-parallel rank
    layer_flops = forward_flops(
        spec,
        num_tokens=int(sequences * length),
        sum_squared_lengths=int(sequences * length**2),
        num_logit_tokens=0,
    )
    head_flops = 2.0 * sequences * workload.mean_response * spec.hidden_size * spec.vocab_size
    shares = [layer_flops * count / spec.num_layers for count in layers_of_stages(spec, parallel)]
    shares[-1] += head_flops
    # the slowest stage sets the pace; the other stages add their time once, while the pipeline fills and drains
    fill_and_drain = (sum(shares) - max(shares)) / (batches.count * parallel.virtual_pipeline_parallel_size)
    flops = factor * (max(shares) + fill_and_drain)
    peak = hardware.fp8_tflops if config.precision.fp8 != "disabled" else hardware.tflops
    bubble = 1 + (pp - 1) / (batches.count * parallel.virtual_pipeline_parallel_size)
    layers = ceil(spec.num_layers / pp)
    hidden = batches.tokens * spec.hidden_size * element_bytes(config)  # per micro-batch
    # two all-reduces of the hidden states in every pass through a layer
    tensor = 2 * factor * layers * (hidden * 2 * (tp - 1) / tp / _bandwidth(tp, hardware) if tp > 1 else 0.0)
    context = 0.0
    if cp > 1:
        keys = 2 * batches.tokens * spec.num_query_groups * spec.head_dim / tp * element_bytes(config)
        context = factor * layers * keys * (cp - 1) / _bandwidth(tp * cp, hardware)
    experts = 0.0
    if spec.moe is not None and parallel.expert_parallel_size > 1:
        sent = 2 * spec.moe.experts_per_token * hidden / tp * (1 - 1 / parallel.expert_parallel_size)
        experts = factor * layers * sent / _bandwidth(tp * parallel.expert_parallel_size, hardware)
    pipeline = 2 * hidden / (hardware.network_gb_s * 1e9 * hardware.bandwidth_efficiency) if pp > 1 else 0.0
    launches = factor * layers * 30 * hardware.kernel_s
    compute = flops / (tp * cp) / (peak * 1e12 * hardware.matmul_efficiency)
    overhead = batches.count * (tensor + context + experts + pipeline + launches)
    return compute + overhead * bubble


def _optimizer_step(spec: ModelSpec, config: RunConfig, hardware: Hardware, world_size: int) -> float:
    """Return the seconds of the gradient reduction, the optimizer step and the weight all-gather of an update."""
    parallel, size = config.parallel, element_bytes(config)
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    dp = world_size // ranks
    num_held = max(share.total for share in stage_shares(spec, parallel))
    memory = hardware.memory_gb_s * 1e9 * hardware.bandwidth_efficiency
    num_owned = num_held / dp if parallel.distributed_optimizer else num_held
    step = num_owned * 7 * FP32_BYTES / memory + num_held * 3 * FP32_BYTES / memory
    if dp == 1:
        return step
    return step + num_held * (FP32_BYTES + size) * (dp - 1) / dp / _bandwidth(world_size, hardware)


def _bandwidth(num_ranks: int, hardware: Hardware) -> float:
    """Return the bytes per second among ``num_ranks`` neighbouring ranks."""
    links = hardware.link_gb_s if num_ranks <= hardware.ranks_per_node else hardware.network_gb_s
    return links * 1e9 * hardware.bandwidth_efficiency


def _generation(
    spec: ModelSpec,
    config: RunConfig,
    workload: Workload,
    hardware: Hardware,
    world_size: int,
    engine: EngineMemory,
) -> float:
    """Return the seconds of generation.

    Decoding is bound by reading weights and KV caches or by matrix products; prompts are prefilled once per group.
    """
    tp, size = config.rollout.tensor_parallel_size, element_bytes(config)
    engines = max(1, world_size // tp)
    num_sequences = workload.num_prompts * workload.group_size / engines
    num_fitting = engine.cache_tokens / workload.mean if engine.cache_tokens else num_sequences
    batch_size = max(1.0, min(num_sequences, config.rollout.max_num_sequences, num_fitting))
    memory = hardware.memory_gb_s * 1e9 * hardware.bandwidth_efficiency * tp
    flops_per_s = hardware.tflops * 1e12 * hardware.matmul_efficiency * tp
    active = _active_parameters(spec)
    weight_bytes = (
        num_parameters(spec) * size if spec.moe is None else min(1.0, batch_size / 16) * num_parameters(spec) * size
    )
    context = workload.mean_prompt + workload.mean_response / 2
    token_s = max(
        (weight_bytes + batch_size * context * token_cache_bytes(spec, config)) / memory,
        2 * active * batch_size / flops_per_s,
    )
    link = hardware.link_gb_s * 1e9 * hardware.bandwidth_efficiency
    if tp > 1:
        exchanged_bytes = batch_size * spec.hidden_size * size * 2 * (tp - 1) / tp
        token_s += 2 * spec.num_layers * (exchanged_bytes / link + 4 * hardware.kernel_s)
    token_s += 12 * spec.num_layers * hardware.kernel_s / 2
    # generation lasts at least as long as the longest response
    steps = max(num_sequences / batch_size * workload.mean_response, float(workload.longest_response))
    prefill_s = 2 * active * workload.num_prompts / engines * workload.mean_prompt / flops_per_s
    return steps * token_s + prefill_s


def _active_parameters(spec: ModelSpec) -> float:
    return forward_flops(spec, num_tokens=1, sum_squared_lengths=1, num_logit_tokens=1) / 2


def _push(spec: ModelSpec, config: RunConfig, hardware: Hardware) -> float:
    """Return the seconds of a weight push to an engine rank, which already holds the part of its own pipeline stage."""
    share = num_parameters(spec) * element_bytes(config) / config.rollout.tensor_parallel_size
    local_fraction = 1 / config.parallel.pipeline_parallel_size
    local_fraction *= min(1.0, config.rollout.tensor_parallel_size / config.parallel.tensor_parallel_size)
    ranks = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    memory = hardware.memory_gb_s * 1e9 * hardware.bandwidth_efficiency
    return share * (1 - local_fraction) / _bandwidth(ranks, hardware) + share / memory


def _offload(memory: RankMemory, hardware: Hardware, world_size: int) -> float:
    """Return the seconds of offloading and reloading; every device has its own link to the host."""
    moved = memory.host["offloaded"] / min(world_size, hardware.ranks_per_node)
    return 2 * moved / (hardware.host_link_gb_s * 1e9 * hardware.bandwidth_efficiency)
