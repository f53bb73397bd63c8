"""Environments of multi-turn rollouts, which reply to the responses of the policy."""

from megatron_rl.config.plugins import load_symbol
from megatron_rl.environments.base import Environment, Episode, Turn
from megatron_rl.environments.guess_number import GuessNumber

ENVIRONMENTS: dict[str, type[Environment]] = {"guess_number": GuessNumber}


def build_environment(name: str, options: dict[str, object]) -> Environment:
    """Build an environment from its registered name or ``package.module:symbol``.

    Args:
        name: value of ``rollout.environment``.
        options: keyword arguments of the environment (``rollout.environment_options``).

    Raises:
        ConfigError: there is no environment of that name, or it does not accept the options.
    """
    environment: Environment = load_symbol(name, ENVIRONMENTS, "rollout.environment")(**options)
    return environment


__all__ = ["ENVIRONMENTS", "Environment", "Episode", "Turn", "build_environment"]
