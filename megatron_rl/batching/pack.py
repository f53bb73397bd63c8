"""Assign sequences to data-parallel ranks and micro-batches.

Everything here is a pure function of the lengths, so that every rank computes the same plan.
"""

from collections.abc import Sequence


def balance(lengths: Sequence[int], num_bins: int, *, capacity: int | None = None) -> list[list[int]]:
    """Distribute indices over bins with even token sums: longest first, to the bin with the smallest sum.

    Args:
        lengths: tokens of every sequence.
        capacity: maximum number of indices in a bin; None: the number of indices over ``num_bins``, rounded up.

    Returns:
        The indices of each bin, in ascending order.

    Source: Graham's longest-processing-time rule.
    """
    capacity = capacity or -(-len(lengths) // num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    sums = [0] * num_bins
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = min((b for b in range(num_bins) if len(bins[b]) < capacity), key=lambda b: (sums[b], b))
        bins[target].append(index)
        sums[target] += lengths[index]
    return [sorted(members) for members in bins]


def imbalance(sums: Sequence[int]) -> float:
    """Largest token sum of a rank divided by the mean; 1.0 is even."""
    return max(sums) * len(sums) / sum(sums)


def micro_batches(
    ranks: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    max_sequences: int | None,
    max_tokens: int,
    packed: bool,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Split every rank's sequences into micro-batches within the limits, the same number on each rank.

    A rank with fewer sequences than micro-batches gets empty ones at its end, which the caller fills
    with a sequence that has no loss.

    Args:
        ranks: indices into ``lengths`` of each rank.
        lengths: tokens of every sequence.
        max_sequences: maximum number of sequences in a micro-batch; None: no limit.
        max_tokens: maximum number of tokens in a micro-batch, including padding to the longest unless ``packed``.
        packed: sequences are packed one after the other, without padding.
        multiple_of: the number of micro-batches is a multiple of this, as the interleaved pipeline schedule needs.
    """
    if packed:
        count = max(1, *(_min_num_packs(members, lengths, max_sequences, max_tokens) for members in ranks))
        count += -count % multiple_of
        return [_even_packs(members, lengths, count, max_sequences) for members in ranks]
    batches_of_rank = [_length_sorted_batches(members, lengths, max_sequences, max_tokens) for members in ranks]
    count = max(1, *map(len, batches_of_rank))
    count += -count % multiple_of
    return [_halve_largest(batches, count) for batches in batches_of_rank]


def _even_packs(
    members: Sequence[int], lengths: Sequence[int], count: int, max_sequences: int | None
) -> list[list[int]]:
    """Split into ``count`` packs with even token sums, empty ones last."""
    bins = balance([lengths[i] for i in members], count, capacity=max_sequences or max(1, len(members)))
    return sorted(([members[i] for i in pack] for pack in bins), key=lambda pack: (not pack, pack[:1]))


def _min_num_packs(members: Sequence[int], lengths: Sequence[int], max_sequences: int | None, max_tokens: int) -> int:
    """Smallest number of even packs within the limits."""
    total = sum(lengths[i] for i in members)
    count = max(1, -(-total // max_tokens), -(-len(members) // (max_sequences or max(1, len(members)))))
    while any(
        sum(lengths[i] for i in pack) > max_tokens and len(pack) > 1
        for pack in _even_packs(members, lengths, count, max_sequences)
    ):
        count += 1
    return count


def _length_sorted_batches(
    members: Sequence[int], lengths: Sequence[int], max_sequences: int | None, max_tokens: int
) -> list[list[int]]:
    """Batch sequences of similar length, to minimize padding."""
    batches: list[list[int]] = []
    for index in sorted(members, key=lambda i: (-lengths[i], i)):
        if (
            not batches
            or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens
            or len(batches[-1]) == max_sequences
        ):
            batches.append([])
        batches[-1].append(index)
    return batches


def _halve_largest(batches: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Make ``count`` micro-batches by repeatedly halving the one with the most sequences."""
    current = [list(batch) for batch in batches]
    while len(current) < count:
        largest = max(range(len(current)), key=lambda i: len(current[i]), default=None)
        if largest is None or len(current[largest]) < 2:
            current.append([])
            continue
        batch, half = current[largest], len(current[largest]) // 2
        current[largest : largest + 1] = [batch[:half], batch[half:]]
    return current
