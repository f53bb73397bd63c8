"""Activation memory: what a forward pass saves for the backward pass, and the transient memory on top.

Counted from the tensors that torch's autograd saves in a layer of Megatron-Core's local modules; on GPUs, Transformer
Engine and fused norms save the same or less.
"""

from dataclasses import dataclass

from megatron_rl.config.schema import RunConfig
from megatron_rl.models.logit_chunks import default_chunk_tokens
from megatron_rl.models.spec import ModelSpec
from megatron_rl.models.table import padded_vocab_size
from megatron_rl.weights.hf_files import torch_dtype

FP32_BYTES = 4
"""Bytes of an fp32 element."""


@dataclass(frozen=True, kw_only=True)
class LayerActivations:
    """Activation bytes of one layer for one token, on one rank."""

    saved: float
    """Kept from the forward to the backward pass."""
    unrecomputed: float
    """What would be saved without recomputation; layers hold this much transiently while they are recomputed."""
    transient: float
    """On top of that while the gradient of the layer is computed."""


def layer_activations(spec: ModelSpec, config: RunConfig) -> LayerActivations:
    """Return the activation bytes per token of one layer under the configured layout and recomputation."""
    parallel, memory = config.parallel, config.memory
    size = element_bytes(config)
    tp = parallel.tensor_parallel_size
    hidden = spec.hidden_size / (tp if parallel.sequence_parallel else 1)
    query, key = spec.num_heads * spec.head_dim / tp, spec.num_query_groups * spec.head_dim / tp
    # norms are computed in fp32 and save their input and the normalised input
    norm = 2 * hidden * FP32_BYTES
    qk_norm = 2 * (query + key) * FP32_BYTES * spec.qk_norm
    attention_core = size * (2 * query + 2 * key)  # query, key, value and the attention output
    attention = size * (hidden + 2 * query + 4 * spec.head_dim) + qk_norm
    if spec.moe is None:
        ffn_columns, token_copies = spec.ffn_hidden_size / tp, 1.0
    else:  # every token is copied once for each expert that it is routed to
        ffn_columns = spec.moe.ffn_hidden_size / parallel.expert_tensor_size
        token_copies = float(spec.moe.experts_per_token)
    # gate and up [2 F], silu(gate), silu(gate) * up, and the input of the down projection
    feed_forward = token_copies * size * 5 * ffn_columns
    feed_forward_input = token_copies * size * spec.hidden_size if spec.moe is not None else size * hidden
    # dispatched and combined tokens
    routed = token_copies * size * 2 * spec.hidden_size if spec.moe is not None else 0.0
    unrecomputed = 2 * norm + attention + attention_core + feed_forward + feed_forward_input + routed
    transient = token_copies * size * 4 * ffn_columns + 2 * size * spec.hidden_size + routed
    saved = unrecomputed
    if memory.recompute == "full":
        saved = size * hidden / memory.recompute_num_layers
        unrecomputed *= memory.recompute_num_layers
    elif memory.recompute == "selective":
        if "mlp" in memory.recompute_modules or "moe" in memory.recompute_modules:
            saved -= feed_forward + routed
        if "layernorm" in memory.recompute_modules:
            saved -= 2 * norm - 2 * size * hidden
        if "moe_act" in memory.recompute_modules:
            saved -= token_copies * size * ffn_columns
    return LayerActivations(saved=saved, unrecomputed=unrecomputed, transient=transient)


def head_bytes(spec: ModelSpec, config: RunConfig, num_tokens: int) -> float:
    """Return the peak bytes that the last stage needs for log-probabilities and their gradient.

    Args:
        num_tokens: tokens of a micro-batch.
    """
    columns = padded_vocab_size(spec.vocab_size, config.parallel.tensor_parallel_size)
    columns //= config.parallel.tensor_parallel_size
    chunk = config.batching.logprob_chunk_tokens or default_chunk_tokens(columns)
    size = element_bytes(config)
    logits = min(chunk, num_tokens) * columns * FP32_BYTES
    gradient = columns * spec.hidden_size * (FP32_BYTES + size)
    # three buffers of a chunk: logits, their gradient, and either the entropy gradient or the gradient in 16 bits
    return 3.0 * logits + gradient + num_tokens * spec.hidden_size * 3 * size


def micro_batches_in_flight(stage: int, config: RunConfig, num_micro_batches: int) -> float:
    """Return the peak number of micro-batches whose activations a stage holds in a 1F1B schedule.

    A fraction where virtual stages hold the activations of only some of the stage's layers.
    """
    stages, chunks = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_parallel_size
    if stages == 1:
        return 1.0
    if chunks == 1:
        return float(min(stages - stage, num_micro_batches))
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(warm_up, num_micro_batches * chunks) / chunks


def element_bytes(config: RunConfig) -> int:
    """Bytes of one element of the weights and activations."""
    return torch_dtype(config.model.dtype).itemsize
