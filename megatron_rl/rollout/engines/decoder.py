"""The embedded engine's model: a decoder-only transformer on Hugging Face weights with a KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.models import ModelSpec, layout_table
from megatron_rl.models.cpu_linear import linear
from megatron_rl.models.rope import inverse_frequencies, softmax_scale
from megatron_rl.models.spec import MoeSpec
from megatron_rl.models.table import EMBEDDING, LM_HEAD
from megatron_rl.rollout.engines.loading import ExpectedTensors
from megatron_rl.weights.layout import hf_shapes

# modules with the same input, fused under the name of the first; gate and up of a feed-forward block are fused too
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")


@dataclass(kw_only=True)
class KVCache:
    """Keys and values of B rows; row b holds ``lengths[b]`` tokens, at the positions from 0 on."""

    keys: list[Tensor]
    """One [B, groups, capacity, head_dim] for each layer."""
    values: list[Tensor]
    """As ``keys``."""
    lengths: Tensor
    """[B] int64."""

    def select(self, rows: Tensor) -> "KVCache":
        """Return the given rows; repetitions are allowed."""
        return KVCache(
            keys=[x[rows] for x in self.keys], values=[x[rows] for x in self.values], lengths=self.lengths[rows]
        )

    def join(self, other: "KVCache") -> "KVCache":
        """Return the rows of both caches, with the larger of their capacities."""
        capacity = max(self.keys[0].size(2), other.keys[0].size(2))

        def stack(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
            return [torch.cat([_widen(a, capacity), _widen(b, capacity)]) for a, b in zip(first, second, strict=True)]

        return KVCache(
            keys=stack(self.keys, other.keys),
            values=stack(self.values, other.values),
            lengths=torch.cat([self.lengths, other.lengths]),
        )


def _widen(cache: Tensor, capacity: int) -> Tensor:
    return F.pad(cache, (0, 0, 0, capacity - cache.size(2)))


class Decoder:
    """The model; ``load`` sets its weights, and may replace them at any time between other calls."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self._shapes = hf_shapes(layout_table(spec, 1))
        self._expected = ExpectedTensors(self._shapes)
        self._weights: dict[str, Tensor] = {}
        """Weights by Hugging Face name; some are views into a fused weight."""
        self._fused: dict[str, Tensor] = {}
        """Concatenated weights with the same input, by the name of the first one."""
        self._allocate()
        self._frequencies = inverse_frequencies(spec).to(device)
        self._scale = softmax_scale(spec)
        self.routes: list[Tensor] = []
        """Experts chosen in the last pass: [B, P, experts per token] int64 of each layer; empty without experts."""

    def weights(self) -> list[Tensor]:
        """Return all weights."""
        return list(self._weights.values())

    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Copy full Hugging Face tensors into the weights.

        Raises:
            WeightSyncError: a name is unexpected, double or missing, or a shape is wrong.
        """
        for name, tensor in self._expected.watch(tensors):
            self._weights[name].copy_(tensor)
        self._expected.check_complete()

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Return an empty cache with a capacity of ``capacity`` tokens in each row."""
        shape = (rows, self.spec.num_query_groups, capacity, self.spec.head_dim)
        return KVCache(
            keys=[torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self.spec.num_layers)],
            values=[torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self.spec.num_layers)],
            lengths=torch.zeros(rows, dtype=torch.int64, device=self.device),
        )

    @torch.no_grad()
    def prefill(self, prompts: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """Fill an empty cache with prompts; return the logits [B, V] float32 after each prompt.

        Args:
            prompts: [B, P] int64, padded on the right.
            lengths: [B] int64, tokens of each prompt.
            cache: cache with B rows and a capacity of at least P.
        """
        hidden = self._whole_pass(prompts, cache)
        cache.lengths.copy_(lengths)
        return self._logits(hidden[torch.arange(len(lengths), device=self.device), lengths - 1])

    @torch.no_grad()
    def loglikelihood(self, token_ids: Tensor, start: int) -> Tensor:
        """Return [T - start] float32, the log-probabilities at temperature 1 of the tokens [T] from ``start`` on."""
        hidden = self._whole_pass(token_ids[None, :-1], None)[0, start - 1 :]
        return self._logits(hidden).log_softmax(-1).gather(1, token_ids[start:, None])[:, 0]

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: KVCache, working: Tensor) -> Tensor:
        """Append one token to every row; return the logits [B, V] float32 after it.

        Args:
            tokens: [B] int64.
            cache: cache with B rows.
            working: [B] bool; the lengths of the other rows do not grow.
        """
        self.routes.clear()
        positions = cache.lengths
        longest, shortest = int(positions.max()), int(positions.min())
        width = longest + 1
        mask = None
        if shortest < longest:
            mask = (torch.arange(width, device=self.device) <= positions[:, None])[:, None, None]  # [B, 1, 1, width]
        rows = torch.arange(tokens.size(0), device=self.device)
        rotation = self._rotation(positions[:, None])
        hidden = F.embedding(tokens[:, None], self._weights[EMBEDDING])
        for layer in range(self.spec.num_layers):
            query, key, value = self._project(layer, hidden, rotation)
            keys, values = cache.keys[layer], cache.values[layer]
            if mask is None:
                keys[:, :, longest], values[:, :, longest] = key[:, :, 0], value[:, :, 0]
            else:
                keys[rows, :, positions], values[rows, :, positions] = key[:, :, 0], value[:, :, 0]
            # the heads of a group take the dimension of the positions, so that they share its keys without copies
            grouped = query.reshape(query.size(0), self.spec.num_query_groups, -1, self.spec.head_dim)
            attended = F.scaled_dot_product_attention(
                grouped,
                keys[:, :, :width],
                values[:, :, :width],
                attn_mask=self._within_window(layer, mask, positions, width),
                scale=self._scale,
            )
            hidden = self._finish_layer(layer, hidden, attended.reshape(query.shape))
        cache.lengths += working
        return self._logits(hidden[:, 0])

    def _whole_pass(self, prompts: Tensor, cache: KVCache | None) -> Tensor:
        """Return hidden states [B, P, H] of whole prompts [B, P]; write keys and values to the cache, if any."""
        self.routes.clear()
        width = prompts.size(1)
        rotation = self._rotation(torch.arange(width, device=self.device))
        hidden = F.embedding(prompts, self._weights[EMBEDDING])
        for layer in range(self.spec.num_layers):
            query, key, value = self._project(layer, hidden, rotation)
            if cache is not None:
                cache.keys[layer][:, :, :width] = key
                cache.values[layer][:, :, :width] = value
            seen = self._seen_in_prompt(layer, width)
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, is_causal=seen is None, scale=self._scale, enable_gqa=True
            )
            hidden = self._finish_layer(layer, hidden, attended)
        return hidden

    def _seen_in_prompt(self, layer: int, width: int) -> Tensor | None:
        """Return [width, width] bool, the tokens that each token attends to; None: itself and all before it."""
        window = self.spec.window_of(layer)
        if window is None or width <= window:
            return None
        return torch.ones(width, width, dtype=torch.bool, device=self.device).tril().triu(1 - window)

    def _within_window(self, layer: int, mask: Tensor | None, positions: Tensor, width: int) -> Tensor | None:
        """Restrict ``mask`` to the layer's sliding window.

        Returns:
            [B, 1, 1, width] bool, what the tokens at ``positions`` [B] attend to; None: everything.
        """
        window = self.spec.window_of(layer)
        if window is None or width <= window:
            return mask
        near = (torch.arange(width, device=self.device) > positions[:, None] - window)[:, None, None]
        return near if mask is None else near & mask

    def _allocate(self) -> None:
        """Allocate the weights; those with the same input are contiguous, so that they share a matrix product."""
        groups = (ATTENTION_INPUTS, (self.spec.hf_names.gate, self.spec.hf_names.up))
        for name, shape in self._shapes.items():
            prefix, _, last = name.rpartition(".")
            prefix, _, module = prefix.rpartition(".")
            siblings = next((group for group in groups if module in group), None)
            if siblings is None:
                self._weights[name] = torch.empty(shape, dtype=self.dtype, device=self.device)
            elif module == siblings[0]:
                names = [f"{prefix}.{sibling}.{last}" for sibling in siblings]
                sizes = [self._shapes[sibling][0] for sibling in names]
                whole = torch.empty((sum(sizes), *shape[1:]), dtype=self.dtype, device=self.device)
                self._fused[name] = whole
                self._weights |= dict(zip(names, whole.split(sizes), strict=True))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [..., 1, P, dim] of positions [..., P], the same for every layer."""
        angles = positions[..., None].float() * self._frequencies  # [..., P, dim / 2]
        angles = torch.cat([angles, angles], -1).unsqueeze(-3)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _project(self, layer: int, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries [B, heads, P, dim], rotated keys and plain values [B, groups, P, dim]."""
        prefix = f"model.layers.{layer}."
        normed = self._norm(hidden, prefix + "input_layernorm.weight")
        bias = self._fused[prefix + "self_attn.q_proj.bias"] if self.spec.qkv_bias else None
        projected = linear(normed, self._fused[prefix + "self_attn.q_proj.weight"], bias)
        heads = projected.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)
        num_heads, groups = self.spec.num_heads, self.spec.num_query_groups
        if self.spec.qk_norm:
            query, key, value = heads.split([num_heads, groups, groups], 1)
            query = self._norm(query, prefix + "self_attn.q_norm.weight")
            key = self._norm(key, prefix + "self_attn.k_norm.weight")
            return _rotate(query, *rotation), _rotate(key, *rotation), value
        rotated, value = heads.split([num_heads + groups, groups], 1)
        query, key = _rotate(rotated, *rotation).split([num_heads, groups], 1)
        return query, key, value

    def _finish_layer(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}."
        attended = attended.transpose(1, 2).flatten(2)
        hidden = hidden + linear(attended, self._weights[prefix + "self_attn.o_proj.weight"])
        normed = self._norm(hidden, prefix + "post_attention_layernorm.weight")
        block = f"{prefix}{self.spec.hf_names.feed_forward}."
        if self.spec.moe is not None:
            return hidden + self._experts(normed, block, self.spec.moe)
        return hidden + self._feed_forward(normed, block)

    def _feed_forward(self, normed: Tensor, prefix: str) -> Tensor:
        names = self.spec.hf_names
        gate, up = linear(normed, self._fused[f"{prefix}{names.gate}.weight"]).chunk(2, -1)
        return linear(F.silu(gate) * up, self._weights[f"{prefix}{names.down}.weight"])

    def _experts(self, normed: Tensor, prefix: str, moe: MoeSpec) -> Tensor:
        """Return [B, P, H], the outputs of each token's experts weighted by their probabilities."""
        tokens = normed.flatten(0, 1)
        # the router is computed in float32, whatever the dtype of the weights
        scores = F.linear(tokens.float(), self._weights[prefix + "gate.weight"].float()).softmax(-1)
        weights, chosen = scores.topk(moe.experts_per_token, dim=-1)  # [B * P, experts per token]
        self.routes.append(chosen.view(*normed.shape[:2], -1))
        if moe.normalize_probabilities:
            weights = weights / weights.sum(-1, keepdim=True)
        output = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            rows, slot = (chosen == expert).nonzero(as_tuple=True)
            part = self._feed_forward(tokens[rows], f"{prefix}experts.{expert}.")
            output.index_add_(0, rows, part * weights[rows, slot, None].to(part.dtype))
        return output.view_as(normed)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self._weights[name], self.spec.norm_epsilon)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self._weights[EMBEDDING if self.spec.tied_embeddings else LM_HEAD]
        return linear(self._norm(hidden, "model.norm.weight"), head).float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
