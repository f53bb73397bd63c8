"""Texts that are nearly the same as an earlier one.

Candidates by MinHash (datasketch), decided by normalised edit similarity (rapidfuzz, as open-thoughts decides).
"""

from collections.abc import Sequence

from megatron_rl.errors import DataError

SHINGLE = 5
"""Characters."""
NUM_PERMUTATIONS = 128
CANDIDATE = 0.5
"""Share of common shingles from which on two texts are compared. Where one character in twenty differs it is 0.6 or
more, since each of them spoils five shingles."""
PREFERS_FALSE_CANDIDATES = (0.1, 0.9)
"""A false candidate costs a comparison, a missed one a duplicate."""


def near_duplicates(texts: Sequence[str], similarity: float) -> list[int | None]:
    """Place of the kept text that each is nearly the same as; None for those that are kept, of several the first.

    Args:
        similarity: from 0 to 100 (the same), at which two texts count as one; case and white space do not.

    Raises:
        DataError: the libraries are not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
        from rapidfuzz import fuzz
    except ImportError as error:
        raise DataError(f"near duplicates need {error.name}: pip install 'megatron_rl[curation]'.") from error
    index = MinHashLSH(threshold=CANDIDATE, num_perm=NUM_PERMUTATIONS, weights=PREFERS_FALSE_CANDIDATES)
    plain = [" ".join(text.lower().split()) for text in texts]
    found: list[int | None] = []
    for place, text in enumerate(plain):
        sketch = MinHash(num_perm=NUM_PERMUTATIONS)
        starts = range(max(1, len(text) - SHINGLE + 1))
        sketch.update_batch([text[start : start + SHINGLE].encode() for start in starts])
        candidates = sorted(index.query(sketch))
        same = next((one for one in candidates if fuzz.ratio(text, plain[one]) >= similarity), None)
        found.append(same)
        if same is None:
            index.insert(place, sketch)
    return found
