"""Seconds of a step: what has to be computed and moved, over what the hardware does.

Meant for choosing between layouts. The efficiencies are those of the hardware description.
"""

from collections.abc import Mapping
from math import ceil

from megatron_rl.algorithms.importance import build_correction, needs_old_logprobs
from megatron_rl.config.schema import RunConfig
from megatron_rl.models.flops import forward_flops
from megatron_rl.models.spec import ModelSpec
from megatron_rl.planning.activations import FLOAT, element_bytes
from megatron_rl.planning.hardware import Hardware
from megatron_rl.planning.phases import EngineMemory, RankMemory, Specs, num_parameters, token_cache_bytes
from megatron_rl.planning.shares import layers_of_stages, stage_shares
from megatron_rl.planning.workload import Workload, micro_batches_of

Seconds = Mapping[str, float]


def step_seconds(
    specs: Specs, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int, memory: RankMemory
) -> Seconds:
    """By part of a step."""
    found = {}
    if config.rollout.source == "engine":
        found["generation"] = _generation(specs.policy, config, workload, hardware, world_size, memory.engine)
        found["weight push"] = _push(specs.policy, config, hardware)
        if config.memory.offload:
            found["offload and back"] = _offload(memory, hardware, world_size)
    passes = _num_scorings(config)
    if passes:
        forward = _pass(specs.policy, config, workload, hardware, world_size, factor=1.0)
        found["log-probabilities"] = passes * config.batching.num_mini_batches * forward
    epochs = config.batching.num_mini_batches * config.batching.num_epochs
    found["update"] = epochs * _update(specs.policy, config, workload, hardware, world_size)
    if specs.critic is not None:
        own = config.for_critic()
        values = _pass(specs.critic, own, workload, hardware, world_size, factor=1.0)
        found["critic"] = epochs * _update(specs.critic, own, workload, hardware, world_size)
        found["critic"] += config.batching.num_mini_batches * values
    return found


def _num_scorings(config: RunConfig) -> int:
    """Passes without gradient over every sequence."""
    if config.rollout.source == "demonstrations":
        return 0
    algorithm, num_updates = config.algorithm, config.batching.num_mini_batches * config.batching.num_epochs
    old = needs_old_logprobs(algorithm, build_correction(algorithm), num_updates=num_updates)
    return old + algorithm.uses_reference


def _update(spec: ModelSpec, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int) -> float:
    again = {"disabled": 0.0, "selective": 0.4, "full": 1.0}[config.memory.recompute]
    seconds = _pass(spec, config, workload, hardware, world_size, factor=3.0 + again)
    return seconds + _reduction(spec, config, hardware, world_size)


def _pass(
    spec: ModelSpec, config: RunConfig, workload: Workload, hardware: Hardware, world_size: int, *, factor: float
) -> float:
    """Over the sequences of one update.

    Args:
        factor: passes, in units of a forward pass.
    """
    parallel = config.parallel
    tp, pp, cp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    dp = world_size // (tp * pp * cp)
    batches = micro_batches_of(config, workload, dp, longest=False)
    length = workload.mean
    sequences = batches.count * batches.tokens * cp / length  # of a data-parallel rank
    layer_flops = forward_flops(
        spec,
        num_tokens=int(sequences * length),
        sum_squared_lengths=int(sequences * length**2),
        num_logit_tokens=0,
    )
    head_flops = 2.0 * sequences * workload.mean_response * spec.hidden_size * spec.vocab_size
    shares = [layer_flops * count / spec.num_layers for count in layers_of_stages(spec, parallel)]
    shares[-1] += head_flops
    # the slowest stage sets the pace, the others are waited for once, at both ends
    waits = (sum(shares) - max(shares)) / (batches.count * parallel.virtual_pipeline_parallel_size)
    flops = factor * (max(shares) + waits)
    peak = hardware.fp8_tflops if config.precision.fp8 != "disabled" else hardware.tflops
    bubble = 1 + (pp - 1) / (batches.count * parallel.virtual_pipeline_parallel_size)
    layers = ceil(spec.num_layers / pp)
    hidden = batches.tokens * spec.hidden_size * element_bytes(config)  # of a micro-batch
    # two exchanges of the hidden states in every pass through a layer
    tensor = 2 * factor * layers * (hidden * 2 * (tp - 1) / tp / _reach(tp, hardware) if tp > 1 else 0.0)
    context = 0.0
    if cp > 1:
        keys = 2 * batches.tokens * spec.num_query_groups * spec.head_dim / tp * element_bytes(config)
        context = factor * layers * keys * (cp - 1) / _reach(tp * cp, hardware)
    experts = 0.0
    if spec.moe is not None and parallel.expert_parallel_size > 1:
        sent = 2 * spec.moe.experts_per_token * hidden / tp * (1 - 1 / parallel.expert_parallel_size)
        experts = factor * layers * sent / _reach(tp * parallel.expert_parallel_size, hardware)
    pipeline = 2 * hidden / (hardware.network_gb_s * 1e9 * hardware.bandwidth_efficiency) if pp > 1 else 0.0
    launches = factor * layers * 30 * hardware.kernel_s
    compute = flops / (tp * cp) / (peak * 1e12 * hardware.matmul_efficiency)
    apart = batches.count * (tensor + context + experts + pipeline + launches)
    return compute + apart * bubble


