"""Memory of a trained model on one rank: weights, gradients, optimizer and activations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from megatron_rl.config.schema import RunConfig
from megatron_rl.models.lora import lora_table
from megatron_rl.models.spec import ModelSpec
from megatron_rl.models.table import Head
from megatron_rl.planning.activations import (
    FP32_BYTES,
    element_bytes,
    head_bytes,
    layer_activations,
    micro_batches_in_flight,
)
from megatron_rl.planning.shares import StageShare, stage_shares
from megatron_rl.planning.workload import Workload, micro_batches_of
from megatron_rl.weights.layout import Place

STATE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
QUANTIZED_BYTES = {"int8": 1.03, "nf4": 0.57}
"""Bytes of an element of a frozen matrix, quantization scales included."""


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """Bytes of a trained model on one rank of a pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Peak of an update, transient memory included."""
    forward_only: float
    """Peak activations of a pass without gradient."""
    optimizer_on_host: float = 0.0

    @property
    def parts(self) -> Mapping[str, float]:
        """The parts that memory.offload can name."""
        return {"params": self.weights, "grads": self.gradients, "optimizer": self.optimizer}


def model_memory(
    spec: ModelSpec, config: RunConfig, workload: Workload, world_size: int, head: Head = "language"
) -> list[ModelMemory]:
    """Return the memory of a model, one entry per pipeline stage.

    Args:
        config: configuration whose policy sections hold this model's layout and optimizer (see ``for_critic``).
    """
    shares = stage_shares(spec, config.parallel, head)
    return [_stage_memory(spec, config, workload, world_size, head, stage, share) for stage, share in enumerate(shares)]


def _stage_memory(
    spec: ModelSpec,
    config: RunConfig,
    workload: Workload,
    world_size: int,
    head: Head,
    stage: int,
    share: StageShare,
) -> ModelMemory:
    parallel, size = config.parallel, element_bytes(config)
    tp, pp, cp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    dp = world_size // (tp * pp * cp)
    expert_dp = world_size // (parallel.expert_parallel_size * parallel.expert_tensor_size * pp)
    adapters = _adapters(share, config, spec)
    dense, experts = (share.dense, share.experts) if adapters is None else (adapters, 0)
    num_owned = float(dense + experts)
    if parallel.distributed_optimizer:
        num_owned = dense / (dp * cp) + experts / expert_dp
    # fp32 weights need no separate master weights
    state_bytes = 2 * STATE_BYTES[config.optimizer.states_dtype] + (FP32_BYTES if size < FP32_BYTES else 0)
    host_fraction = config.optimizer.cpu_offload_fraction
    batches = micro_batches_of(config, workload, dp, longest=True)
    layer = layer_activations(spec, config)
    saved = micro_batches_in_flight(stage, config, batches.count) * share.num_layers * layer.saved * batches.tokens
    is_last = stage == pp - 1
    recompute = layer.unrecomputed if config.memory.recompute == "full" else 0.0
    transient = (recompute + layer.transient) * batches.tokens
    final_norm = 2 * FP32_BYTES * spec.hidden_size * batches.tokens * is_last
    head_peak = _head(spec, config, head, batches.tokens) if is_last else 0.0
    return ModelMemory(
        weights=_weight_bytes(share, config) + (adapters or 0) * size,
        gradients=float(dense + experts) * FP32_BYTES,
        optimizer=num_owned * state_bytes * (1 - host_fraction),
        activations=saved + final_norm + max(transient, head_peak),
        forward_only=layer.unrecomputed / config.memory.recompute_num_layers * batches.tokens + head_peak,
        optimizer_on_host=num_owned * (state_bytes + FP32_BYTES) * host_fraction,
    )


def _head(spec: ModelSpec, config: RunConfig, head: Head, num_tokens: int) -> float:
    if head == "language":
        return head_bytes(spec, config, num_tokens)
    return 4.0 * FP32_BYTES * spec.hidden_size * num_tokens


def _adapters(share: StageShare, config: RunConfig, spec: ModelSpec) -> int | None:
    """Number of adapter elements, the only ones with gradients; None if all weights are trained."""
    if not config.lora.rank:
        return None
    table = lora_table(replace(spec, num_layers=1), config.lora.rank, config.lora.targets)
    place = Place(tp_size=config.parallel.tensor_parallel_size)
    return sum(prod(place.shape(layout)) for layout in table.values()) * share.num_layers


def _weight_bytes(share: StageShare, config: RunConfig) -> float:
    size = float(element_bytes(config))
    if config.lora.rank and config.lora.quantize != "none":
        return (share.total - share.matrices) * size + share.matrices * QUANTIZED_BYTES[config.lora.quantize]
    if config.precision.fp8_params:
        return (share.total - share.matrices) * size + share.matrices
    return share.total * size
