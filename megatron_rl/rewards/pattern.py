"""An answer found by a pattern and compared as text."""

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
    """1 when what a regular expression finds in the response is the answer, else 0.

    Args:
        pattern: its first group that matches is the answer; without groups all of it is.
        which: "last" or "first" match.
        remove: regular expressions whose matches are taken out of both before they are compared.
        ignore_case: compare without regard to case.
        flags: of the pattern, letters of i, m and s.
    """
    if sample.answer is None:
        return 0.0
    options = sum({"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}[letter] for letter in flags)
    matches = list(re.finditer(pattern, sample.response, options))
    if not matches:
        return 0.0
    match = matches[-1 if which == "last" else 0]
    found = next((group for group in match.groups() if group is not None), match[0])
    texts = []
    for text in (found, sample.answer):
        for one in remove:
            text = re.sub(one, "", text)
        texts.append(text.strip().lower() if ignore_case else text.strip())
    return float(texts[0] == texts[1])
