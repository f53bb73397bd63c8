"""How many tokens' logits exist at a time."""

# fp32 logits of one chunk, at most; a chunk costs about three times as much while it is worked on
CHUNK_BYTES = 2**28


def default_chunk_tokens(vocab_columns: int) -> int:
    """Tokens of one chunk, for so many columns of the vocabulary on a rank."""
    return max(1, CHUNK_BYTES // (4 * vocab_columns))
