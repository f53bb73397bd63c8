"""Which sequence goes to which data-parallel rank and micro-batch.

Everything here is a pure function of the lengths, so that every rank computes the same plan.
"""

from collections.abc import Sequence


def balance(lengths: Sequence[int], num_bins: int, *, capacity: int | None = None) -> list[list[int]]:
    """Indices shared out over bins so that token sums are even: longest first, to the emptiest bin.

    Args:
        lengths: tokens of every sequence.
        capacity: most indices in a bin; None: as many as make equal counts where the number divides.

    Returns:
        the indices of each bin in ascending order.

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
    """How much longer the fullest rank works than the mean one; 1.0 is even."""
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
    """Every rank's sequences in micro-batches within the limits, as many on each rank.

    A rank with fewer sequences than that gets empty micro-batches at its end, which the caller fills
    with a sequence that has no loss.

    Args:
        ranks: each rank's places in ``lengths``.
        lengths: tokens of every sequence.
        max_sequences: most sequences in one micro-batch; None: no limit.
        max_tokens: most tokens in one, padding to the longest counted in unless ``packed``.
        packed: sequences one behind the other.
        multiple_of: what the number must divide by, as the interleaved pipeline schedule needs.
    """
    if packed:
        count = max(1, *(_fewest(members, lengths, max_sequences, max_tokens) for members in ranks))
        count += -count % multiple_of
        return [_even(members, lengths, count, max_sequences) for members in ranks]
    runs = [_runs(members, lengths, max_sequences, max_tokens) for members in ranks]
    count = max(1, *map(len, runs))
    count += -count % multiple_of
    return [_split(run, count) for run in runs]


def _even(members: Sequence[int], lengths: Sequence[int], count: int, max_sequences: int | None) -> list[list[int]]:
    """So many packs with even token sums, empty ones last."""
    bins = balance([lengths[i] for i in members], count, capacity=max_sequences or max(1, len(members)))
    return sorted(([members[i] for i in one] for one in bins), key=lambda one: (not one, one[:1]))


def _fewest(members: Sequence[int], lengths: Sequence[int], max_sequences: int | None, max_tokens: int) -> int:
    """The smallest number of even packs that keep the limits."""
    total = sum(lengths[i] for i in members)
    count = max(1, -(-total // max_tokens), -(-len(members) // (max_sequences or max(1, len(members)))))
    while any(
        sum(lengths[i] for i in one) > max_tokens and len(one) > 1
        for one in _even(members, lengths, count, max_sequences)
    ):
        count += 1
    return count


def _runs(
    members: Sequence[int], lengths: Sequence[int], max_sequences: int | None, max_tokens: int
) -> list[list[int]]:
    """Sequences of similar length together, so that little is padded."""
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


def _split(batches: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """So many micro-batches, by halving the one with the most sequences."""
    current = [list(batch) for batch in batches]
    while len(current) < count:
        largest = max(range(len(current)), key=lambda i: len(current[i]), default=None)
        if largest is None or len(current[largest]) < 2:
            current.append([])
            continue
        batch, half = current[largest], len(current[largest]) // 2
        current[largest : largest + 1] = [batch[:half], batch[half:]]
    return current
