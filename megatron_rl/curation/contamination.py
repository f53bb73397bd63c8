"""Rows that share n-grams of words with a benchmark.

Source: any shared lower-case 8-gram drops a row, as open-r1 does it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from megatron_rl.curation.text import words

LARGEST_SHARE = 0.5
"""Of a benchmark's questions: an n-gram in more of them is an instruction."""


class Benchmarks:
    """The n-grams of benchmarks' questions."""

    def __init__(self, questions: Mapping[str, Iterable[str]], n: int = 8) -> None:
        """
        Args:
            questions: by the name of a benchmark.
            n: words; a question with fewer counts as one gram of its own.
        """
        self._n = n
        self._grams: dict[tuple[str, ...], str] = {}
        for name, texts in questions.items():
            grams = [set(self._of(text)) for text in texts]
            counts = Counter(gram for found in grams for gram in found)
            # what stands in most questions is how they are asked
            own = (gram for gram, count in counts.items() if count <= max(1, len(grams) * LARGEST_SHARE))
            self._grams |= {gram: name for gram in own if gram not in self._grams}

    def found_in(self, text: str) -> tuple[str, str] | None:
        """The first benchmark that shares an n-gram, and which; None when none does."""
        found = words(text)
        for gram in self._of_words(found):
            if gram in self._grams:
                return self._grams[gram], " ".join(gram)
        whole = tuple(found)
        return (self._grams[whole], " ".join(whole)) if whole in self._grams else None

    def _of(self, text: str) -> list[tuple[str, ...]]:
        found = words(text)
        return self._of_words(found) or ([tuple(found)] if found else [])

    def _of_words(self, found: list[str]) -> list[tuple[str, ...]]:
        return [tuple(found[start : start + self._n]) for start in range(len(found) - self._n + 1)]
