"""Number of tokens whose logits are computed at a time."""

# maximum bytes of the fp32 logits of a chunk; its computation takes about three times as much memory
CHUNK_BYTES = 2**28


def default_chunk_tokens(vocab_columns: int) -> int:
    """Tokens per chunk.

    Args:
        vocab_columns: columns of the vocabulary on a rank.
    """
    return max(1, CHUNK_BYTES // (4 * vocab_columns))
