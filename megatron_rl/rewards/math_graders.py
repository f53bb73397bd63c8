"""Stricter and laxer ways to compare mathematical answers than ``math``, for numbers that others have published.

Written from what those graders do with given answers, not from their code; docs/evaluation.md has the table.
"""

import math
import re
from collections.abc import Sequence

from megatron_rl.rewards.math import last_boxed, verify_answer
from megatron_rl.rewards.types import RewardInput

_UNITS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}")
_FRACTION = re.compile(r"-?(?:\\frac\{(-?\d+)\}\{(\d+)\}|(\d+)/(\d+))")
_SAFE = re.compile(r"[\d\s.+\-*/()a-z]*")
MAX_CHARACTERS = 200
# what sympy raises for expressions that are none, or have no such value; anything else is a failure of the grader
NO_MATHEMATICS = (ValueError, TypeError, AttributeError, SyntaxError, ArithmeticError, RecursionError)


def math_sympy(sample: RewardInput) -> float:
    """1 when the last boxed answer is the reference after light clean-up, or by simplifying their difference.

    As understand-r1-zero's fast grader and DeepScaleR's: a fraction must be in lowest terms when the reference is one,
    no sets without order, no powers in braces, units do not count.
    """
    given = last_boxed(sample.response)
    if given is None or sample.answer is None:
        return 0.0
    a, b = _cleaned(given), _cleaned(sample.answer)
    if a == b:
        return 1.0
    parts = [_split(text) for text in (a, b)]
    if len(parts[0]) != len(parts[1]) or (len(parts[0]) > 1 and (a[0], a[-1]) != (b[0], b[-1])):
        return 0.0
    return float(all(_simplifies(x, y) for x, y in zip(*parts, strict=True)))


def math_qwen(sample: RewardInput) -> float:
    """1 when the last boxed answer is the reference as Qwen's evaluation harness compares raw strings.

    Numbers within one part in ten thousand, also a hundred times larger or smaller (percent), kinds of brackets do not
    count, and a unit makes an answer wrong.
    """
    given = last_boxed(sample.response)
    if given is None or sample.answer is None:
        return 0.0
    return float(_equal_as_qwen(given.strip().strip("$"), sample.answer.strip().strip("$")))


def _equal_as_qwen(given: str, gold: str) -> bool:
    if given == gold:
        return True
    x, y = _value(given), _value(gold)
    if x is not None and y is not None:
        return any(math.isclose(x, candidate, rel_tol=1e-4) for candidate in (y / 100, y, y * 100))
    if bool(_UNITS.search(given)) != bool(_UNITS.search(gold)):
        return False
    inner = [re.sub(r"^(\\\{|[\[(])|(\\\}|[\])])$", "", text) for text in (given, gold)]
    if all(one != text for one, text in zip(inner, (given, gold), strict=True)):
        parts = [text.split(",") for text in inner]
        if "\\{" in given and "\\{" in gold:
            parts = [sorted(part) for part in parts]
        return len(parts[0]) == len(parts[1]) > 0 and all(
            _equal_as_qwen(a.strip(), b.strip()) for a, b in zip(*parts, strict=True)
        )
    return verify_answer(gold, f"\\boxed{{{given}}}")


def _value(text: str) -> float | None:
    """A number, also one that is written in LaTeX; None when it is no number."""
    plain = _UNITS.sub("?", text).replace(",", "").replace("\\$", "").replace("\\%", "").replace("%", "")
    plain = plain.replace("^\\circ", "").replace("^{\\circ}", "").replace("\\pi", "pi").strip()
    try:
        return float(plain)
    except ValueError:
        pass
    return _number_of(_as_python(plain))


def _cleaned(text: str) -> str:
    """Without what does not count: spaces, units, currency, percent, degrees, a name before an equals sign."""
    text = text.strip().strip("$").rstrip(".")
    text = _UNITS.sub("", text)
    for unwanted in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\ ", "\\$", "$", "\\%", "%", "^\\circ", "^{\\circ}"):
        text = text.replace(unwanted, "")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"^([-+]?\d+)\.0+$", r"\1", text)
    return re.sub(r"\s+", "", text)


def _split(text: str) -> Sequence[str]:
    """The parts of a tuple or an interval; one of anything else."""
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and "," in text:
        return text[1:-1].split(",")
    return [text]


def _simplifies(given: str, gold: str) -> bool:
    if given == gold:
        return True
    mine, theirs = _FRACTION.fullmatch(given), _FRACTION.fullmatch(gold)
    if mine and theirs:  # both are fractions and not the same one
        return _terms(mine) == _terms(theirs)
    if any("^{" in text or "\\{" in text or "," in text for text in (given, gold)):
        return False
    a, b = _as_python(given), _as_python(gold)
    if a is None or b is None:
        return False
    import sympy

    try:
        return bool(sympy.simplify(sympy.sympify(f"({a})-({b})")) == 0)
    except NO_MATHEMATICS:
        return False


def _terms(match: re.Match[str]) -> tuple[str, ...]:
    sign = "-" if match[0].startswith("-") else ""
    return sign, *(part for part in match.groups() if part is not None)


def _as_python(text: str) -> str | None:
    """LaTeX of fractions, roots, products and powers as an expression for sympy; None for anything else."""
    if len(text) > MAX_CHARACTERS:
        return None
    before = ""
    while before != text:
        before = text
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", r"(sqrt(\1))", text)
    text = re.sub(r"\^\{?(-?\d{1,3})\}?", r"**\1", text)
    text = text.replace("\\cdot", "*").replace("\\times", "*").replace("\\pi", "pi")
    text = re.sub(r"(\d|\))(?=\(|[a-z])", r"\1*", text)
    unknowns = set(re.findall(r"[a-z]+", text)) - {"sqrt", "pi"}
    # sympy evaluates Python: no word may be the name of anything
    is_safe = _SAFE.fullmatch(text) and len(unknowns) <= 2 and all(len(name) == 1 for name in unknowns)
    return text if is_safe else None


def _number_of(expression: str | None) -> float | None:
    if expression is None or set(re.findall(r"[a-z]+", expression)) - {"sqrt", "pi"}:
        return None
    import sympy

    try:
        return float(sympy.sympify(expression))
    except NO_MATHEMATICS:
        return None
