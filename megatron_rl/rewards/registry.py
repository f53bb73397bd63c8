"""Reward functions by name, and their weighted sum."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence

from megatron_rl.config.plugins import load_symbol
from megatron_rl.config.reward import RewardFunctionSection
from megatron_rl.errors import ConfigError, RewardError
from megatron_rl.rewards.code import code_tests
from megatron_rl.rewards.coin_flip import coin_flip
from megatron_rl.rewards.countdown import countdown
from megatron_rl.rewards.exact import exact_match
from megatron_rl.rewards.format import think_answer_format
from megatron_rl.rewards.knights_and_knaves import knights_and_knaves
from megatron_rl.rewards.length import soft_overlong
from megatron_rl.rewards.math import math_answer
from megatron_rl.rewards.math_graders import math_qwen, math_sympy
from megatron_rl.rewards.pattern import pattern_match
from megatron_rl.rewards.types import RewardFunction, RewardInput

REWARDS: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "pattern_match": pattern_match,
    "code_tests": code_tests,
    "math": math_answer,
    "math_sympy": math_sympy,
    "math_qwen": math_qwen,
    "format": think_answer_format,
    "countdown": countdown,
    "knights_and_knaves": knights_and_knaves,
    "coin_flip": coin_flip,
    "soft_overlong": soft_overlong,
}

Grader = Callable[[RewardInput], tuple[float, dict[str, float]]]
"""sample -> weighted sum, and function name -> value before weighting."""


def build_grader(functions: Sequence[RewardFunctionSection]) -> Grader:
    """Return a function that computes the weighted sum of reward functions and the value of each.

    Raises:
        ConfigError: a reward function is unknown, cannot be imported, or does not take its options.
    """
    loaded = [(section.name, section.weight, load_function(section)) for section in functions]

    def grade(sample: RewardInput) -> tuple[float, dict[str, float]]:
        parts = {}
        total = 0.0
        for name, weight, function in loaded:
            value = function(sample)
            if value is None or not math.isfinite(value):
                raise RewardError(f"reward {name} returned {value!r}: expected a finite number")
            parts[name] = float(value)
            total += weight * float(value)
        return total, parts

    return grade


def load_function(section: RewardFunctionSection) -> RewardFunction:
    """Return a reward function with its options bound.

    Raises:
        ConfigError: it is unknown, cannot be imported, or does not take its options.
    """
    function = load_symbol(section.name, REWARDS, "reward.functions name")
    try:
        inspect.signature(function).bind(None, **section.options)
    except ValueError:
        pass  # a callable in C may have no signature to check
    except TypeError as error:
        raise ConfigError(
            f"reward.functions name={section.name!r}, options={section.options}: {error}. "
            f"The function is called as {section.name}(sample, **options)."
        ) from error
    return functools.partial(function, **section.options)
