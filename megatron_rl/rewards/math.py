"""Mathematical equality by math-verify, with a fast exact comparison first that settles most cases."""

import logging
import re
from decimal import Decimal, InvalidOperation

from megatron_rl.rewards.types import RewardInput

_NUMBER = re.compile(r"^-?\$?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?%?$")


def math_answer(sample: RewardInput, after: str | None = None) -> float:
    """Return 1 if the response's final answer equals the reference answer mathematically, else 0.

    The final answer is the last \\boxed{…}, or what math-verify extracts if there is none. The library's own
    time limits are off, as they need the main thread and count wall-clock time; the reward pool has hard limits.

    Args:
        after: text that precedes the answer, such as <answer>. The answer starts after its last occurrence and ends at
            </answer> if that follows. A response without the text is wrong.
    """
    if sample.answer is None:
        return 0.0
    response = sample.response
    if after is not None:
        if after not in response:
            return 0.0
        response = response.rpartition(after)[2].partition("</answer>")[0].strip()
        if last_boxed(response) is None:
            response = f"\\boxed{{{response}}}"
    boxed = last_boxed(response)
    if boxed is not None:
        plain = _plainly_equal(boxed, sample.answer)
        if plain is not None:
            return float(plain)
    return float(verify_answer(sample.answer, response))


def last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{…}, with balanced braces; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None


def _plainly_equal(a: str, b: str) -> bool | None:
    """Whether two answers are equal as texts or as plain numbers; None if this cannot decide."""
    a, b = (x.strip().strip("$").strip() for x in (a, b))
    if a == b:
        return True
    x, y = _plain_number(a), _plain_number(b)
    return None if x is None or y is None else x == y


def _plain_number(text: str) -> Decimal | None:
    if not _NUMBER.match(text) or text.endswith("%"):
        return None
    try:
        return Decimal(text.replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None


def verify_answer(answer: str, response: str) -> bool:
    """Whether the answer that math-verify extracts from a response equals the reference answer."""
    # imported here because sympy takes a second to import and many runs never need it
    from math_verify import parse, verify

    # math-verify warns at every call without its own time limit
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=None)
    return bool(gold) and bool(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))
