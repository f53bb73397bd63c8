"""Labelled sequences for a reward model, and their micro-batches."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_rl.batching.pack import balance, micro_batches
from megatron_rl.batching.sequences import bare_sequence
from megatron_rl.config.batching import BatchingSection
from megatron_rl.types import TrainSequence


def labelled_sequence(token_ids: Sequence[int], ends: Sequence[int], labels: Sequence[float] = ()) -> TrainSequence:
    """A training sequence with loss at the labelled tokens, plus one extra token at its end.

    A model's output at position t belongs to token t + 1, so the loss mask is true at the token after each labelled
    one. The extra token follows the last one; its content is never used.

    Args:
        ends: indices of the tokens that are labelled or to be scored.
        labels: label of each of these tokens, stored in ``returns`` where the loss mask is true; empty: no labels.
    """
    tokens = torch.tensor([*token_ids, token_ids[-1]])
    positions = torch.tensor(ends, dtype=torch.int64) + 1
    mask = torch.zeros(tokens.numel(), dtype=torch.bool)
    mask[positions] = True
    returns = torch.zeros(tokens.numel())
    if labels:
        returns[positions] = torch.tensor(labels)
    return replace(bare_sequence(tokens, mask), returns=returns)


def share_out(
    lengths: Sequence[Sequence[int]],
    config: BatchingSection,
    *,
    dp_rank: int,
    dp_size: int,
    multiple_of: int = 1,
) -> list[list[int]]:
    """This data-parallel rank's micro-batches, as indices of examples.

    Every rank has the same number of micro-batches; some may be empty.

    Args:
        lengths: tokens of each sequence of each example; the sequences of an example stay together.
        multiple_of: the number of micro-batches is a multiple of this.
    """
    sizes = [len(example) * max(example) if not config.packed else sum(example) for example in lengths]
    members = balance(sizes, dp_size)
    limit = config.micro_batch_size
    return micro_batches(
        members,
        sizes,
        max_sequences=None if limit is None else max(1, limit // len(lengths[0])),
        max_tokens=config.max_tokens_per_micro_batch,
        packed=config.packed,
        multiple_of=multiple_of,
    )[dp_rank]
