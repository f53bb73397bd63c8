"""Safe evaluation of arithmetic expressions written by a model: no eval, no powers, bounded size."""

import ast
from fractions import Fraction

MAX_CHARACTERS = 500
MAX_DEPTH = 50


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """Return the exact value of an expression and the numbers in it.

    An expression consists of whole numbers, + - * / and parentheses.

    Raises:
        ValueError: the expression contains anything else, is too long or nested too deeply, or divides by zero.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"{len(expression)} characters: expected at most {MAX_CHARACTERS}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"not arithmetic: {expression!r}") from error
    numbers: list[int] = []
    return _value(tree.body, numbers, 0), numbers


def _value(node: ast.expr, numbers: list[int], depth: int) -> Fraction:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, numbers, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, numbers, depth + 1), _value(node.right, numbers, depth + 1)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            if right == 0:
                raise ValueError("division by zero")
            return left / right
    raise ValueError(f"{type(node).__name__} is not allowed")
