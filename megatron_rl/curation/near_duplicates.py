"""Detection of texts that are near duplicates of an earlier one.

MinHash (datasketch) finds candidates; normalized edit similarity (rapidfuzz) decides, as in open-thoughts.
"""

from collections.abc import Sequence

from megatron_rl.errors import DataError

SHINGLE = 5
"""Characters of a shingle."""
NUM_PERMUTATIONS = 128
CANDIDATE = 0.5
"""Jaccard similarity of shingles from which on two texts are compared. Texts that differ in one character of twenty
have 0.6 or more, because each differing character changes five shingles."""
LSH_WEIGHTS = (0.1, 0.9)
"""Weights of false positives and false negatives: a false candidate costs a comparison, a missed one a duplicate."""


def near_duplicates(texts: Sequence[str], similarity: float) -> list[int | None]:
    """Find near duplicates; the first text of each set of duplicates is kept.

    Args:
        texts: to compare.
        similarity: from 0 to 100 (equal), from which on two texts are duplicates; case and white space are ignored.

    Returns:
        for each text, the index of the kept text that it duplicates; None if it is kept.

    Raises:
        DataError: datasketch or rapidfuzz is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
        from rapidfuzz import fuzz
    except ImportError as error:
        raise DataError(
            f"near_duplicates needs {error.name}, which is not installed: pip install 'megatron_rl[curation]'."
        ) from error
    index = MinHashLSH(threshold=CANDIDATE, num_perm=NUM_PERMUTATIONS, weights=LSH_WEIGHTS)
    plain = [" ".join(text.lower().split()) for text in texts]
    duplicate_of: list[int | None] = []
    for position, text in enumerate(plain):
        sketch = MinHash(num_perm=NUM_PERMUTATIONS)
        starts = range(max(1, len(text) - SHINGLE + 1))
        sketch.update_batch([text[start : start + SHINGLE].encode() for start in starts])
        candidates = sorted(index.query(sketch))
        same = next((one for one in candidates if fuzz.ratio(text, plain[one]) >= similarity), None)
        duplicate_of.append(same)
        if same is None:
            index.insert(position, sketch)
    return duplicate_of
