"""Bytes of a rank in each phase of a step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from megatron_rl.config.schema import RunConfig
from megatron_rl.models.lora import lora_table
from megatron_rl.models.spec import ModelSpec
from megatron_rl.models.table import Head
from megatron_rl.planning.activations import FLOAT, element_bytes, head_bytes, in_flight, layer_activations
from megatron_rl.planning.shares import StageShare, stage_shares
from megatron_rl.planning.workload import Workload, micro_batches_of
from megatron_rl.weights.layout import Place

STATE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
QUANTIZED_BYTES = {"int8": 1.03, "nf4": 0.57}
"""Of an element of a frozen matrix, scales counted in."""


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """Bytes of a model that learns, on one rank of a stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """At the peak of an update, what is there for a moment counted in."""
    scoring: float
    """At the peak of a pass without gradient."""
    optimizer_on_host: float = 0.0

    @property
    def parts(self) -> Mapping[str, float]:
        """Those that memory.offload can name."""
        return {"params": self.weights, "grads": self.gradients, "optimizer": self.optimizer}


def model_memory(
    spec: ModelSpec, config: RunConfig, workload: Workload, world_size: int, head: Head = "language"
) -> list[ModelMemory]:
    """One for each pipeline stage.

    Args:
        config: with the model's own layout and optimizer in the policy's place.
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
    owned = float(dense + experts)
    if parallel.distributed_optimizer:
        owned = dense / (dp * cp) + experts / expert_dp
    # in fp32 the weights are their own masters
    state = 2 * STATE_BYTES[config.optimizer.states_dtype] + (FLOAT if size < FLOAT else 0)
    on_host = config.optimizer.cpu_offload_fraction
    batches = micro_batches_of(config, workload, dp, longest=True)
    layer = layer_activations(spec, config)
    held = in_flight(stage, config, batches.count) * share.num_layers * layer.saved * batches.tokens
    is_last = stage == pp - 1
    recomputed = layer.whole if config.memory.recompute == "full" else 0.0
    inside = (recomputed + layer.passing) * batches.tokens
    final_norm = 2 * FLOAT * spec.hidden_size * batches.tokens * is_last
    top = _head(spec, config, head, batches.tokens) if is_last else 0.0
    return ModelMemory(
        weights=_weight_bytes(share, config) + (adapters or 0) * size,
        gradients=float(dense + experts) * FLOAT,
        optimizer=owned * state * (1 - on_host),
        activations=held + final_norm + max(inside, top),
        scoring=layer.whole / config.memory.recompute_num_layers * batches.tokens + top,
        optimizer_on_host=owned * (state + FLOAT) * on_host,
    )


def _head(spec: ModelSpec, config: RunConfig, head: Head, num_tokens: int) -> float:
    return head_bytes(spec, config, num_tokens) if head == "language" else 4.0 * FLOAT * spec.hidden_size * num_tokens


def _adapters(share: StageShare, config: RunConfig, spec: ModelSpec) -> int | None:
    """Elements of the adapters, which alone have gradients; None: everything learns."""
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