def _reduction(spec: ModelSpec, config: RunConfig, hardware: Hardware, world_size: int) -> float:
    """Gradients over the data-parallel ranks, the optimizer's step, and the weights back."""
    parallel, size = config.parallel, element_bytes(config)
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    dp = world_size // ranks
    held = max(share.total for share in stage_shares(spec, parallel))
    memory = hardware.memory_gb_s * 1e9 * hardware.bandwidth_efficiency
    owned = held / dp if parallel.distributed_optimizer else held
    step = owned * 7 * FLOAT / memory + held * 3 * FLOAT / memory
    if dp == 1:
        return step
    return step + held * (FLOAT + size) * (dp - 1) / dp / _reach(world_size, hardware)


def _reach(ranks: int, hardware: Hardware) -> float:
    """Bytes a second among so many neighbouring ranks."""
    links = hardware.link_gb_s if ranks <= hardware.ranks_per_node else hardware.network_gb_s
    return links * 1e9 * hardware.bandwidth_efficiency


def _generation(
    spec: ModelSpec,
    config: RunConfig,
    workload: Workload,
    hardware: Hardware,
    world_size: int,
    engine: EngineMemory,
) -> float:
    """Decoding is bound by reading weights and caches, or by products; prompts are read once for a group."""
    tp, size = config.rollout.tensor_parallel_size, element_bytes(config)
    engines = max(1, world_size // tp)
    wanted = workload.num_prompts * workload.group_size / engines
    fitting = engine.cache_tokens / workload.mean if engine.cache_tokens else wanted
    rows = max(1.0, min(wanted, config.rollout.max_num_sequences, fitting))
    memory = hardware.memory_gb_s * 1e9 * hardware.bandwidth_efficiency * tp
    rate = hardware.tflops * 1e12 * hardware.matmul_efficiency * tp
    active = _active_parameters(spec)
    read = num_parameters(spec) * size if spec.moe is None else min(1.0, rows / 16) * num_parameters(spec) * size
    context = workload.mean_prompt + workload.mean_response / 2
    token = max((read + rows * context * token_cache_bytes(spec, config)) / memory, 2 * active * rows / rate)
    link = hardware.link_gb_s * 1e9 * hardware.bandwidth_efficiency
    if tp > 1:
        exchanged = rows * spec.hidden_size * size * 2 * (tp - 1) / tp
        token += 2 * spec.num_layers * (exchanged / link + 4 * hardware.kernel_s)
    token += 12 * spec.num_layers * hardware.kernel_s / 2
    # the engines work until the longest response is done
    steps = max(wanted / rows * workload.mean_response, float(workload.longest_response))
    prompts = 2 * active * workload.num_prompts / engines * workload.mean_prompt / rate
    return steps * token + prompts


def _active_parameters(spec: ModelSpec) -> float:
    return forward_flops(spec, num_tokens=1, sum_squared_lengths=1, num_logit_tokens=1) / 2


def _push(spec: ModelSpec, config: RunConfig, hardware: Hardware) -> float:
    """An engine rank's share, of which it holds the part that its own stage has."""
    share = num_parameters(spec) * element_bytes(config) / config.rollout.tensor_parallel_size
    at_home = 1 / config.parallel.pipeline_parallel_size
    at_home *= min(1.0, config.rollout.tensor_parallel_size / config.parallel.tensor_parallel_size)
    ranks = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    memory = hardware.memory_gb_s * 1e9 * hardware.bandwidth_efficiency
    return share * (1 - at_home) / _reach(ranks, hardware) + share / memory


def _offload(memory: RankMemory, hardware: Hardware, world_size: int) -> float:
    """There and back, by a link of its own for every device."""
    moved = memory.host["offloaded"] / min(world_size, hardware.ranks_per_node)
    return 2 * moved / (hardware.host_link_gb_s * 1e9 * hardware.bandwidth_efficiency)
