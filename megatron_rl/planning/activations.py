"""What a pass leaves in memory for its gradient, and what it needs on top for a moment.

Counted from the tensors that torch's autograd saves in a layer of Megatron-Core's local modules; on GPUs Transformer
Engine and fused norms save the same or less.
"""

from dataclasses import dataclass

from megatron_rl.config.schema import RunConfig
from megatron_rl.models.logit_chunks import default_chunk_tokens
from megatron_rl.models.spec import ModelSpec
from megatron_rl.models.table import padded_vocab_size
from megatron_rl.weights.hf_files import torch_dtype

FLOAT = 4
"""Bytes of fp32."""


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Bytes for one token on one rank, of one layer."""

    saved: float
    """Kept from the forward to the backward pass."""
    whole: float
    """That a layer saves without recomputation; while it is computed again it holds these for a moment."""
    passing: float
    """On top while its gradient is computed."""


def layer_activations(spec: ModelSpec, config: RunConfig) -> LayerActivations:
    """What a token costs in a layer."""
    parallel, memory = config.parallel, config.memory
    size = element_bytes(config)
    tp = parallel.tensor_parallel_size
    hidden = spec.hidden_size / (tp if parallel.sequence_parallel else 1)
    query, key = spec.num_heads * spec.head_dim / tp, spec.num_query_groups * spec.head_dim / tp
    # norms are computed in fp32: the input, and the normalised one
    norm = 2 * hidden * FLOAT
    qk_norm = 2 * (query + key) * FLOAT * spec.qk_norm
    core = size * (2 * query + 2 * key)  # query, key, value and the output of the kernel
    attention = size * (hidden + 2 * query + 4 * spec.head_dim) + qk_norm
    if spec.moe is None:
        columns, copies = spec.ffn_hidden_size / tp, 1.0
    else:  # every token goes through several experts, copied for each of them
        columns = spec.moe.ffn_hidden_size / parallel.expert_tensor_size
        copies = float(spec.moe.experts_per_token)
    # gate and up [2 F], silu(gate), its product with up, and the input of the second matrix
    feed_forward = copies * size * 5 * columns
    feed_forward_input = copies * size * spec.hidden_size if spec.moe is not None else size * hidden
    routed = copies * size * 2 * spec.hidden_size if spec.moe is not None else 0.0  # sent out, and come back
    whole = 2 * norm + attention + core + feed_forward + feed_forward_input + routed
    passing = copies * size * 4 * columns + 2 * size * spec.hidden_size + routed
    saved = whole
    if memory.recompute == "full":
        saved = size * hidden / memory.recompute_num_layers
        whole *= memory.recompute_num_layers
    elif memory.recompute == "selective":
        if "mlp" in memory.recompute_modules or "moe" in memory.recompute_modules:
            saved -= feed_forward + routed
        if "layernorm" in memory.recompute_modules:
            saved -= 2 * norm - 2 * size * hidden
        if "moe_act" in memory.recompute_modules:
            saved -= copies * size * columns
    return LayerActivations(saved=saved, whole=whole, passing=passing)


def head_bytes(spec: ModelSpec, config: RunConfig, num_tokens: int) -> float:
    """Bytes that the last stage needs for log-probabilities and their gradient, at the peak.

    Args:
        num_tokens: of a micro-batch.
    """
    columns = padded_vocab_size(spec.vocab_size, config.parallel.tensor_parallel_size)
    columns //= config.parallel.tensor_parallel_size
    chunk = config.batching.logprob_chunk_tokens or default_chunk_tokens(columns)
    size = element_bytes(config)
    logits = min(chunk, num_tokens) * columns * FLOAT
    gradient = columns * spec.hidden_size * (FLOAT + size)
    # the chunk, its gradient, and one more: a slope for the entropy, or the gradient in 16 bits
    return 3.0 * logits + gradient + num_tokens * spec.hidden_size * 3 * size


def in_flight(stage: int, config: RunConfig, num_micro_batches: int) -> float:
    """Micro-batches, in units of the stage's layers, whose activations a stage holds at its fullest (1F1B)."""
    stages, chunks = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_parallel_size
    if stages == 1:
        return 1.0
    if chunks == 1:
        return float(min(stages - stage, num_micro_batches))
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(warm_up, num_micro_batches * chunks) / chunks


def element_bytes(config: RunConfig) -> int:
    """Of weights and activations."""
    return torch_dtype(config.model.dtype).itemsize
