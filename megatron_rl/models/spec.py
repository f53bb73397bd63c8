"""What a decoder-only transformer is, independent of any library."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling of rotary embeddings. Source: transformers' ``llama3`` rope type."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes and switches of a model, read from its Hugging Face config alone."""

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
    """The output layer shares the embedding's weight."""
    qkv_bias: bool
    qk_norm: bool
    """RMS norm of each query and key head."""
