"""Reward for an answer that is extracted by a pattern and compared as text."""

import re
from collections.abc import Sequence

from megatron_rl.rewards.types import RewardInput


def pattern_match(
    sample: RewardInput,
    pattern: str,
    which: str = "last",
    remove: Sequence[str] = (),
    ignore_case: bool = False,
    flags: str = "",
) -> float:
    """Return 1 if what a regular expression extracts from the response equals the answer, else 0.

    Args:
        pattern: regular expression; the first group that matches is extracted, or the whole match if no group does.
        which: match to use, "last" or "first".
        remove: regular expressions whose matches are removed from both texts before they are compared.
        ignore_case: whether to ignore case.
        flags: flags of the pattern, any of the letters i, m and s.
    """
    if sample.answer is None:
        return 0.0
    options = sum({"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}[letter] for letter in flags)
    matches = list(re.finditer(pattern, sample.response, options))
    if not matches:
        return 0.0
    match = matches[-1 if which == "last" else 0]
    extracted = next((group for group in match.groups() if group is not None), match[0])
    texts = []
    for text in (extracted, sample.answer):
        for unwanted in remove:
            text = re.sub(unwanted, "", text)
        texts.append(text.strip().lower() if ignore_case else text.strip())
    return float(texts[0] == texts[1])
