"""Which sequence goes to which update, data-parallel rank and micro-batch.

Everything here is a pure function of the lengths, so that every rank computes the same plan.
"""

from collections.abc import Sequence


def balance(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Indices shared out over bins so that token sums are even: longest first, to the emptiest bin.

    Bins get equal counts where the number divides (their indices stay in ascending order).
    """
    capacity = -(-len(lengths) // num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    sums = [0] * num_bins
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = min((b for b in range(num_bins) if len(bins[b]) < capacity), key=lambda b: (sums[b], b))
        bins[target].append(index)
        sums[target] += lengths[index]
    return [sorted(members) for members in bins]


def micro_batches(
    indices: Sequence[int], lengths: Sequence[int], *, max_sequences: int | None, max_tokens: int, packed: bool
) -> list[list[int]]:
    """Consecutive runs of ``indices`` within the limits.

    Args:
        indices: places in ``lengths``.
        lengths: tokens of every sequence.
        max_sequences: most sequences in one micro-batch; None: no limit.
        max_tokens: most tokens in one, padding to the longest counted in unless ``packed``.
        packed: sequences one behind the other.
    """
    batches: list[list[int]] = []
    tokens = longest = 0
    for index in indices:
        grown = max(longest, lengths[index])
        wanted = tokens + lengths[index] if packed else grown * (len(batches[-1]) + 1 if batches else 1)
        full = bool(batches) and (wanted > max_tokens or len(batches[-1]) == max_sequences)
        if full or not batches:
            batches.append([])
            tokens = longest = 0
        batches[-1].append(index)
        tokens += lengths[index]
        longest = max(longest, lengths[index])
    return batches


def equalise(batches_of_rank: Sequence[Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """The same number of micro-batches on every rank, by splitting the largest.

    A rank with fewer sequences than that number gets empty micro-batches at its end, which the
    caller fills with a sequence that has no loss.
    """
    count = max(1, max(len(batches) for batches in batches_of_rank))
    result = []
    for batches in batches_of_rank:
        current = [list(batch) for batch in batches]
        while len(current) < count:
            largest = max(range(len(current)), key=lambda i: len(current[i]), default=None)
            if largest is None or len(current[largest]) < 2:
                current.append([])
                continue
            batch = current[largest]
            half = len(batch) // 2
            current[largest : largest + 1] = [batch[:half], batch[half:]]
        result.append(current)
    return result
