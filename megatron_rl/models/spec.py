"""Specification of a decoder-only transformer, independent of any library."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3 frequency scaling of rotary embeddings. Source: transformers' ``llama3`` rope type."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Positions divided by a factor. Source: transformers' ``linear`` rope type."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """YaRN, arXiv 2309.00071. Source: transformers' ``yarn`` rope type."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float
    """Factor on cosines and sines."""


RopeScaling = Llama3Rope | LinearRope | YarnRope


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """The mixture of experts in every layer."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    """Feed-forward columns of one expert."""
    normalize_probabilities: bool
    """Whether the probabilities of the chosen experts are scaled to sum to 1."""


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """Attention to the last ``size`` tokens only, the token itself included."""

    size: int
    first_layer: int = 0
    """First layer with the window; earlier layers attend to all tokens."""


@dataclass(frozen=True, kw_only=True)
class HFNames:
    """Names of a family's feed-forward modules in a Hugging Face checkpoint; the defaults are Llama's."""

    feed_forward: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes and options of a model, all read from its Hugging Face config."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    """Whether the output layer shares the embedding's weight."""
    qkv_bias: bool
    qk_norm: bool
    """RMS norm of each query and key head."""
    moe: MoeSpec | None = None
    """None: the feed-forward block is dense."""
    sliding_window: SlidingWindow | None = None
    hf_names: HFNames = HFNames()

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer (from 0) attends to, the token itself included; None: all."""
        window = self.sliding_window
        return window.size if window is not None and layer >= window.first_layer else None
