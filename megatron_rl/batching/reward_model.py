"""Judged sequences as a model reads them, and their micro-batches."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_rl.batching.pack import balance, micro_batches
from megatron_rl.batching.sequences import bare_sequence
from megatron_rl.config.batching import BatchingSection
from megatron_rl.types import TrainSequence


def labelled_sequence(token_ids: Sequence[int], ends: Sequence[int], labels: Sequence[float] = ()) -> TrainSequence:
    """Tokens of which some are judged, with one more behind them.

    A model says at a token what it expects of the next one, so the loss mask is true behind each judged token; behind
    the last one of all a token stands that nothing reads.

    Args:
        labels: as ``returns`` in the same places; empty: none.
    """
    tokens = torch.tensor([*token_ids, token_ids[-1]])
    behind = torch.tensor(ends, dtype=torch.int64) + 1
    mask = torch.zeros(tokens.numel(), dtype=torch.bool)
    mask[behind] = True
    returns = torch.zeros(tokens.numel())
    if labels:
        returns[behind] = torch.tensor(labels)
    return replace(bare_sequence(tokens, mask), returns=returns)


def share_out(
    lengths: Sequence[Sequence[int]],
    config: BatchingSection,
    *,
    dp_rank: int,
    dp_size: int,
    multiple_of: int = 1,
) -> list[list[int]]:
    """This data-parallel rank's micro-batches of examples, as many as on every other rank; some may be empty.

    Args:
        lengths: tokens of each example's sequences, which stay together.
        multiple_of: what the number of micro-batches must divide by.
    """
    sizes = [len(one) * max(one) if not config.packed else sum(one) for one in lengths]
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
