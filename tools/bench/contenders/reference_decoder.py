"""The reference loop's decoder: transformers' Qwen2 weights, torch operations and a key/value cache.

All prompts have the same length, and so have all completions, so that only the prompt needs a mask.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ReferenceDecoder:
    """Sampler for a Qwen2ForCausalLM."""

    def __init__(self, model: Any, longest: int) -> None:
        config = model.config
        self._model = model
        self._heads: int = config.num_attention_heads
        self._groups: int = config.num_key_value_heads
        self._dim: int = config.hidden_size // config.num_attention_heads
        self._epsilon: float = config.rms_norm_eps
        half = torch.arange(0, self._dim, 2).float() / self._dim
        angles = torch.outer(torch.arange(longest).float(), config.rope_parameters["rope_theta"] ** -half)
        self._cos, self._sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        self._layers: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def sample(self, prompts: Tensor, group_size: int, new_tokens: int) -> Tensor:
        """Sampled tokens [N * group_size, new_tokens] at temperature 1; prompts [N, P] are computed once each."""
        self._fuse()
        width = prompts.size(1)
        rows = prompts.size(0) * group_size
        shape = (rows, self._groups, width + new_tokens, self._dim)
        caches = [(torch.empty(shape), torch.empty(shape)) for _ in self._layers]
        logits = self._forward(prompts, 0, caches, group_size).repeat_interleave(group_size, 0)
        sampled: list[Tensor] = []
        for index in range(new_tokens):
            # the largest of p / Exponential(1) is a draw from p
            probabilities = logits.softmax(-1)
            sampled.append((probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(-1))
            if index + 1 < new_tokens:
                logits = self._forward(sampled[-1][:, None], width + index, caches, 1)
        return torch.stack(sampled, 1)

    def _fuse(self) -> None:
        """Fuse the current weights: one matrix for queries, keys and values, one for gate and up."""
        self._layers = []
        for layer in self._model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            self._layers.append(
                (
                    layer.input_layernorm.weight,
                    torch.cat([projection.weight for projection in projections]),
                    torch.cat([projection.bias for projection in projections]),
                    attention.o_proj.weight,
                    layer.post_attention_layernorm.weight,
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                    mlp.down_proj.weight,
                )
            )

    def _forward(self, tokens: Tensor, start: int, caches: list[tuple[Tensor, Tensor]], copies: int) -> Tensor:
        """Logits after the last token of each row; writes keys and values into ``copies`` rows of the caches."""
        stop = start + tokens.size(1)
        cos, sin = self._cos[start:stop], self._sin[start:stop]
        hidden = F.embedding(tokens, self._model.model.embed_tokens.weight)
        for (norm1, qkv, bias, out, norm2, gate_up, down), (keys, values) in zip(self._layers, caches, strict=True):
            heads = F.linear(self._norm(hidden, norm1), qkv, bias).unflatten(-1, (-1, self._dim)).transpose(1, 2)
            query, key, value = heads.split([self._heads, self._groups, self._groups], 1)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            keys[:, :, start:stop] = key.repeat_interleave(copies, 0) if copies > 1 else key
            values[:, :, start:stop] = value.repeat_interleave(copies, 0) if copies > 1 else value
            if start == 0:
                mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            else:  # the heads of a group are passed as positions, so that keys need no copies
                grouped = query.reshape(query.size(0), self._groups, -1, self._dim)
                mixed = F.scaled_dot_product_attention(grouped, keys[:, :, :stop], values[:, :, :stop])
                mixed = mixed.reshape(query.shape)
            hidden = hidden + F.linear(mixed.transpose(1, 2).flatten(2), out)
            gate, up = F.linear(self._norm(hidden, norm2), gate_up).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, down)
        last = self._norm(hidden[:, -1], self._model.model.norm.weight)
        return F.linear(last, self._model.lm_head.weight)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.size(-1),), weight, self._epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
