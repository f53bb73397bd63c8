"""Aggregation modes as data: one weight per sequence, so that no other place normalises.

The training loss is sum(weight * token loss) / num_tokens over all tokens with loss of an update.
"""

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]


def sequence_loss_weights(lengths: Tensor, aggregation: Aggregation, *, constant_length: int) -> Tensor:
    """The weight of each token of each sequence.

    Args:
        lengths: [N] int64, tokens with loss in each sequence of one update; 0 takes no part.
        aggregation: token_mean (DAPO, arXiv 2503.14476): every token alike;
            sequence_mean (GRPO, arXiv 2402.03300): mean over a sequence, then over sequences;
            constant_length (Dr. GRPO, arXiv 2503.20783): sum over a sequence / constant_length,
            then the mean over sequences.
        constant_length: divisor in tokens, used by that mode only.

    Returns:
        [N] float64.
    """
    taking_part = lengths > 0
    num_tokens, num_sequences = lengths.sum().double(), taking_part.sum().double()
    if aggregation == "token_mean":
        return taking_part.double()
    per_sequence = num_tokens / num_sequences.clamp(min=1)
    if aggregation == "sequence_mean":
        return taking_part * per_sequence / lengths.clamp(min=1)
    return taking_part * torch.full_like(lengths, 1, dtype=torch.float64) * per_sequence / constant_length
