"""A decoder-only transformer on Hugging Face weights with a key/value cache: the embedded engine's model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.errors import WeightSyncError
from megatron_rl.models import ModelSpec, layout_table
from megatron_rl.models.rope import inverse_frequencies
from megatron_rl.models.table import EMBEDDING, LM_HEAD
from megatron_rl.weights.layout import hf_shapes


@dataclass(kw_only=True)
class KVCache:
    """Keys and values of some rows; row b holds ``lengths[b]`` tokens from place 0 on."""

    keys: list[Tensor]
    """One [B, groups, capacity, head_dim] for each layer."""
    values: list[Tensor]
    lengths: Tensor
    """[B] int64."""

    def select(self, rows: Tensor) -> "KVCache":
        """Some of the rows, repetitions allowed."""
        return KVCache(
            keys=[x[rows] for x in self.keys], values=[x[rows] for x in self.values], lengths=self.lengths[rows]
        )

    def join(self, other: "KVCache") -> "KVCache":
        """The rows of both, with the larger capacity."""
        capacity = max(self.keys[0].size(2), other.keys[0].size(2))

        def stack(mine: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [torch.cat([_widen(a, capacity), _widen(b, capacity)]) for a, b in zip(mine, theirs, strict=True)]

        return KVCache(
            keys=stack(self.keys, other.keys),
            values=stack(self.values, other.values),
            lengths=torch.cat([self.lengths, other.lengths]),
        )


def _widen(cache: Tensor, capacity: int) -> Tensor:
    return F.pad(cache, (0, 0, 0, capacity - cache.size(2)))


class Decoder:
    """The model; weights arrive by ``load`` and may be replaced at any time between calls."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self._shapes = hf_shapes(layout_table(spec, 1))
        self._weights: dict[str, Tensor] = {}
        self._frequencies = inverse_frequencies(spec).to(device)

    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Copy whole tensors in.

        Raises:
            WeightSyncError: a name is unexpected, double or missing, or a shape is wrong.
        """
        seen: set[str] = set()
        for name, tensor in tensors:
            if name not in self._shapes or name in seen:
                raise WeightSyncError(
                    f"weights for the engine: {name} came {'twice' if name in seen else 'unexpectedly'}."
                )
            if tuple(tensor.shape) != self._shapes[name]:
                raise WeightSyncError(
                    f"weights for the engine: {name} is {tuple(tensor.shape)}, expected {self._shapes[name]}."
                )
            seen.add(name)
            self._store(name, tensor)
        missing = sorted(set(self._shapes) - seen)
        if missing:
            raise WeightSyncError(f"weights for the engine: {len(missing)} tensors did not come, first {missing[0]}.")

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache."""
        shape = (rows, self.spec.num_query_groups, capacity, self.spec.head_dim)
        return KVCache(
            keys=[torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self.spec.num_layers)],
            values=[torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self.spec.num_layers)],
            lengths=torch.zeros(rows, dtype=torch.int64, device=self.device),
        )

    @torch.no_grad()
    def prefill(self, prompts: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """Fill an empty cache; [B, V] float32 logits behind each prompt.

        Args:
            prompts: [B, P] int64, padded on the right.
            lengths: [B] int64.
        """
        width = prompts.size(1)
        positions = torch.arange(width, device=self.device).expand_as(prompts)
        hidden = F.embedding(prompts, self._weights[EMBEDDING])
        for layer in range(self.spec.num_layers):
            query, key, value = self._project(layer, hidden, positions)
            cache.keys[layer][:, :, :width] = key
            cache.values[layer][:, :, :width] = value
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            hidden = self._finish_layer(layer, hidden, attended)
        cache.lengths.copy_(lengths)
        return self._logits(hidden[torch.arange(len(lengths), device=self.device), lengths - 1])

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: KVCache, working: Tensor) -> Tensor:
        """Append one token to every row; [B, V] float32 logits behind it.

        Args:
            tokens: [B] int64.
            working: [B] bool; rows outside it do not grow.
        """
        places = cache.lengths
        longest, shortest = int(places.max()), int(places.min())
        width = longest + 1
        mask = None
        if shortest < longest:
            mask = (torch.arange(width, device=self.device) <= places[:, None])[:, None, None]  # [B, 1, 1, width]
        rows = torch.arange(tokens.size(0), device=self.device)
        hidden = F.embedding(tokens[:, None], self._weights[EMBEDDING])
        for layer in range(self.spec.num_layers):
            query, key, value = self._project(layer, hidden, places[:, None])
            keys, values = cache.keys[layer], cache.values[layer]
            keys[rows, :, places] = key[:, :, 0]
            values[rows, :, places] = value[:, :, 0]
            attended = F.scaled_dot_product_attention(
                query, keys[:, :, :width], values[:, :, :width], attn_mask=mask, enable_gqa=True
            )
            hidden = self._finish_layer(layer, hidden, attended)
        cache.lengths += working
        return self._logits(hidden[:, 0])

    def _store(self, name: str, tensor: Tensor) -> None:
        if name in self._weights:
            self._weights[name].copy_(tensor)
        else:
            self._weights[name] = tensor.to(self.device, self.dtype, copy=True)

    def _project(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, heads, P, dim], keys and values [B, groups, P, dim], rotated."""
        prefix = f"model.layers.{layer}."
        normed = self._norm(hidden, prefix + "input_layernorm.weight")
        query, key, value = (self._heads(normed, f"{prefix}self_attn.{x}_proj.") for x in "qkv")
        if self.spec.qk_norm:
            query = self._norm(query, prefix + "self_attn.q_norm.weight")
            key = self._norm(key, prefix + "self_attn.k_norm.weight")
        angles = positions[..., None].float() * self._frequencies  # [B, P, dim / 2]
        angles = torch.cat([angles, angles], -1)[:, None]
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return _rotate(query, cos, sin), _rotate(key, cos, sin), value

    def _heads(self, hidden: Tensor, prefix: str) -> Tensor:
        bias = self._weights[prefix + "bias"] if self.spec.qkv_bias else None
        projected = F.linear(hidden, self._weights[prefix + "weight"], bias)
        return projected.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def _finish_layer(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}."
        attended = attended.transpose(1, 2).flatten(2)
        hidden = hidden + F.linear(attended, self._weights[prefix + "self_attn.o_proj.weight"])
        normed = self._norm(hidden, prefix + "post_attention_layernorm.weight")
        gate = F.silu(F.linear(normed, self._weights[prefix + "mlp.gate_proj.weight"]))
        up = F.linear(normed, self._weights[prefix + "mlp.up_proj.weight"])
        return hidden + F.linear(gate * up, self._weights[prefix + "mlp.down_proj.weight"])

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self._weights[name], self.spec.norm_epsilon)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self._weights[EMBEDDING if self.spec.tied_embeddings else LM_HEAD]
        return F.linear(self._norm(hidden, "model.norm.weight"), head).float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
