"""Aggregation of token losses, expressed as one weight per sequence; nothing else normalises the loss.

The training loss is sum(weight * token loss) / num_tokens over all tokens with loss of an update.
"""

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]


def sequence_loss_weights(lengths: Tensor, aggregation: Aggregation, *, constant_length: int) -> Tensor:
    """Return the loss weight of the tokens of each sequence.

    Args:
        lengths: [N] int64, tokens with loss in each sequence of one update; sequences with 0 are ignored.
        aggregation: token_mean (DAPO, arXiv 2503.14476): mean over tokens;
            sequence_mean (GRPO, arXiv 2402.03300): mean over a sequence, then over sequences;
            constant_length (Dr. GRPO, arXiv 2503.20783): sum over a sequence / constant_length,
            then the mean over sequences.
        constant_length: divisor of aggregation constant_length, in tokens.

    Returns:
        [N] float64.
    """
    has_loss = lengths > 0
    num_tokens, num_sequences = lengths.sum().double(), has_loss.sum().double()
    if aggregation == "token_mean":
        return has_loss.double()
    per_sequence = num_tokens / num_sequences.clamp(min=1)
    if aggregation == "sequence_mean":
        return has_loss * per_sequence / lengths.clamp(min=1)
    return has_loss * torch.full_like(lengths, 1, dtype=torch.float64) * per_sequence / constant_length
