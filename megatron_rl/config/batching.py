"""Configuration of mini-batches and micro-batches."""

from dataclasses import dataclass

from megatron_rl.config.checks import positive


@dataclass(frozen=True, kw_only=True)
class BatchingSection:
    """How the sequences of a step are split into optimizer updates and micro-batches."""

    num_mini_batches: int = 1
    """Mini-batches that a step's sequences are split into; each is one optimizer update per epoch (a number of
    mini-batches, where verl's ppo_mini_batch_size gives their size)."""
    num_epochs: int = 1
    """Passes over the sequences of each step (verl's ppo_epochs, TRL's num_iterations)."""
    micro_batch_size: int | None = None
    """Largest number of sequences in one forward pass of one data-parallel rank (verl's ppo_micro_batch_size_per_gpu);
    null: limited by max_tokens_per_micro_batch only."""
    max_tokens_per_micro_batch: int = 16384
    """Largest number of tokens in one forward pass of one rank, padding included (verl's ppo_max_token_len_per_gpu)."""
    packed: bool = True
    """true: pack the sequences of a micro-batch end to end (THD layout, sequence packing); false: pad them to the
    longest."""
    logprob_chunk_tokens: int | None = None
    """Tokens whose logits are held in memory at a time when log-probabilities are computed (slime's
    log_probs_chunk_size); null: as many as fit 256 MiB in fp32."""

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
