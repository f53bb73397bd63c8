"""How a batch of sequences becomes optimizer updates and micro-batches."""

from dataclasses import dataclass

from megatron_rl.config.checks import positive


@dataclass(frozen=True, kw_only=True)
class BatchingSection:
    """How a batch of sequences becomes optimizer updates and micro-batches."""

    num_mini_batches: int = 1
    """Optimizer updates for each batch of rollouts (mini-batches)."""
    num_epochs: int = 1
    """Passes over each batch of rollouts."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass of one rank; null: bounded by tokens alone."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens in one forward pass of one rank, padding counted in."""
    packed: bool = True
    """true: sequences one behind the other (THD); false: padded to the longest."""
    logprob_chunk_tokens: int | None = None
    """Tokens whose logits exist at a time; null: as many as fit 256 MiB in fp32."""

    def __post_init__(self) -> None:
        positive(
            "batching",
            self,
            "num_mini_batches",
            "num_epochs",
            "micro_batch_size",
            "max_tokens_per_micro_batch",
            "logprob_chunk_tokens",
        )
