"""Graders stricter or laxer than ``math``, to compare with published results of other projects.

Written from how those graders behave on given answers, not from their code; docs/evaluation.md has the table.
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
# sympy raises these for invalid expressions and for expressions without a numeric value; any other error is a bug
SYMPY_ERRORS = (ValueError, TypeError, AttributeError, SyntaxError, ArithmeticError, RecursionError)


def math_sympy(sample: RewardInput) -> float:
    """Return 1 if the last boxed answer equals the reference after light clean-up or by simplifying the difference.

    Like understand-r1-zero's fast grader and DeepScaleR's: if the reference is a fraction, the answer must be in lowest
    terms; no unordered sets, no powers in braces; units are ignored. Returns 0 otherwise.
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
    """Return 1 if the last boxed answer equals the reference by the rules of Qwen's harness for raw strings, else 0.

    Numbers are equal within a relative 1e-4, also if one is a hundred times the other (percent). The kind of brackets
    is ignored. A unit that only one of the two has makes the answer wrong.
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
    if all(stripped != text for stripped, text in zip(inner, (given, gold), strict=True)):
        parts = [text.split(",") for text in inner]
        if "\\{" in given and "\\{" in gold:
            parts = [sorted(part) for part in parts]
        return len(parts[0]) == len(parts[1]) > 0 and all(
            _equal_as_qwen(a.strip(), b.strip()) for a, b in zip(*parts, strict=True)
        )
    return verify_answer(gold, f"\\boxed{{{given}}}")


def _value(text: str) -> float | None:
    """Return the number that a text represents, which may be LaTeX; None if it is not a number."""
    plain = _UNITS.sub("?", text).replace(",", "").replace("\\$", "").replace("\\%", "").replace("%", "")
    plain = plain.replace("^\\circ", "").replace("^{\\circ}", "").replace("\\pi", "pi").strip()
    try:
        return float(plain)
    except ValueError:
        pass
    return _number_of(_as_python(plain))


def _cleaned(text: str) -> str:
    """Remove what is ignored: spaces, units, currency, percent, degrees, a name before an equals sign."""
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
    """Return the parts of a tuple or an interval; any other text is one part."""
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and "," in text:
        return text[1:-1].split(",")
    return [text]


def _simplifies(given: str, gold: str) -> bool:
    if given == gold:
        return True
    given_fraction, gold_fraction = _FRACTION.fullmatch(given), _FRACTION.fullmatch(gold)
    if given_fraction and gold_fraction:  # two fractions whose texts differ
        return _terms(given_fraction) == _terms(gold_fraction)
    if any("^{" in text or "\\{" in text or "," in text for text in (given, gold)):
        return False
    a, b = _as_python(given), _as_python(gold)
    if a is None or b is None:
        return False
    import sympy

    try:
        return bool(sympy.simplify(sympy.sympify(f"({a})-({b})")) == 0)
    except SYMPY_ERRORS:
        return False


def _terms(match: re.Match[str]) -> tuple[str, ...]:
    sign = "-" if match[0].startswith("-") else ""
    return sign, *(part for part in match.groups() if part is not None)


def _as_python(text: str) -> str | None:
    """Convert LaTeX of fractions, roots, products and powers to an expression for sympy; None for anything else."""
    if len(text) > MAX_CHARACTERS:
        return None
    previous = ""
    while previous != text:
        previous = text
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", r"(sqrt(\1))", text)
    text = re.sub(r"\^\{?(-?\d{1,3})\}?", r"**\1", text)
    text = text.replace("\\cdot", "*").replace("\\times", "*").replace("\\pi", "pi")
    text = re.sub(r"(\d|\))(?=\(|[a-z])", r"\1*", text)
    unknowns = set(re.findall(r"[a-z]+", text)) - {"sqrt", "pi"}
    # sympify evaluates Python, so no word may be the name of an object
    is_safe = _SAFE.fullmatch(text) and len(unknowns) <= 2 and all(len(name) == 1 for name in unknowns)
    return text if is_safe else None


def _number_of(expression: str | None) -> float | None:
    if expression is None or set(re.findall(r"[a-z]+", expression)) - {"sqrt", "pi"}:
        return None
    import sympy

    try:
        return float(sympy.sympify(expression))
    except SYMPY_ERRORS:
        return None
