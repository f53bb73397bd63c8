"""Mathematical equality by math-verify, behind an exact path that answers most cases at once."""

import logging
import re
from decimal import Decimal, InvalidOperation

from megatron_rl.rewards.types import RewardInput

_NUMBER = re.compile(r"^-?\$?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?%?$")


def math_answer(sample: RewardInput, after: str | None = None) -> float:
    """1 when the response's final answer equals the reference mathematically, else 0.

    The final answer is the last \\boxed{…}, or what math-verify finds without one. The library's own
    time limits are off, as they need the main thread and count wall-clock time; the pool has hard ones.

    Args:
        after: the answer stands behind the last occurrence of this text, such as <answer>, and up to </answer>, if that
            follows; without the text the response is wrong.
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
    """What stands in the last \\boxed{…}, braces balanced; None without one."""
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
    """Whether equal texts or plain numbers are equal; None when it takes mathematics to tell."""
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
    """Whether math-verify finds the answer in a response."""
    # imported late: sympy takes a second, and many runs never need it
    from math_verify import parse, verify

    # it warns of every call without its own time limit
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=None)
    return bool(gold) and bool(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))
