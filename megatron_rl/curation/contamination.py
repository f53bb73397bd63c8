"""Detection of problems that share word n-grams with a benchmark.

Source: open-r1, where any shared lower-case 8-gram drops a row.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from megatron_rl.curation.text import words

LARGEST_SHARE = 0.5
"""Share of a benchmark's questions above which an n-gram counts as part of the instructions and is ignored."""


class BenchmarkNgrams:
    """Word n-grams of the questions of several benchmarks."""

    def __init__(self, questions: Mapping[str, Iterable[str]], n: int = 8) -> None:
        """
        Args:
            questions: benchmark name -> texts of its questions.
            n: words of an n-gram; a question with fewer words is one n-gram.
        """
        self._n = n
        self._grams: dict[tuple[str, ...], str] = {}
        for name, texts in questions.items():
            grams = [set(self._of(text)) for text in texts]
            counts = Counter(gram for of_question in grams for gram in of_question)
            # n-grams of most questions come from the instructions
            own = (gram for gram, count in counts.items() if count <= max(1, len(grams) * LARGEST_SHARE))
            self._grams |= {gram: name for gram in own if gram not in self._grams}

    def find_shared(self, text: str) -> tuple[str, str] | None:
        """Return the benchmark of the first shared n-gram, and the n-gram; None if no n-gram is shared."""
        tokens = words(text)
        for gram in self._of_words(tokens):
            if gram in self._grams:
                return self._grams[gram], " ".join(gram)
        whole = tuple(tokens)
        return (self._grams[whole], " ".join(whole)) if whole in self._grams else None

    def _of(self, text: str) -> list[tuple[str, ...]]:
        tokens = words(text)
        return self._of_words(tokens) or ([tuple(tokens)] if tokens else [])

    def _of_words(self, tokens: list[str]) -> list[tuple[str, ...]]:
        return [tuple(tokens[start : start + self._n]) for start in range(len(tokens) - self._n + 1)]
