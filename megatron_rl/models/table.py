"""The layout table of a decoder-only model: Megatron parameter name -> slices of Hugging Face tensors."""

import math
from dataclasses import replace
from typing import Literal

from megatron_rl.models.spec import ModelSpec
from megatron_rl.weights.layout import Layout, gated, grouped_qkv, replicated, row, vocabulary

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
VALUE_HEAD = "score.weight"

Head = Literal["language", "value"]
"""Output of the model at each token: logits over the vocabulary, or one value."""


# The vocabulary is padded to a multiple of every usual tensor-parallel size, so that the shapes in a checkpoint do
# not depend on it.
VOCAB_MULTIPLE = 64


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Return the vocabulary size rounded up so that tensor-parallel ranks can split it evenly."""
    multiple = math.lcm(VOCAB_MULTIPLE, tp_size)
    return -(-vocab_size // multiple) * multiple


def layout_table(spec: ModelSpec, tp_size: int, head: Head = "language") -> dict[str, Layout]:
    """Return the layout of every parameter; layers are numbered globally, across pipeline stages.

    With tied embeddings, ``output_layer.weight`` is the copy in a last pipeline stage that has no embedding.
    """
    hidden = spec.hidden_size
    padded = padded_vocab_size(spec.vocab_size, tp_size)
    output = EMBEDDING if spec.tied_embeddings else LM_HEAD
    table = {
        "embedding.word_embeddings.weight": vocabulary(EMBEDDING, spec.vocab_size, padded, hidden),
        "output_layer.weight": (
            vocabulary(output, spec.vocab_size, padded, hidden)
            if head == "language"
            else replicated(VALUE_HEAD, 1, hidden)
        ),
        "decoder.final_layernorm.weight": replicated("model.norm.weight", hidden),
    }
    for layer in range(spec.num_layers):
        table |= _layer(spec, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    return table


def ignored_names(spec: ModelSpec, head: Head = "language") -> set[str]:
    """Return names of tensors that a model folder may contain and that are not read."""
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(spec.num_layers)}
    return buffers | ({LM_HEAD} if spec.tied_embeddings or head == "value" else set())


def _layer(spec: ModelSpec, megatron: str, hf: str) -> dict[str, Layout]:
    hidden, heads, groups, dim = spec.hidden_size, spec.num_heads, spec.num_query_groups, spec.head_dim
    q, k, v = (f"{hf}self_attn.{x}_proj." for x in "qkv")
    attention = f"{megatron}self_attention."
    block = f"{hf}{spec.hf_names.feed_forward}."
    table = {
        f"{megatron}input_layernorm.weight": replicated(f"{hf}input_layernorm.weight", hidden),
        f"{attention}linear_qkv.weight": grouped_qkv(
            q + "weight", k + "weight", v + "weight", heads, groups, dim, hidden
        ),
        f"{attention}linear_proj.weight": row(f"{hf}self_attn.o_proj.weight", hidden, heads * dim),
        f"{megatron}pre_mlp_layernorm.weight": replicated(f"{hf}post_attention_layernorm.weight", hidden),
    }
    if spec.moe is None:
        table |= _feed_forward(spec, f"{megatron}mlp.", block, spec.ffn_hidden_size)
    else:
        table[f"{megatron}mlp.router.weight"] = replicated(f"{block}gate.weight", spec.moe.num_experts, hidden)
        for expert in range(spec.moe.num_experts):
            layouts = _feed_forward(
                spec,
                f"{megatron}mlp.experts.local_experts.{expert}.",
                f"{block}experts.{expert}.",
                spec.moe.ffn_hidden_size,
            )
            table |= {name: replace(layout, expert=True) for name, layout in layouts.items()}
    if spec.qkv_bias:
        table[f"{attention}linear_qkv.bias"] = grouped_qkv(q + "bias", k + "bias", v + "bias", heads, groups, dim)
    if spec.qk_norm:
        table[f"{attention}q_layernorm.weight"] = replicated(f"{hf}self_attn.q_norm.weight", dim)
        table[f"{attention}k_layernorm.weight"] = replicated(f"{hf}self_attn.k_norm.weight", dim)
    return table


def _feed_forward(spec: ModelSpec, megatron: str, hf: str, rows: int) -> dict[str, Layout]:
    hidden, names = spec.hidden_size, spec.hf_names
    return {
        f"{megatron}linear_fc1.weight": gated(f"{hf}{names.gate}.weight", f"{hf}{names.up}.weight", rows, hidden),
        f"{megatron}linear_fc2.weight": row(f"{hf}{names.down}.weight", hidden, rows),
    }
